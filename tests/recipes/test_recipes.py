"""Every recipe of the repository loads strictly, and the data beside it is what it should be.

Nothing is downloaded: what comes from the hub is checked for its form, and each recipe is run on a
shrunken model of its architecture with random weights, and on data made here.
"""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from distributed.runner import mostly_long
from forking import finished, moored
from moored.config import Config, arm_names, load_config
from moored.config.inputs import KNOWN_TEXTS
from moored.data import check_data
from moored.data.reading import resolve_text
from moored.plan.architecture import find_config
from tiny import SMALLEST, tiny_tokenizer, write_chats, write_text

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
QUICKSTART = ROOT / "recipes" / "quickstart"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").as_posix()


def chats(split: str) -> list[dict[str, str]]:
    """Role -> content of each row."""
    rows = [json.loads(line) for line in (QUICKSTART / f"{split}.jsonl").open(encoding="utf-8")]
    return [{turn["role"]: turn["content"] for turn in row["messages"]} for row in rows]


def test_there_are_recipes() -> None:
    assert {"quickstart/slurm-headers.yaml", "qwen2.5-0.5b/gsm8k.yaml"} <= {
        name_of(path) for path in RECIPES
    }


def test_run_directories_do_not_collide() -> None:
    names = [load_config(path).name for path in RECIPES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe(path: Path) -> None:
    config = load_config(path)
    assert config.data.eval, "what was learned cannot be told without held-out data"
    assert config.retention, "what was forgotten cannot be told without a corpus"
    assert len(set(arm_names(config.compare))) == len(config.compare) > 1
    assert_hub_names(config)
    assert_local_files_validate(config)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_resolved_copy_is_the_recipe(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(config.dump_yaml(), encoding="utf-8")
    assert load_config(copy).fingerprint() == config.fingerprint()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_listed_with_its_costs(path: Path) -> None:
    assert f"| `{name_of(path)}` |" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_what_is_planned_is_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe on every cluster of the table loads with its overrides, fits, and costs that."""
    monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
    made = runpy.run_path(str(ROOT / "benchmarks" / "plan_recipes.py"))
    pages = {path.name: path.read_text(encoding="utf-8") for path in made["PAGES"]}
    for page in pages.values():
        assert page == made["written"](page), "run python benchmarks/plan_recipes.py"
    long = re.search(r"<!-- long -->\n(.*?)<!-- /long -->", pages["plan.md"], re.S)
    assert long is not None
    assert long[1].count("| `") >= 12
    assert re.findall(r"does not fit \|$", long[1], re.M)
    assert pages["plan.md"].count("    $ moored plan ") >= 4
    page = pages["README.md"]
    listed = set(re.findall(r"^\| `([\w./-]+)` \| (?:\d nodes of )?`\d", page, re.M))
    large = {name_of(path) for path in RECIPES} - {
        "quickstart/slurm-headers.yaml",
        "qwen2.5-0.5b/gsm8k.yaml",
    }
    assert listed == large


def shrunken(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make a recipe small: a model of its architecture, data of its layout."""
    monkeypatch.setenv("HF_HUB_CACHE", os.devnull)
    monkeypatch.setenv("MOORED_CACHE", str(folder / "cache"))
    config = load_config(path)
    sizes, _, _ = find_config(config.model)
    model = folder / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model)
    sizes = sizes | SMALLEST | {"vocab_size": len(tokenizer)}
    (model / "config.json").write_text(json.dumps(sizes))
    is_chat = config.data.train[0].format == "messages"
    sources = [write_chats(folder / "train.jsonl"), write_chats(folder / "eval.jsonl", 6, start=90)]
    for file in sources if is_chat else ():
        rows = [json.loads(line) for line in file.open()]
        turns = ({"user": row["prompt"], "assistant": row["completion"]} for row in rows)
        chats = [[{"role": who, "content": text} for who, text in turn.items()] for turn in turns]
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    kept = "messages" if is_chat else "prompt_completion"
    return [
        f"output.dir={folder}/runs",
        f"model.name_or_path={model}",
        "model.weights=random",
        f"data.train=[{{path: {sources[0]}, format: {kept}}}]",
        f"data.eval=[{{path: {sources[1]}, format: {kept}}}]",
        f"retention={{fox: {{path: {write_text(folder / 'fox.txt')}, window_tokens: 64}}}}",
        "data.max_length=128",
        "parallel.zero_stage=0",
        "train.steps=2",
        *(["train.epochs=null"] if config.train.epochs is not None else []),
        "train.global_batch_sequences=4",
        "optim.warmup_steps=1",
        "track.mlflow=false",
    ]


LARGE = [path for path in RECIPES if path.parent != QUICKSTART]
ONE = ROOT / "recipes" / "llama-3.3-70b" / "chat.yaml"
PAPERS = [path for path in RECIPES if path.name == "gsm8k.yaml"]


@pytest.mark.parametrize("path", mostly_long(LARGE, ONE), ids=name_of)
def test_a_recipe_trains_a_shrunken_model(path: Path, tmp_path: Path, monkeypatch) -> None:
    overrides = shrunken(path, tmp_path, monkeypatch)
    finished(moored("train", str(path), *overrides, cwd=tmp_path))
    run = tmp_path / "runs" / load_config(path).name
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
@pytest.mark.parametrize("method", ["dora", "sinelora", "randlora"])
def test_the_papers_other_adapters_are_an_override_away(path: Path, method: str) -> None:
    """As the recipe's head says it."""
    lines = re.sub(r" \\\n# +", " ", path.read_text()).splitlines()
    commands = [line for line in lines if f"adapter.method={method}" in line]
    assert len(commands) == 1
    overrides = [word for word in commands[0].split() if word.startswith("adapter.")]
    assert load_config(path, overrides).adapter.method == method


@pytest.mark.long
@pytest.mark.parametrize("method", ["dora", "sinelora", "randlora adapter.alpha=320"])
def test_the_papers_other_adapters_train(method: str, tmp_path: Path, monkeypatch) -> None:
    overrides = shrunken(PAPERS[0], tmp_path, monkeypatch)
    overrides += f"adapter.method={method}".split()
    finished(moored("train", str(PAPERS[0]), *overrides, cwd=tmp_path))


@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_a_recipe_says_how_it_is_submitted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"#     moored submit +{re.escape(str(path.relative_to(ROOT)))} --site", text)


