"""The forgetting card: what it says, what it cannot be made to say, what it is computed from."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from forking import finished, moored
from moored.config import ModelConfig, load_config
from moored.evaluation.report import Report, write
from moored.export import merge, run_command
from moored.export.adapter_changes import adapter_deltas, deltas_summary
from moored.export.card import facts, gather, markdown
from moored.export.card.facts import Base, Data, Figures, File, SourceFacts, TrainingFacts
from moored.export.card.markdown import CARD_NAME, JSON_NAME, MARK, readme_of
from moored.export.resolve_target import open_input
from moored.models.hub import ResolvedModel
from moored.tracking.run_directory import RunDirectory
from moored.utils import atomic_dir
from moored.utils.errors import UserError
from report_cases import arm, base, one, report_of, strict_json
from tiny import tiny_model, tiny_recipe, write_recipe

pytestmark = pytest.mark.usefixtures("forked_verification")

GOLDEN = Path(__file__).parents[2] / "golden" / "card"
CPU = torch.device("cpu")
SOURCES = {"python-reference": "built in", "base-samples": "base-samples.jsonl"}
TMKL = {"kind": "tmkl", "weight": 0.2, "direction": "forward", "temperature": 2.0, "every": 1}


def figures(report: Report | None = None) -> Figures:
    if report is None:
        after = {"adaptation_exact_match": 17 / 24, "drift_tmkl_nats_per_token": {}}
        report = report_of(
            arm("tmkl", 1.018, 26.8, 4.25, **after, top1_agreement={"base-samples": 0.9}),
            adaptation_exact_match=0.0,
            num_adaptation_tokens=758,
            num_adaptation_prompts=24,
        )
    return Figures.of(report, next(iter(report.arms)), SOURCES)


def a_card(**changes) -> facts.Card:
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    values = {
        "kind": "adapter",
        "name": "slurm-headers",
        "created": "2026-01-02T03:04:05Z",
        "figures": figures(),
        "base": Base(
            name=hub,
            hub=hub,
            revision="0.1.2",
            origin=f"hub:{hub}",
            quantization="nf4",
            double_quantization=True,
            license="apache-2.0",
            files={"model.safetensors": File(bytes=269060280, sha256="ab" * 32, by="hub")},
        ),
        "adapter": facts.Adapter(
            method="lora",
            r=16,
            alpha=32.0,
            dropout=0.05,
            target_modules=("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
            num_parameters=4884480,
            sha256="cd" * 32,
            bytes=19593064,
        ),
        "training": TrainingFacts(
            regularizer=TMKL,
            optim={"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 8},
            train={"steps": 72, "global_batch_sequences": 4, "seed": 0},
            steps=72,
            tokens=20375,
            seconds=185.3,
            final_loss=0.146,
        ),
        "data": Data(
            sources=(
                SourceFacts(
                    name="train.jsonl",
                    format="messages",
                    num_samples=320,
                    num_tokens=22802,
                    num_dropped=0,
                    sha256="ef" * 32,
                ),
                SourceFacts(name="gsm8k/main", hub="openai/gsm8k", format="prompt_completion"),
            ),
            num_samples=320,
            num_tokens=22802,
            sha256="01" * 32,
        ),
        "deltas": facts.Deltas(
            of="adapter",
            total=facts.Delta(count=2, norm=5.0, relative=0.016),
            by_module={"up_proj": facts.Delta(count=2, norm=5.0, relative=0.016)},
            largest="model.layers.1.mlp.up_proj",
            largest_delta=facts.Delta(count=1, norm=4.0, relative=0.02),
        ),
        "verified": {
            "num_tokens": 256,
            "relative_rms_of_logits": {
                "difference": 1e-6,
                "tolerance": 6.4e-5,
                "adapter_effect": 0.48,
                "share": 1.0,
            },
        },
        "provenance": facts.Provenance(
            began="2026-01-02T00:10:45Z",
            ended="2026-01-02T00:15:12Z",
            attempts=1,
            recipe_sha256="23" * 32,
            commits=("45" * 20,),
            versions={"moored": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
            export_versions={"moored": "0.1.0", "peft": "0.21.2"},
            mlflow=({"uri": "https://mlflow.example.org", "run_id": "67" * 16},),
        ),
    }
    return facts.Card(**(values | changes))


MERGED = facts.Merged(
    into="w16",
    dtype="bfloat16",
    kl_trained_merged_nats_per_token=0.112,
    kl_trained_base_nats_per_token=1.74,
)
STOPS = facts.Stops(
    learned=(facts.End(id=2, token="<|im_end|>", count=6962), facts.End(id=5, token="<|eom_id|>")),
    base=(facts.End(id=0, token="<|endoftext|>"),),
)
CASES = {
    "adapter": a_card(stops=STOPS),
    "merged": a_card(
        stops=facts.Stops(learned=STOPS.learned[:1], base=STOPS.learned[:1]),
        kind="merged",
        merged=MERGED,
        scale=0.7,
        deltas=facts.Deltas(of="merged", missing="no matrix"),
    ),
    "unknown": a_card(
        figures=Figures(
            missing="This adapter was not measured. `moored evaluate RUN` measures it."
        ),
        base=Base(name="model", revision="local:1234"),
        adapter=facts.Adapter(method="dora"),
        training=None,
        data=None,
        deltas=facts.Deltas(of="adapter", missing="DoRA changes magnitudes, too"),
        verified={},
        provenance=facts.Provenance(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cards_are_as_they_were(case: str) -> None:
    """`MOORED_GOLDEN=write` writes them anew: look at the difference before committing it."""
    content = {
        "md": markdown.page(CASES[case]),
        "json": json.dumps(CASES[case].to_json(), indent=1, allow_nan=False) + "\n",
    }
    for suffix, shown in content.items():
        path = GOLDEN / f"{case}.{suffix}"
        if os.environ.get("MOORED_GOLDEN") == "write":
            path.write_text(shown)
        assert shown == path.read_text()


# ---------------------------------------------------------------- the page as others read it


def parsed(page: str) -> tuple[dict, list]:
    """Front matter and tokens, as the hub's client and a Markdown parser with tables see them."""
    whole = ModelCard(page)
    assert whole.data.to_dict() == yaml.safe_load(page.split("\n---\n")[0])
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(whole.text)
    return whole.data.to_dict(), tokens


