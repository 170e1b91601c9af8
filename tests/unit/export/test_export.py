"""`moored export`: what is written, what stock PEFT makes of it, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit import adapter_on, in_nf4
from moored.config import ModelConfig, load_config
from moored.export import export_command, merge, run_command, stock_peft, verification
from moored.export.verification import Outputs
from moored.models.policy import load_policy
from moored.tracking.run_directory import RunDirectory
from moored.training import checkpoint
from moored.utils import atomic_dir
from moored.utils.errors import UserError
from tiny import ALONE, tiny_model, tiny_recipe, tiny_tokenizer, write_recipe

pytestmark = pytest.mark.usefixtures("forked_verification")

CPU = torch.device("cpu")


# ---------------------------------------------------------------- merging, against plain fp64


def merged_plainly(weight, tensors, path, *, scale, transposed=False):
    """One matrix in fp64 by the papers' formulas; the adapter's matrices are [out, in]."""
    key = f"base_model.model.{path}"
    weight = weight.double().t() if transposed else weight.double()
    weight = weight + scale * tensors[f"{key}.lora_B.weight"].double() @ (
        tensors[f"{key}.lora_A.weight"].double()
    )
    if f"{key}.lora_magnitude_vector" in tensors:
        weight = weight / weight.norm(dim=1, keepdim=True)
        weight = weight * tensors[f"{key}.lora_magnitude_vector"].double()[:, None]
    return weight.t() if transposed else weight


def gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["w16", "nf4"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "gpt2"])
def test_every_merged_matrix_is_the_formula(tmp_path, monkeypatch, kind, base):
    dtype = torch.bfloat16 if kind == "dora" else torch.float32
    if kind == "gpt2":
        model_folder = gpt2(tmp_path / "model")
    else:
        tied = {"tie_word_embeddings": kind != "dora", "dtype": dtype}
        model_folder = tiny_model(tmp_path / "model", **tied)
        if kind == "dora":
            model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
            model.save_pretrained(model_folder)
    settings = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else "all-linear"
    settings |= {"target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    adapter = tmp_path / "adapter"
    tensors = adapter_on(model_folder, adapter, **settings)
    scale = 8 / math.sqrt(4) if kind == "rslora" else 8 / 4
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)  # several files
    config = ModelConfig(name_or_path=str(model_folder), dtype="float32")
    out = tmp_path / "merged"
    out.mkdir()
    plan = merge.plan(model_folder, config, adapter, base, CPU)
    merge.write(plan, out, CPU)

    original = load_file(model_folder / "model.safetensors")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    written: dict[str, torch.Tensor] = {}
    for file in out.glob("model-*.safetensors"):
        written |= load_file(file)
    assert sum(t.nbytes for t in written.values()) == plan.num_bytes
    changed = 0
    for name, tensor in written.items():
        path, transposed = name.removesuffix(".weight"), kind == "gpt2"
        assert tensor.dtype == original[name].dtype == dtype
        if f"base_model.model.{path}.lora_A.weight" not in tensors:
            assert torch.equal(tensor, original[name]), name
            continue
        changed += 1
        weight = original[name]
        if base == "nf4":
            weight = in_nf4(weight, transposed=transposed)
        expected = merged_plainly(weight, tensors, path, scale=scale, transposed=transposed)
        # fp32 sums of 4 products and 64 or 128 squares, and one rounding to the dtype written.
        eps = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
        bound = eps * expected.abs().max()
        assert (tensor.double() - expected).abs().max() <= bound, name
        assert (original[name].double() - expected).abs().max() > 20 * bound  # it could fail
    assert changed == (8 if kind == "gpt2" else 14)

    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == (kind != "dora")
    assert ("lm_head.weight" in written) == (kind == "dora")


def test_a_base_that_is_in_4_bits_already_is_merged_as_it_is(tmp_path):
    whole = tiny_model(tmp_path / "whole")
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, quantization_config=quantized)
    model.save_pretrained(tmp_path / "packed")
    tensors = adapter_on(whole, tmp_path / "adapter", target_modules="all-linear")
    config = ModelConfig(name_or_path=str(tmp_path / "packed"), dtype="float32")
    with pytest.raises(UserError, match="holds 4-bit weights only: add --base nf4"):
        merge.plan(tmp_path / "packed", config, tmp_path / "adapter", "w16", CPU)
    out = tmp_path / "merged"
    out.mkdir()
    plan = merge.plan(tmp_path / "packed", config, tmp_path / "adapter", "nf4", CPU)
    merge.write(plan, out, CPU)
    original, written = load_file(whole / "model.safetensors"), load_file(out / merge.SINGLE)
    assert written.keys() == original.keys()
    name = "model.layers.1.mlp.down_proj"
    expected = merged_plainly(in_nf4(original[f"{name}.weight"]), tensors, name, scale=2)
    bound = 16 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (written[f"{name}.weight"].double() - expected).abs().max() <= bound
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


# ---------------------------------------------------------------- comparing


def test_an_adapter_that_is_missing_or_there_twice_is_told_from_rounding():
    torch.manual_seed(0)
    off = torch.randn(40, 300)
    effect = 0.01 * torch.randn(40, 300)
    expected = Outputs(on=off + effect, off=off)
    shift = torch.randn(40, 1)  # of all logits of a token: the same model
    same = verification.compare(expected.on + shift, expected, 1e-6)
    same.require("they")
    assert same.share == pytest.approx(1, abs=1e-4)
    assert same.adapter_effect == pytest.approx(0.01, rel=0.05)
    for factor in (0, 2):
        # Less than what rounding explains, but not of its form.
        found = verification.compare(off + factor * effect, expected, 0.02)
        assert found.share == pytest.approx(factor, abs=1e-4)
        with pytest.raises(UserError, match="of the adapter's effect"):
            found.require("they")
    noisy = verification.compare(expected.on + 0.05 * torch.randn(40, 300), expected, 0.02)
    with pytest.raises(UserError, match=r"rounding explains 0\.02$"):
        noisy.require("they")


def test_kl_is_of_the_trained_model_to_the_merged():
    torch.manual_seed(0)
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    log_p, log_q = (x.double() - x.double().exp().sum(1, keepdim=True).log() for x in (p, q))
    expected = ((log_p.exp() * (log_p - log_q)).sum(1)).mean().item()
    assert verification.kl_per_token(p, q) == pytest.approx(expected, rel=1e-9)
    assert verification.kl_per_token(p, p) == 0


# ---------------------------------------------------------------- a run, exported


def finished_run(folder: Path, *overrides: str, dtype=torch.float32, **adapter) -> Path:
    """A run directory as training leaves it; its adapter is random, but Moored's own."""
    recipe = tiny_recipe(folder)
    of_lora = ("r", "alpha") if adapter.get("method") == "oft" else ()
    recipe["adapter"] = {k: v for k, v in recipe["adapter"].items() if k not in of_lora} | adapter
    template = folder / "template.jinja"
    template.write_text("{% generation %}" + tiny_tokenizer().chat_template + "{% endgeneration %}")
    recipe["data"]["chat_template"] = str(template)
    if dtype != torch.float32:
        path = folder / "model"
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model.save_pretrained(path)
    config = load_config(write_recipe(folder, recipe), list(overrides))
    run = RunDirectory(folder / "runs/tiny")
    run.path.mkdir(parents=True, mode=0o700)
    run.config.write_text(config.dump_yaml())
    policy = load_policy(Path(config.model.name_or_path), config, ALONE)
    torch.manual_seed(2)
    # RandLoRA's gamma and DoRA's magnitudes stay near where they are, lambda is small beside B.
    sizes = {"lora_A": 0.2, "lora_B": 0.2, "randlora_lambda": 0.02, "oft_R": 0.05}
    tensors = {}
    for name, p in policy.trainable().items():
        size = next((size for part, size in sizes.items() if part in name), None)
        tensors[name] = 1.5 * p.detach() if size is None else size * torch.randn_like(p)
    for target in (run.adapter, checkpoint.folder_of(run.checkpoints, 4) / "adapter"):
        checkpoint.save_adapter(target, tensors, policy.causal_lm, config.model.name_or_path)
    atomic_dir.seal(checkpoint.folder_of(run.checkpoints, 4))
    run.update_state(status="done", step=4, num_steps=4)
    for path in run.adapter.iterdir():
        path.chmod(0o600)
    return run.path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # remembered, so that what a command sets is undone
        monkeypatch.delenv(name)