def assert_hub_names(config: Config) -> None:
    sources = [*config.data.train, *config.data.eval, *config.retention.values()]
    assert all(HUB_NAME.fullmatch(source.hub) for source in sources if source.hub is not None)
    assert HUB_NAME.fullmatch(config.model.name_or_path)
    revisions = [config.model.revision, *(source.revision for source in sources)]
    for revision in (r for r in revisions if r is not None):
        assert re.fullmatch(r"[0-9a-f]{40}", revision), f"{revision}: pin a commit, or nothing"


def assert_local_files_validate(config: Config) -> None:
    local = [s for s in (*config.data.train, *config.data.eval) if s.path is not None]
    for source in local:
        assert Path(source.path).is_relative_to(ROOT / "recipes"), "a recipe brings its own files"
    if len(local) == len(config.data.train) + len(config.data.eval):
        check_data(config)
    for name, corpus in config.retention.items():
        if corpus.hub is None and corpus.builtin not in KNOWN_TEXTS:
            assert sum(len(text.split()) for text in resolve_text(corpus)) > 1000, name


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_committed_task_is_what_the_generator_makes(split: str) -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "quickstart" / "make_task.py"))["make"]()
    text = "".join(json.dumps(row) + "\n" for row in made[split])
    assert (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8") == text, (
        "run python benchmarks/quickstart/make_task.py recipes/quickstart"
    )


def test_exact_match_is_meaningful() -> None:
    train, held_out = chats("train"), chats("eval")
    assert len(train) == 320
    assert len(held_out) == 60
    for row in (*train, *held_out):
        for line in row["assistant"].split("\n"):
            assert re.fullmatch(
                r"#SBATCH --(job-name=[a-z]+|partition=[a-z0-9]+|nodes=\d+|gpus-per-node=\d+"
                r"|time=\d+:[0-5]\d:00|mem=\d+G)",
                line,
            )
    # No answer was seen in training, and no request has two answers.
    assert not {row["assistant"] for row in train} & {row["assistant"] for row in held_out}
    requests = [row["user"] for row in (*train, *held_out)]
    assert len(set(requests)) == len(requests)


def test_every_option_of_an_answer_is_in_the_request() -> None:
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "six": 6, "eight": 8, "twelve": 12}
    for row in (*chats("train"), *chats("eval")):
        said = set(re.findall(r"[a-z0-9]+", row["user"].lower()))
        said |= {str(words[word]) for word in said & words.keys()}
        said |= {match[:-1] for match in said if re.fullmatch(r"\d+g", match)}
        for option, value in re.findall(r"--([a-z-]+)=(\S+)", row["assistant"]):
            if option in ("nodes", "gpus-per-node") and value == "1":
                continue  # "on a node" says it too
            if option != "time":
                assert value.removesuffix("G") in said, row


def test_every_value_of_the_held_out_task_is_taught() -> None:
    """Otherwise a wrong answer would say nothing about what was learned."""

    def values(split: str) -> set[str]:
        return {line for row in chats(split) for line in row["assistant"].split("\n")}

    assert values("eval") <= values("train")


def test_base_samples_are_text_and_enough() -> None:
    rows = [json.loads(line) for line in (QUICKSTART / "base-samples.jsonl").open()]
    assert len({row["question"] for row in rows}) == len(rows)
    assert all(row["text"].strip() and "<|im_" not in row["text"] for row in rows)
    assert sum(len(row["text"].split()) for row in rows) > 3500  # about 1.3 tokens a word
