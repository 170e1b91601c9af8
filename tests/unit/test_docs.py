"""The pages of the documentation: examples run, links lead somewhere, lists are complete."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

import chats
import tiny
from datakit import jsonl, load
from moored.config import ParallelConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p
    for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
    if not p.relative_to(ROOT).parts[0].startswith(".")
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- ran:(\w+) -->\n```json\n(.*?)\n```\n```text\n(.*?)\n```", DATA, re.S)
TEMPLATES = dict(re.findall(r"<!-- template:(\w+) -->\n```jinja\n(.*?)```", DATA, re.S))
WITH_TOOLS = tiny.CHATML.replace(
    "{% for m",
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m",
).replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m['tool_calls'] or () %}<call>{{ c['function']['name'] }}"
    "({{ c['function']['arguments'] | tojson }})</call>{% endfor %}",
)
DROPPING = tiny.CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['reasoning_content'] and loop.last %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] }}",
)


def test_the_page_of_data_has_its_examples():
    kinds = [kind for kind, _, _ in EXAMPLES]
    assert sorted(set(kinds)) == [
        *("chatml", "dropping", "joined", "marked", "plain", "rendered", "tools"),
    ]
    assert DATA.count("```json") == len(EXAMPLES)
    assert TEMPLATES.keys() == {"marked", "joined"}


@pytest.mark.parametrize(("kind", "row", "text"), EXAMPLES, ids=[kind for kind, _, _ in EXAMPLES])
def test_an_example_of_the_page_of_data(kind, row, text, tmp_path):
    """Targets stand between « and »."""
    template = {"plain": None, "tools": WITH_TOOLS, "dropping": DROPPING}.get(kind, tiny.CHATML)
    tokenizer = chats.tokenizer(template, add_bos=kind in ("plain", "joined"))
    options = {"source": {"rendered": True}} if kind == "rendered" else {}
    if kind in TEMPLATES:
        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATES[kind], encoding="utf-8")
        options["chat_template"] = file
    samples = load(jsonl(tmp_path / "x.jsonl", [json.loads(row)]), tokenizer, **options)
    assert "\n".join(marked(sample, tokenizer) for sample in samples) == text


def marked(sample, tokenizer) -> str:
    shown, before = "", False
    for index, (token, mask) in enumerate(zip(sample.input_ids, sample.label_mask, strict=True)):
        is_target = bool(mask) and index > 0
        if is_target != before:
            shown += "«" if is_target else "»"
        shown += tokenizer.decode([token])
        before = is_target
    return shown + "»" * before


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{target} in {page}"
        if anchor:
            assert anchor in anchors(to), f"{target} in {page}"


def named_files() -> list[tuple[str, str]]:
    """Where, and which file of the project is named: on pages, in docstrings and comments."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        if page.name != "CHANGELOG.md":  # what is told of the past
            text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
            found += [(page.name, name) for name in re.findall(r"`([\w./-]+\.(?:py|j2))`", text)]
    for file in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "launch").glob("_*.py")]):
        text = file.read_text(encoding="utf-8")
        said = [node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED)]
        words = [ast.get_docstring(node) or "" for node in said] + re.findall(r"#.*", text)
        where = file.relative_to(ROOT).as_posix()
        found += [(where, n) for w in words for n in re.findall(r"(?<![\w*/.])[\w./-]+\.py\b", w)]
    return found


def test_every_file_that_is_named_exists_and_is_the_only_one():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [f"/{name}" for name in files.stdout.split("\n") if (ROOT / name).is_file()]
    files = files or [f"/{p.relative_to(ROOT)}" for p in ROOT.rglob("*.py")]
    named = named_files()
    assert len(named) > 100
    fits = {(where, name): [f for f in files if f.endswith(f"/{name}")] for where, name in named}
    assert {key: found for key, found in fits.items() if len(found) != 1} == {}