def facts_of(folder: Path) -> dict:
    facts = json.loads((folder / "export.json").read_text())
    there = {p.name for p in folder.iterdir()} - {"export.json"}
    assert facts["files"].keys() == there
    for name, file in facts["files"].items():
        assert file == {
            "bytes": (folder / name).stat().st_size,
            "sha256": atomic_dir.sha256(folder / name),
        }
    return facts


def test_an_adapter_is_copied_and_verified_in_a_fresh_process(run, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # whose start this is about
    to = tmp_path / "new" / "adapter"
    to.mkdir(parents=True)  # an empty one may be there
    umask = os.umask(0o022)
    try:
        run_command(run, to)
    finally:
        os.umask(umask)
    facts = facts_of(to)
    assert facts["kind"] == "adapter"
    figures = facts["verified"]["relative_rms_of_logits"]
    assert figures["difference"] <= figures["tolerance"] < 1e-5 < 0.1 < figures["adapter_effect"]
    assert facts["base"]["quantization"] == "nf4"
    assert facts["verified"]["text"] == "data.eval"
    for name in export_command.ADAPTER:
        assert (to / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert {p.stat().st_mode & 0o777 for p in to.iterdir()} == {0o644}
    assert to.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in to.parent.iterdir()] == ["adapter"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(to)
    assert tokenizer.chat_template.startswith("{% generation %}")  # the recipe's, not the base's
    assert "verified on 168 tokens" in capsys.readouterr().out


def test_what_was_trained_is_merged_in_bf16_with_dora(tmp_path, capsys):
    path = finished_run(tmp_path, dtype=torch.bfloat16, method="dora")
    to = tmp_path / "merged"
    run_command(path, to, merged=True, base="nf4")
    facts = facts_of(to)
    assert (facts["kind"], facts["merged_into"], facts["dtype"]) == ("merged", "nf4", "bfloat16")
    figures = facts["verified"]["relative_rms_of_logits"]
    # The weights are rounded to bf16 once more, everything else is fp32.
    assert 1e-4 < figures["difference"] < figures["tolerance"] < 0.05 < figures["adapter_effect"]
    kl = facts["kl_trained_merged_nats_per_token"]
    assert 0 < kl < 1e-3 * facts["kl_trained_base_nats_per_token"]
    assert f"KL(trained || merged) = {kl:.3g} nats per token" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(to)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    card = json.loads((to / "forgetting-card.json").read_text())
    assert card["kind"] == "merged"
    assert card["merged"]["kl_trained_merged_nats_per_token"] == kl
    assert card["deltas"]["of"] == "merged"
    assert card["deltas"]["total"]["count"] == 14
    assert 0 < card["deltas"]["rounding"] < card["deltas"]["total"]["relative"] < 10
    assert "`moored evaluate RUN` measures it" in (to / "README.md").read_text()


def verified_well(folder: Path) -> dict:
    facts = facts_of(folder)
    figures = facts["verified"]["relative_rms_of_logits"]
    assert figures["difference"] <= figures["tolerance"] < 0.1 < figures["adapter_effect"]
    assert 0.99 < figures["share"] < 1.01
    return facts


def test_randlora_is_merged_and_equals_what_stock_peft_loads(tmp_path):
    """In bf16 over NF4, where PEFT's own layers need autocast."""
    bf16 = {"dtype": torch.bfloat16, "method": "randlora", "alpha": 20.0}
    path = finished_run(tmp_path, "model.dtype=bfloat16", **bf16)
    run_command(path, tmp_path / "merged", merged=True, base="nf4")
    assert verified_well(tmp_path / "merged")["kind"] == "merged"


def test_oft_is_merged_and_equals_what_stock_peft_loads(tmp_path):
    path = finished_run(tmp_path, method="oft", oft_block_size=16)
    run_command(path, tmp_path / "alone")
    alone = verified_well(tmp_path / "alone")
    assert (alone["kind"], "import_first" in alone) == ("adapter", False)
    card = json.loads((tmp_path / "alone" / "forgetting-card.json").read_text())
    assert (card["adapter"]["method"], card["adapter"]["r"]) == ("oft", None)
    run_command(path, tmp_path / "merged", merged=True, base="nf4")
    assert verified_well(tmp_path / "merged")["kind"] == "merged"


def test_sinelora_is_merged_and_alone_says_what_it_needs(tmp_path, capsys):
    path = finished_run(tmp_path, method="sinelora")
    run_command(path, tmp_path / "alone")
    assert verified_well(tmp_path / "alone")["import_first"] == "moored.sinelora"
    said = capsys.readouterr().out
    assert "PEFT alone does not know sinelora: `import moored.sinelora` before it loads" in said
    run_command(path, tmp_path / "merged", merged=True)
    assert "import_first" not in verified_well(tmp_path / "merged")


def test_an_adapter_that_is_not_exact_leaves_nothing(run, tmp_path, monkeypatch):
    def copy(source, target):
        shutil.copyfile(source, target)
        if target.suffix == ".safetensors":
            tensors = load_file(target)
            save_file({n: t / 2 if "lora_B" in n else t for n, t in tensors.items()}, target)

    monkeypatch.setattr(export_command, "copyfile", copy)
    failed = "verification failed, nothing was exported: .* differ by .* where rounding explains"
    with pytest.raises(UserError, match=failed) as error:
        run_command(run, tmp_path / "to")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["none", "renamed", "missing", "empty", "other"])
def test_stock_peft_has_every_tensor_of_the_file_or_says_which_not(tmp_path, fault):
    """PEFT itself only warns of a key that it lacks, and loads the rest."""
    folder = tiny_model(tmp_path / "model")
    tensors = adapter_on(folder, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    first = sorted(tensors)[0]
    if fault == "renamed":
        tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
    elif fault == "missing":
        del tensors[first]
    elif fault == "empty":
        tensors[first] = torch.empty(0)
    elif fault == "other":
        tensors[first][0, 0] += 1
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    expected = {
        "renamed": "2 keys are not exact: the adapter lacks",
        "missing": "1 keys are not exact: the adapter lacks",
        "empty": "is empty",
        "other": "has other values once loaded",
    }
    if fault == "none":
        stock_peft.require_exact(model, str(tmp_path / "adapter"))
        return
    with pytest.raises(SystemExit, match=expected[fault]):
        stock_peft.require_exact(model, str(tmp_path / "adapter"))


# ---------------------------------------------------------------- refused


def refused(match: str, *arguments, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        run_command(*arguments, **options)
    assert "\n" not in str(error.value)


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    to = tmp_path / "to"
    refused("is not a run directory: name a folder", tmp_path / "none", to)
    refused("is an adapter without a recipe: add --recipe", run / "adapter", to)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    RunDirectory(copy).update_state(status="preempted", step=2, reason="a signal\nof some kind")
    refused(
        r"is preempted after step 2 of 4 \(a signal of some kind\): start its `moored train`",
        copy,
        to,
    )
    RunDirectory(copy).update_state(status="running")
    refused("status is running.*: wait for it, or start", copy, to)
    (copy / "state.json").unlink()
    refused("status is not started", copy, to)
    (copy / "arms").mkdir()
    refused("is a comparison: name one of its arms", copy, to)
    assert not to.exists()


def test_an_adapter_with_a_flipped_bit_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused("is not as it was written: copy it again from .*step-00000004/adapter", copy, tmp_path)
    file.unlink()
    refused("adapter_model.safetensors is missing", copy, tmp_path / "to")


def test_a_place_that_is_taken_or_too_small_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("full is not empty: choose another --to, or remove it", run, tmp_path / "full")
    refused("file exists and is not a folder", run, tmp_path / "full" / "file")
    refused("lies in the run directory", run, run / "exported")
    small = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: small)
    refused("has 0.00 GB free, but the export takes 0.07 GB: free some", run, tmp_path / "to")
    refused("free some, or choose another --to", run, tmp_path / "to", merged=True)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_options_that_would_have_no_effect_are_refused(run, tmp_path, monkeypatch):
    to = tmp_path / "to"
    refused("add --merge, or leave it out", run, to, base="nf4")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = (copy / "config.yaml").read_text()
    kept = [x for x in recipe.splitlines() if "double_quant" not in x and "cache_quant" not in x]
    text = "\n".join(kept).replace("quantization: nf4", "quantization: none")
    (copy / "config.yaml").write_text(text)
    refused("the run's base is not quantised: leave --base out", copy, to, merged=True, base="nf4")
    (copy / "config.yaml").write_text(recipe.replace("/model", "/gone"))
    refused("model.name_or_path=.*gone: no such file or folder", copy, to)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "12345")
    refused("works in one process, not in 4: start it without torchrun", run, to)
    assert not to.exists()