def cells(tokens: list) -> list[list[list[str]]]:
    """Tables as rows of what stands in their cells, unescaped."""
    tables: list[list[list[str]]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            tables.append([])
        if before.type == "tr_open":
            tables[-1].append([])
        if before.type in ("td_open", "th_open"):
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables


def test_the_hub_finds_base_library_and_data_in_the_front_matter():
    matter, _ = parsed(markdown.page(a_card()))
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert matter["library_name"] == "peft"
    assert matter["license"] == "apache-2.0"
    assert matter["datasets"] == ["openai/gsm8k"]
    adapter = "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct"
    assert matter["tags"] == [adapter, "lora", "moored"]
    matter, _ = parsed(markdown.page(CASES["merged"]))
    assert (matter["library_name"], matter["base_model_relation"]) == ("transformers", "finetune")
    matter, _ = parsed(markdown.page(CASES["unknown"]))  # the hub takes names of its models only
    assert matter.keys() == {"library_name", "pipeline_tag", "tags"}
    assert matter["tags"] == ["dora", "lora", "moored"]


HOSTILE = st.one_of(
    st.text(
        st.sampled_from(list("ab|`*_[](){}<>!#&$~\\\n\r\t\"'-=:/.@%,^0\u202e\u2028é")),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(
        [
            "---",
            "a\n---\nb: c",
            "![x](https://evil.example/x.png)",
            "<img src=x onerror=alert(1)>",
            "<!-- ",
            "[click](javascript:alert(1))",
            "`` ` | x | `",
            "https://evil.example www.evil.example",
            "$$\\frac{1}{2}$$",
            "| a | b |",
            "x\\",
            "&lt;script&gt;",
        ]
    ),
)


def shape(tokens: list) -> list:
    """The structure of a page: blocks, and what is inline other than words and code."""
    blocks = [(t.type, t.tag) for t in tokens]
    links = [
        (child.type, child.attrs.get("href"))
        for t in tokens
        for child in t.children or []
        if child.type not in ("text", "text_special", "code_inline", "softbreak")
    ]
    return [blocks, links]


@settings(deadline=None)
@given(HOSTILE)
def test_no_name_breaks_the_page_or_gets_into_it(name: str):
    """With a name of any characters the page has the structure that it has with a plain one."""

    def page(name: str) -> str:
        report = Report(
            base=base(retention_ppl={name: 26.1}, num_tokens={name: 5000}),
            arms={name: arm("tmkl", 1.0)},
        )
        shown = Figures.of(report, name, {name: f"x{name}"})
        return markdown.page(
            a_card(
                name=name,
                figures=shown.model_copy(update={"measured_on": name}),
                base=Base(
                    name=name, revision=name, license=name, files={name: File(bytes=1, sha256=name)}
                ),
                adapter=facts.Adapter(method=name, target_modules=(name, f"a{name}")),
                training=TrainingFacts(
                    regularizer={"kind": name, "direction": name, "token_weighting": name},
                    optim={"learning_rate": 1e-3, "schedule": name},
                    train={"seed": name},
                ),
                data=Data(sources=(SourceFacts(name=name, format=name, sha256=name),), sha256=name),
                stops=facts.Stops(learned=(facts.End(id=1, token=name),), base=STOPS.base),
                deltas=facts.Deltas(
                    of="adapter",
                    total=facts.Delta(count=1, norm=1.0),
                    by_module={name: facts.Delta(count=1, norm=1.0)},
                    largest=name,
                    largest_delta=facts.Delta(count=1, norm=1.0),
                ),
                provenance=facts.Provenance(
                    commits=(name,),
                    versions={"moored": name},
                    mlflow=(
                        {"uri": f"https://{name}", "run_id": name},
                        {"uri": f"{name}:", "run_id": "1"},
                    ),
                ),
            )
        )

    matter, tokens = parsed(page(name))
    plain, expected = parsed(page("plain"))
    assert shape(tokens) == shape(expected)
    assert matter.keys() == plain.keys()
    assert matter["library_name"] == "peft"
    sizes = [[len(row) for row in table] for table in cells(tokens)]
    assert sizes == [[len(row) for row in table] for table in cells(expected)]


NAMES = [
    "a|b*c_d* <e>",
    "a\\|b\\\\",
    "`f` `g`",
    "![h](i)",
    "~~j~~ &lt; &amp;",
    "[k](l)",
    "q_p",
    "a`b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name: str):
    report = Report(
        base=base(retention_ppl={name: 26.1}, num_tokens={name: 10}), arms={"x": arm("tmkl", 1.0)}
    )
    _, tokens = parsed(markdown.page(a_card(figures=Figures.of(report, "x", {}))))
    assert cells(tokens)[0][2][0] == name
    assert not any(
        child.type in ("image", "s_open", "em_open") for t in tokens for child in t.children or []
    )


# ---------------------------------------------------------------- what it does not hide


def test_figures_that_are_not_finite_are_said_to_be_so():
    broken = report_of(arm("tmkl", math.inf, math.nan, 4.25))
    made = a_card(figures=figures(broken))
    data = strict_json(json.dumps(made.to_json(), allow_nan=False))
    assert isinstance(data, dict)
    assert data["figures"]["adaptation_ppl_after"] == "Infinity"
    assert data["figures"]["retention"][0]["increase_pct"] == "NaN"
    page = markdown.page(made)
    assert "**TMKL broke down: a perplexity is not finite.**" in page
    _, tokens = parsed(page)
    table = cells(tokens)[0]
    assert table[1][1:] == ["13.50", "∞", "∞"]
    assert table[2][1:] == ["26.10", "NaN", "NaN"]


def test_what_was_not_measured_is_said():
    without = Report(
        base=base(retention_ppl={}, num_tokens={}, adaptation_ppl=13.5),
        arms={"tmkl": arm("tmkl", 1.0)},
    )
    page = markdown.page(a_card(figures=figures(without)))
    assert "**Forgetting was not measured**: the recipe names no `retention` text" in page
    assert "what it forgot was not measured" in page
    nothing = report_of(arm("tmkl", None, 26.8, 4.25), adaptation_ppl=None)
    _, tokens = parsed(markdown.page(a_card(figures=figures(nothing))))
    assert cells(tokens)[0][1][1:] == ["not measured"] * 3
    # The masked KL and one corpus' agreement are in no report of before.
    assert cells(tokens)[1][1][2:4] == ["not measured", "not measured"]


def test_an_adapter_that_learned_nothing_and_forgot_a_lot_says_so():
    page = markdown.page(a_card(figures=figures(report_of(arm("none", 15.0, 61.6, 9.8)))))
    assert "Plain fine-tuning learned nothing and got worse at the task" in page
    assert "**+136\u00a0%**" in page


def test_a_scale_has_its_own_figures_or_none(tmp_path):
    write(one("tmkl"), tmp_path / "report")
    file = tmp_path / "report" / "report.json"
    assert gather.figures_for("RUN", file, 1.0, {}).adaptation_ppl_after == 1.018
    halved = gather.figures_for("RUN", file, 0.5, {})
    assert halved.retention == ()
    assert halved.missing == (
        "This adapter at scale 0.5 was not measured (the figures of its run are of scale 1). "
        "`moored evaluate RUN --scale 0.5` measures it, and exporting again shows it here."
    )
    page = markdown.page(a_card(figures=halved, scale=0.5))
    assert "What it adds is 0.5 of what was trained." in page
    assert "`moored evaluate RUN --scale 0.5`" in page
    several = Report(
        base=base(),
        arms={"tmkl-scale0.5": arm("tmkl", 1.4, 26.3, 4.2, scale=0.5), **one("tmkl").arms},
    )
    write(several, tmp_path / "scales")
    file = tmp_path / "scales" / "report.json"
    assert gather.figures_for("RUN", file, 0.5, {}).adaptation_ppl_after == 1.4
    assert gather.figures_for("RUN", file, 1.0, {}).adaptation_ppl_after == 1.018
    assert gather.figures_for("RUN", file, 0.7, {}).missing is not None


def test_a_report_that_is_missing_or_broken_leaves_a_card_without_figures(tmp_path):
    gone = gather.figures_for("RUN", tmp_path / "report.json", 1.0, {})
    assert gone.headline == "What it learned and what it forgot was not measured."
    assert "`moored evaluate RUN` measures it" in str(gone.missing)
    (tmp_path / "report.json").write_text("{")
    broken = gather.figures_for("RUN", tmp_path / "report.json", 1.0, {})
    assert "cannot be read (report.json: not valid JSON" in str(broken.missing)
    assert str(tmp_path) not in str(broken.missing)
    both = Report(base=base(), arms={"a": arm("tmkl", 1.1), "b": arm("tmkl", 1.2)})
    write(both, tmp_path)
    file = tmp_path / "report.json"
    assert gather.figures_for("RUN", file, 1.0, {}).missing is not None  # which one?
    assert gather.figures_for("RUN", file, 1.0, {}, "b").adaptation_ppl_after == 1.2


# ---------------------------------------------------------------- norms, against dense fp64


def an_adapter(model_folder: Path, folder: Path, **settings) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def norm(tensors) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "gpt2"])
def test_norms_of_an_adapter_are_those_of_its_dense_product(tmp_path, kind):
    model_folder = tmp_path / "model"
    if kind == "gpt2":
        shape = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(model_folder)
        targets = ["c_attn", "c_fc"]
    else:
        tiny_model(model_folder)
        targets = ["q_proj", "down_proj"]
    settings = {"target_modules": targets, "use_rslora": kind == "rslora"}
    settings |= {"fan_in_fan_out": kind == "gpt2"}
    scale = {kind: 2.0 for kind in targets}
    if kind == "rslora":
        scale = dict.fromkeys(targets, 8 / math.sqrt(4))
    if kind == "patterns":
        settings |= {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 20}}
        scale = {"q_proj": 20 / 4, "down_proj": 8 / 2}
    tensors = an_adapter(model_folder, tmp_path / "adapter", **settings)
    weights = load_file(model_folder / "model.safetensors")
    products, of_base = {}, {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            products[name] = scale[name.rpartition(".")[2]] * (b.double() @ a.double())
            of_base[name] = weights[f"{name}.weight"]
    found = adapter_deltas(tmp_path / "adapter", model_folder, read_base=True)
    # Rows of W are summed in fp32; everything else in fp64.
    near = {"rel": 1e-6}
    assert found.total is not None
    assert found.total.count == len(products) == 4
    assert found.total.norm == pytest.approx(norm(products.values()), **near)
    relative = norm(products.values()) / norm(of_base.values())
    assert found.total.relative == pytest.approx(relative, **near)
    assert found.by_module.keys() == set(targets)
    for target, one_kind in found.by_module.items():
        mine = [name for name in products if name.endswith(target)]
        expected = norm(products[n] for n in mine)
        assert one_kind.norm == pytest.approx(expected, **near)
        expected /= norm(of_base[n] for n in mine)
        assert one_kind.relative == pytest.approx(expected, **near)
    shares = {n: norm([products[n]]) / norm([of_base[n]]) for n in products}
    assert found.largest == max(shares, key=shares.__getitem__)
    assert found.largest_delta is not None
    assert found.largest_delta.relative == pytest.approx(max(shares.values()), **near)
    alone = adapter_deltas(tmp_path / "adapter", model_folder, read_base=False)
    assert alone.total is not None
    assert alone.total.norm == found.total.norm
    assert alone.total.relative is None
    sizes = {n: norm([products[n]]) for n in products}
    assert alone.largest == max(sizes, key=sizes.__getitem__)


def test_a_product_is_not_taken_for_what_is_more_than_a_product(tmp_path):
    model = tiny_model(tmp_path / "model")
    tensors = an_adapter(model, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert adapter_deltas(tmp_path / "dora", model, read_base=True).missing == (
        "DoRA changes magnitudes, too, which only merging shows"
    )
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    config["use_dora"] = False  # its magnitudes are still there
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    missing = adapter_deltas(folder, model, read_base=True).missing
    assert str(missing).startswith("the adapter has more than products of two matrices (")
    plain = {key: tensor for key, tensor in tensors.items() if ".lora_magnitude" not in key}
    save_file(plain, folder / "adapter_model.safetensors")
    assert adapter_deltas(folder, model, read_base=True).total is not None
    for changed, why in (
        ({"r": 8}, "the rank of .* is not that of its configuration"),
        ({"peft_type": "LOHA"}, "the adapter is not LoRA"),
        ({"use_something": True}, "the adapter is LoRA with use_something"),
        ({"target_parameters": ["x"]}, "the adapter is LoRA with target_parameters"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        missing = adapter_deltas(folder, model, read_base=True).missing
        assert re.match(why, str(missing))


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_deltas_of_a_merged_model_are_those_of_the_files(tmp_path, kind):
    source = tiny_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    settings = {"target_modules": ["q_proj", "down_proj"], "use_dora": kind == "dora"}
    an_adapter(source, tmp_path / "adapter", **settings)
    config = ModelConfig(name_or_path=str(source), dtype="float32")
    out = tmp_path / "out"
    out.mkdir()
    plan = merge.plan(source, config, tmp_path / "adapter", "w16", CPU)
    found = deltas_summary("merged", merge.write(plan, out, CPU))
    before, after = load_file(source / merge.SINGLE), load_file(out / merge.SINGLE)
    names = [n for n in before if re.search(r"(q_proj|down_proj)\.weight", n)]
    moved = [after[n].double() - before[n].double() for n in names]
    assert found.total is not None
    assert found.total.count == len(names) == 4
    assert found.total.norm == pytest.approx(norm(moved), rel=1e-6)
    assert found.total.relative == pytest.approx(
        norm(moved) / norm(before[n] for n in names), rel=1e-6
    )
    # Half a unit of bf16 at most, and on average 1 / sqrt(12) of one, of numbers near W + dW:
    # against dW that is more by ||W|| / ||dW||.
    eps = torch.finfo(torch.bfloat16).eps
    size = norm(after[n] for n in names) / norm(moved)
    assert found.rounding is not None
    assert eps / 8 * size < found.rounding < eps / 2 * size


# ---------------------------------------------------------------- what it is gathered from


def test_hashes_of_a_base_are_had_without_reading_what_is_large(tmp_path, monkeypatch):
    folder = tiny_model(tmp_path / "model")
    model = ModelConfig(name_or_path=str(folder))
    source = ResolvedModel(path=folder, revision="local:1", origin=str(folder))
    here = gather.base_of(model, source, hash_all=False)
    weights = atomic_dir.sha256(folder / "model.safetensors")
    assert here.files["model.safetensors"].sha256 == weights
    assert here.files["config.json"].by == "export"
    assert (here.name, here.hub, here.license) == ("model", None, None)
    assert str(tmp_path) not in json.dumps(a_card(base=here).to_json())
    # Too large to be read for this: said to be so.
    monkeypatch.setattr(gather, "HASHED_BYTES", 1000)
    monkeypatch.setattr(gather, "SMALL_BYTES", 50_000)
    large = gather.base_of(model, source, hash_all=False)
    assert large.files["model.safetensors"] == File(
        bytes=(folder / "model.safetensors").stat().st_size
    )
    assert large.files["config.json"].sha256 == atomic_dir.sha256(folder / "config.json")
    assert "1 files of weights, not hashed" in markdown.page(a_card(base=large))
    assert gather.base_of(model, source, hash_all=True).files == here.files
    # The hub's cache names large files by their hash.
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, blob in (("model.safetensors", weights), ("config.json", "12" * 20)):
        (blobs / blob).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(blobs / blob)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    source = ResolvedModel(path=snapshot, revision="1234", origin="hub:a/b")
    cached = gather.base_of(ModelConfig(name_or_path="a/b"), source, hash_all=False)
    assert cached.files["model.safetensors"].by == "hub"
    assert cached.files["model.safetensors"].sha256 == weights
    assert cached.files["config.json"].sha256 == atomic_dir.sha256(folder / "config.json")
    assert (cached.hub, cached.license, cached.origin) == ("a/b", "mit", "hub:a/b")
    # Folders that Moored made are sealed.
    atomic_dir.seal(folder)
    made = gather.base_of(
        ModelConfig(name_or_path="a/b"), replace(source, path=folder), hash_all=False
    )
    file = here.files["model.safetensors"]
    assert made.files["model.safetensors"] == file.model_copy(update={"by": "moored"})


@pytest.mark.parametrize(
    "matter",
    ["license: [a, b]", "license: 'x\n\n---\ny'", "license: {", "- license", "license: a b"],
)
def test_a_licence_that_is_no_name_of_one_is_left_out(tmp_path, matter):
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\n")
    assert gather._license(tmp_path) is None


def test_stores_are_named_without_credentials_and_paths(tmp_path):
    targets = {
        "https://user:secret@mlflow.example.org/x?token=abc": {"run_id": "1"},
        "sqlite:////home/somebody/runs/mlflow.db": {"run_id": "2"},
        "/home/somebody/mlruns": {"run_id": "3"},
        "https://never.example.org": {"run_id": None},
    }
    (tmp_path / "mlflow.json").write_text(json.dumps({"targets": targets}))
    assert gather._stores(tmp_path) == [
        {"uri": "https://mlflow.example.org/x", "run_id": "1"},
        {"uri": "sqlite:", "run_id": "2"},
        {"uri": "file:", "run_id": "3"},
    ]
    (tmp_path / "mlflow.json").write_text("[]")
    assert gather._stores(tmp_path) == []


def test_names_are_made_fit_to_publish(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    assert gather.public("/home/somebody/data/train.jsonl") == "train.jsonl"
    assert gather.public("~/train.jsonl") == "train.jsonl"
    assert gather.public("openai/gsm8k") == "openai/gsm8k"
    assert "abcdef" not in gather.public("x-hf_abcdefghijklmnopqrstuvwx")
    assert gather.hub_name("openai/gsm8k") == "openai/gsm8k"
    assert gather.hub_name("gpt2") == "gpt2"
    for name in ("/a/b", "a/b/c", "../b", "a/b)](x", "a b/c", "a/b\n", "-a/b", "a/.."):
        assert gather.hub_name(name) is None


def test_a_readme_that_somebody_wrote_stays(tmp_path):
    readme = tmp_path / "README.md"
    assert readme_of(tmp_path) is None
    template = ModelCard.from_template(ModelCardData(library_name="peft", tags=["lora"]))
    template.save(readme)
    assert readme_of(tmp_path) is None
    with readme.open("a") as file:
        file.write("\n### Framework versions\n\n- PEFT 0.21.2\n")  # as PEFT does
    assert readme_of(tmp_path) is None
    readme.write_text(readme.read_text().replace("[More Information Needed]", "By me.", 1))
    assert readme_of(tmp_path) == readme
    readme.write_bytes(b"\xff\xfe")
    assert readme_of(tmp_path) == readme
    readme.write_text("---\na: [\n---\n# Mine\n")
    assert readme_of(tmp_path) == readme
    # A card of ours is replaced as long as nobody changed it.
    markdown.write(a_card(), tmp_path)
    assert MARK in readme.read_text()
    facts = {"files": {"README.md": {"sha256": atomic_dir.sha256(readme)}}}
    (tmp_path / "export.json").write_text(json.dumps(facts))
    assert readme_of(tmp_path) is None
    readme.write_text(readme.read_text() + "\nAnd a word of mine.\n")
    assert readme_of(tmp_path) == readme
    to = tmp_path / "to"
    to.mkdir()
    markdown.write(a_card(), to, readme)
    assert (to / "README.md").read_text() == readme.read_text()
    assert (to / CARD_NAME).read_text() == markdown.page(a_card())
    assert strict_json((to / JSON_NAME).read_text()) == a_card().to_json()


# ---------------------------------------------------------------- a run, trained and exported


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny run as `moored train` leaves it."""
    folder = tmp_path_factory.mktemp("card")
    finished(moored("train", str(write_recipe(folder, tiny_recipe(folder)))))
    return folder / "runs" / "tiny"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # remembered, so that what a command sets is undone
        monkeypatch.delenv(name)


def test_an_export_has_the_card_of_its_run_and_scale(run, tmp_path):
    measured = Report.read(run / "report" / "report.json")
    # A made-up figure has no sums.
    made_up = {"scale": 0.5, "adaptation_ppl": 123.4, "adaptation_blocks": None}
    halved = replace(measured.arms["tmkl"], **made_up)
    write(replace(measured, arms={"tmkl-scale0.5": halved}), run / "scales")
    to = tmp_path / "to"
    run_command(run, to, scale=0.5)
    data = strict_json((to / JSON_NAME).read_text())
    assert isinstance(data, dict)
    assert (data["format"], data["kind"], data["scale"]) == (1, "adapter", 0.5)
    assert data["figures"]["adaptation_ppl_after"] == 123.4
    assert data["figures"]["retention"][0]["source"] == "fox.txt"
    assert data["adapter"]["alpha"] == 4  # what is in the file, with the scale in it
    assert data["adapter"]["sha256"] == atomic_dir.sha256(to / "adapter_model.safetensors")
    assert data["training"]["steps"] == 4
    assert data["training"]["regularizer"]["kind"] == "tmkl"
    assert data["training"]["tokens"] > 100
    source = data["data"]["sources"][0]
    assert (source["name"], source["num_samples"]) == ("train.jsonl", 24)
    assert source["num_tokens"] == data["data"]["num_tokens"] > 100
    assert re.fullmatch("[0-9a-f]{64}", source["sha256"])
    assert data["base"]["name"] == "model"
    assert data["base"]["files"]["model.safetensors"]["by"] == "export"
    full = adapter_deltas(run / "adapter", tmp_path, read_base=False).total
    assert full is not None
    assert data["deltas"]["total"]["norm"] == pytest.approx(full.norm / 2, rel=1e-9)
    assert data["verified"]["num_tokens"] > 100
    assert data["provenance"]["versions"]["torch"] == torch.__version__
    assert re.match(r"20\d\d-\d\d-\d\dT", data["provenance"]["began"])
    page = (to / "README.md").read_text()
    matter, tokens = parsed(page)
    assert matter["library_name"] == "peft"
    assert cells(tokens)[0][1][2] == "123.4"
    for file in ("README.md", JSON_NAME):  # no path of this machine
        assert str(run.parent.parent) not in (to / file).read_text()
    facts = json.loads((to / "export.json").read_text())
    assert {"README.md", JSON_NAME} <= facts["files"].keys()


def test_an_adapter_from_elsewhere_gets_a_card_of_what_is_known(run, tmp_path):
    adapter, recipe = tmp_path / "theirs", run.parent.parent / "tiny.yaml"
    settings = {"target_modules": ["q_proj"], "use_dora": True}
    an_adapter(run.parent.parent / "model", adapter, **settings)
    (adapter / "README.md").write_text("# By its author\n")
    with pytest.raises(UserError, match=r"adapter without a recipe: add --recipe RECIPE\.yaml"):
        run_command(adapter, tmp_path / "to")
    with pytest.raises(UserError, match="no such report: name what `moored evaluate"):
        run_command(adapter, tmp_path / "to", recipe=recipe, report=tmp_path)
    with pytest.raises(UserError, match=r"--recipe .* is a run, which has its own: leave it out"):
        run_command(run, tmp_path / "to", recipe=recipe)
    write(one("theirs", kind="adapter"), tmp_path / "report")
    given = open_input(adapter, recipe, tmp_path / "report")
    theirs = gather.figures_for("ADAPTER", given.report_file(1.0), 1.0, given.config.retention)
    assert theirs.adaptation_ppl_after == 1.018
    run_command(adapter, tmp_path / "to", recipe=recipe)
    assert (tmp_path / "to" / "README.md").read_text() == "# By its author\n"
    page = (tmp_path / "to" / CARD_NAME).read_text()
    assert "A DoRA adapter for `model`." in page
    assert "Not known to Moored: the adapter was made elsewhere." in page
    assert "`moored evaluate ADAPTER --recipe RECIPE.yaml` measures it" in page
    data = json.loads((tmp_path / "to" / JSON_NAME).read_text())
    assert (data["name"], data["training"], data["data"]) == ("theirs", None, None)
    assert data["figures"]["missing"] is not None
    assert data["verified"]["relative_rms_of_logits"]["share"] == pytest.approx(1, abs=1e-3)


def test_a_journal_without_sources_or_none_at_all_costs_only_what_it_lacks(run, tmp_path):
    config = load_config(run / "config.yaml")
    copy = RunDirectory(tmp_path / "run")
    copy.path.mkdir()
    training, data, provenance = gather.of_run(copy, config)
    assert training.steps is None
    assert data.sources[0].name == "train.jsonl"
    assert data.sources[0].num_samples is None
    assert provenance.began is None
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    assert any('"sources"' in line for line in lines)
    kept = [line for line in lines if '"event":"sources"' not in line]
    (copy.path / "journal.jsonl").write_text("".join(kept))
    _, data, provenance = gather.of_run(copy, config)
    assert (data.num_samples, data.sources[0].num_samples) == (24, 24)  # there is one source only
    assert data.sources[0].sha256 is None
    assert provenance.ended is not None


def test_a_card_names_what_was_replayed_and_no_folder(run, tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("Once upon a time. " * 200)
    budget = f"{{retention_increase_pct: 1, probe: {{path: {run.parents[1] / 'fox.txt'}}}}}"
    config = load_config(
        write_recipe(tmp_path, tiny_recipe(tmp_path)),
        ["regularizer.kind=replay", f"regularizer.replay=[{{path: {old}}}]",
         f"regularizer.budget={budget}"],
    )  # fmt: skip
    training, data, _ = gather.of_run(RunDirectory(run), config)
    assert [source.name for source in data.replayed] == ["old.txt"]
    assert "/" not in json.dumps(training.regularizer)
    assert training.regularizer["budget"]["probe"]["path"] == "fox.txt"
    page = markdown.page(a_card(training=training, data=data))
    assert "Replayed beside it, against forgetting:" in page
    assert "at the start, moved by a forgetting budget" in page


def test_a_card_says_what_else_was_held(run, tmp_path):
    config = load_config(
        write_recipe(tmp_path, tiny_recipe(tmp_path)),
        ["regularizer.positions=all", "regularizer.prompt_weight=0.5",
         "regularizer.target_weight=0.25", "regularizer.token_fraction=0.5",
         "regularizer.anchors={builtin: base-samples, window_tokens: 64, weight: 2}"],
    )  # fmt: skip
    training, data, _ = gather.of_run(RunDirectory(run), config)
    page = " ".join(markdown.page(a_card(training=training, data=data)).split())
    for words in (
        "with 0.25 of the target against the rest",
        "on prompts by a plain KL of weight 0.5",
        "beside the base's own texts by a plain KL of weight 2",
        "on 0.5 of the positions",
    ):
        assert words in page, words
    assert "on prompts" not in markdown.page(a_card())


def test_the_bases_of_randlora_are_not_counted_as_trained(tmp_path):
    config = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 40, "randlora_dropout": 0.1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {
        "base_model.randlora_A": (2, 1, 8),
        "base_model.randlora_B": (8, 4, 2),
        "base_model.model.q_proj.randlora_lambda": (2, 4),
        "base_model.model.q_proj.randlora_gamma": (4, 8),
    }
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = gather.adapter_of(tmp_path)
    assert (found.num_parameters, found.alpha, found.dropout) == (8 + 32, 40, 0.1)