def test_the_equations_that_the_loss_names_are_numbered_on_its_page():
    page = (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")
    numbered = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", page)]
    assert numbered == [*range(1, len(numbered) + 1)]
    code = [p.read_text(encoding="utf-8") for p in (ROOT / "src/moored/loss").glob("*.py")]
    named = {int(n) for text in code for n in re.findall(r"\beq\. (\d+)", text)}
    assert named <= {*numbered}
    nothing_is_subtracted = {*range(5, 13)}
    assert nothing_is_subtracted <= named


def test_every_folder_of_the_project_that_a_page_names_is_there():
    tops = "src|tests|launch|docker|recipes|benchmarks"  # `slurm/` is a folder of runs, too
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        text = page.read_text(encoding="utf-8")
        for path in re.findall(rf"`((?:{tops})/[\w./-]*)`", text):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{path} in {page}"


def test_no_two_files_and_no_two_classes_of_the_package_have_one_name():
    files = [p for p in (ROOT / "src").rglob("*.py") if not p.name.startswith("__")]
    names = Counter(p.name for p in files)
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in files]
    names += Counter(n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_variable_that_is_read_is_listed():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", page))
    read: set[str] = set()
    for folder in ("src", "launch", "slurm", "docker", ".ci", "tests"):
        for path in (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"):
            text = path.read_text(encoding="utf-8", errors="replace")
            read |= set(re.findall(r"\bMOORED_[A-Z_]+\b", text))
            if folder in ("src", "launch"):
                calls = r"environ(?:\.\w+\(|\[)\"([A-Z][A-Z0-9_]+)\"|_integer\(\"([A-Z_]+)\""
                read |= {name for found in re.findall(calls, text) for name in found if name}
    assert {"MOORED_CACHE", "SLURM_JOB_ID", "MASTER_PORT", "TORCH_LOGS"} <= read
    assert read <= listed, read - listed


# Hidden size, size of the MLP, layers, features of the keys, vocabulary, tables of words.
SHAPES = {
    "Llama 3.2 1B": (2048, 8192, 16, 512, 128256, 1),
    "Llama 3.2 3B": (3072, 8192, 28, 1024, 128256, 1),
    "Llama 3.1 8B": (4096, 14336, 32, 1024, 128256, 2),
    "Qwen2.5 32B": (5120, 27648, 64, 1024, 152064, 2),
    "Llama 3.1 70B": (8192, 28672, 80, 1024, 128256, 2),
}


def estimate(shape, T, zero_stage=2, tensor_parallel_degree=1, gpus=1):
    """The formula of docs/parallelism.md: base, adapter, checkpoints, at work, in GiB."""
    D, I, layers, K, V, words = SHAPES[shape]  # noqa: E741
    t, d, r = tensor_parallel_degree, gpus // tensor_parallel_degree, 16
    N, v, zero_3 = layers * (2 * D * D + 2 * D * K + 3 * D * I), V / t, zero_stage == 3
    base = (0.5 * N + words * 2 * V * D) / t / (d if zero_3 else 1)
    base += N / t * (0.0625 if t > 1 else 0.016) + (N / layers + 2**26) * zero_3
    cut = sum(D + o / t for o in (D, K, K, I, I)) + sum(i / t + D for i in (D, I))
    adapter = layers * r * cut * {0: 16, 2: 4 + 16 / d, 3: 4 + 16 / d}[zero_stage]
    checkpoints = 2 * T * D * ((layers - 1) / t + 1)
    C = min(T, 4096, 2**27 // int(v) // 128 * 128)
    head = 10 * C * v + 2 * v * D * (1 + zero_3) + 16 * T * D
    layer = T * (12 * D + (6 * D + 12 * I) / t) + 2 * D * I / t + 2**26 * (zero_stage == 2)
    return [x / 2**30 for x in (base, adapter, checkpoints, max(head, layer))]


def test_the_table_of_memory_is_its_formula():
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    number = r" \| ([\d.,]+)"
    pattern = rf"^\| ([\w. ]+B) \| `(\{{.*?\}})`{number * 8} \|$"
    rows = re.findall(pattern, page, re.M)
    assert len(rows) == 10
    for shape, parallel, gpus, tokens, *figures in rows:
        settings = ParallelConfig.model_validate(yaml.safe_load(parallel))
        given = settings.model_dump(include=settings.model_fields_set)
        parts = estimate(shape, int(tokens.replace(",", "")), gpus=int(gpus), **given)
        for shown, exact in zip(figures[:5], [*parts, sum(parts)], strict=True):
            assert abs(float(shown) - exact) <= 0.05 + 1e-9, (shape, parallel, figures, parts)
        assert float(figures[5]) >= 1.15 * sum(parts)
    assert round(sum(estimate("Llama 3.2 1B", 4096, zero_stage=0)), 2) == 3.21
    assert round(sum(estimate("Llama 3.2 3B", 8192, zero_stage=0)), 2) == 6.10
