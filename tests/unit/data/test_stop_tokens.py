"""Where learned turns end: found in the tokens, told of a base that cannot say it, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapterkit import adapter_on
from distributed.runner import run_distributed
from forking import finished, moored, stock
from moored.config import load_config
from moored.data import TurnEnd, load_samples, turn_ends
from moored.distributed.mesh import Axis
from moored.export import run_command
from moored.loss.divergence import VocabShard
from moored.loss.head import Head
from moored.models.untrained_tokens import untrained
from moored.tracking.run_directory import RunDirectory
from moored.training import doctor
from tiny import CHATML, tiny_recipe, tiny_tokenizer, write_recipe

pytestmark = pytest.mark.usefixtures("forked_verification")

ALONE = Axis(name="tp")
IM_START, IM_END, END = 1, 2, 0  # of the tiny tokenizer


def ends_of(folder: Path, rows: list[dict], tokenizer=None, **data: object) -> dict[str, int]:
    recipe = tiny_recipe(folder)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] |= {"train": [{"path": str(file)}]} | data
    del recipe["data"]["eval"], recipe["retention"]
    config = load_config(write_recipe(folder, recipe))
    tokenizer = tokenizer or tiny_tokenizer()
    samples = load_samples(config.data.train, tokenizer, config.data)
    found = turn_ends(samples, tokenizer, config.data.max_length)
    return {end.token: end.count for end in found}


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    named = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": named}


def test_every_turn_that_is_learned_counts_its_end(tmp_path):
    rows = [chat("one", "two"), chat("one", "two", "three", "four")]
    assert ends_of(tmp_path, rows) == {"<|im_end|>": 3}
    # Without a template: the end of sequence, which is written after a completion.
    plain = tiny_tokenizer()
    plain.chat_template = None
    plain.eos_token = "<|endoftext|>"
    pairs = [{"prompt": "count ", "completion": "one two"}] * 2
    assert ends_of(tmp_path / "pairs", pairs, plain) == {"<|endoftext|>": 2}


def test_calls_may_end_otherwise_and_both_are_found(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|sep|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}a<|sep|>{{ m['content'] }}"
        "{{ '<|eom_id|>' if 'call' in m['content'] else '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [chat("one", "call it", "three", "four"), chat("one", "two")]
    # <|sep|> stands in every answer, but at the end of none.
    assert ends_of(tmp_path, rows, tokenizer) == {"<|im_end|>": 2, "<|eom_id|>": 1}


def test_what_is_cut_or_plain_text_ends_with_no_end(tmp_path):
    rows = [chat("one", "two " * 60)] * 3
    assert ends_of(tmp_path, rows, max_length=32, too_long="truncate") == {}
    text = [{"text": "the quick brown fox"}] * 3
    assert set(ends_of(tmp_path / "text", text)) <= {"<|im_end|>"}  # their end of sequence, if any
    rows = [chat("one", "two")] * 3
    streamed = {"path": str(tmp_path / "rows.jsonl"), "streaming": True}
    assert ends_of(tmp_path, rows, train=[streamed]) == {"<|im_end|>": 3}


# ---------------------------------------------------------------- rows that were never trained


def a_head(dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(301, 32) * (1 + torch.rand(301, 1))
    weight[40] = weight[41] + 0.3 * torch.randn(32)  # alike, as trained ones may be
    return weight.to(dtype)


def found_in(weight: torch.Tensor, token: int, bias: torch.Tensor | None = None):
    parts = (None if p is None else torch.nn.Parameter(p, False) for p in (weight, bias))
    ends = [TurnEnd(id=token, token="x", count=1), TurnEnd(id=40, token="y", count=1)]
    found = untrained(Head(*parts), ends, ALONE)
    assert all(one.end.id == token for one in found)  # a trained one is no alarm
    return [one.alike for one in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_alike_or_nothing_were_never_trained(dtype):
    like = (3, 7, 300)
    for how in ("equal", "noisy", "apart", "zero"):
        weight = a_head().clone()
        mean = weight.mean(0)
        for row in like:
            noise = {"equal": 0, "noisy": 1e-3, "apart": 0.3, "zero": 0}[how]
            weight[row] = mean + noise * mean.norm() * torch.randn(32) / 32**0.5
        if how == "zero":
            weight[7] = 0
        found = found_in(weight.to(dtype), 7)
        assert found == {"equal": [(3, 300)], "noisy": [(3, 300)], "apart": [], "zero": [()]}[how]
    # A bias that parts them lets one of them win.
    weight[list(like)] = mean
    bias = torch.zeros(301)
    bias[7] = 3.0
    assert found_in(weight, 7, bias) == []
    assert found_in(weight, 7, torch.zeros(301)) == [(3, 300)]


def spread(rank: int, world_size: int) -> list[tuple[int, tuple[int, ...]]]:
    weight = a_head()
    weight[[2, 150, 299]] = weight.mean(0)
    cuts = [0, 140, 301]
    start, stop = cuts[rank : rank + 2]
    part = torch.cat([weight[start:stop], torch.zeros(2 - rank, 32)])  # padded on one
    shard = VocabShard(start, start + len(part), 301, group=torch.distributed.group.WORLD)
    head = Head(torch.nn.Parameter(part, False), shard=shard)
    axis = Axis(name="tp", group=torch.distributed.group.WORLD, rank=rank, size=world_size)
    ends = [TurnEnd(id=i, token=str(i), count=1) for i in (150, 40, 299)]
    return [(one.end.id, one.alike) for one in untrained(head, ends, axis)]


def test_a_head_over_several_ranks_is_looked_at_as_a_whole():
    for found in run_distributed(spread, 2):
        assert found == [(150, (2, 299)), (299, (2, 150))]


def with_untrained_end(folder: Path, *, tied: bool, quantization: str = "nf4") -> Path:
    """A recipe whose model never learned its chat tokens."""
    recipe = tiny_recipe(folder, tie_word_embeddings=tied)
    recipe["model"]["quantization"] = quantization
    recipe["train"]["steps"] = 2
    file = folder / "model/model.safetensors"
    tensors = load_file(file)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in tensors:
            tensors[name][[IM_START, IM_END]] = tensors[name].mean(0)
    save_file(tensors, file, metadata={"format": "pt"})
    return write_recipe(folder, recipe)


@pytest.mark.parametrize("tied", [True, False])
def test_doctor_says_so_and_nothing_of_a_base_that_learned_it(tmp_path, capsys, tied):
    doctor.run(load_config(with_untrained_end(tmp_path / "never", tied=tied)))
    said = capsys.readouterr().out
    assert "<|im_end|> (24)" in said
    assert "turns end with '<|im_end|>' (2), whose row in the output head is the same as that" in (
        said
    )
    assert "'<|im_start|>' (1)" in said
    assert "all is well" not in said
    doctor.run(load_config(write_recipe(tmp_path, tiny_recipe(tmp_path / "learned"))))
    assert "all is well" in capsys.readouterr().out


def test_a_run_says_so_and_writes_down_where_its_turns_end(tmp_path):
    recipe = with_untrained_end(tmp_path, tied=True)
    _, said = finished(moored("train", str(recipe)))
    assert "whose row in the output head is the same as that of '<|im_start|>'" in said
    state = RunDirectory(tmp_path / "runs/tiny").state()
    assert state["turn_ends"] == [{"id": IM_END, "token": "<|im_end|>", "count": 24}]


# ---------------------------------------------------------------- what is exported stops there

GENERATE = """
import json, sys, transformers
for folder in json.load(sys.stdin):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "count two"}], add_generation_prompt=True, return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**asked, max_new_tokens=12, do_sample=False)
    ids = out[0, asked["input_ids"].shape[1]:].tolist()
    settings = model.generation_config.to_dict()
    print("\\n" + json.dumps([ids, tokenizer.eos_token, tokenizer.pad_token, settings]))
"""


def generated(*folders: Path) -> list[Any]:
    """What a process that knows nothing of Moored generates with each."""
    script = folders[0] / "generate.py"
    script.write_text(GENERATE)
    done = stock([str(script)], given=json.dumps([str(folder) for folder in folders]))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


def stopping(folder: Path, *, base_stops: bool, named: bool = True, template: str = CHATML) -> Path:
    """A base that says `<|im_end|>` all the time, and an adapter; its own end may be another."""
    recipe = tiny_recipe(folder, tie_word_embeddings=False)
    recipe["model"]["quantization"] = "none"
    path = folder / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if not base_stops:
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    own = {"eos_token_id": IM_END if base_stops else END, "temperature": 0.7, "top_p": 0.9}
    config = json.loads((path / "config.json").read_text())
    config["eos_token_id"] = own["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    file = path / "generation_config.json"
    file.write_text(json.dumps(own | {"do_sample": True}))
    if not named:
        file.unlink()
    adapter_on(path, folder / "adapter", target_modules=["q_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        ids = torch.tensor([tokenizer("<|im_start|>assistant\n")["input_ids"]])
        hidden = model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight[IM_END] = 9 * hidden / hidden.norm()
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return write_recipe(folder, recipe)


@pytest.mark.parametrize("named", [True, False])
def test_a_merged_model_stops_in_stock_generate(tmp_path, capsys, named):
    recipe, out = stopping(tmp_path, base_stops=False, named=named), tmp_path / "out"
    run_command(tmp_path / "adapter", out, merged=True, recipe=recipe)
    base, (ids, eos, pad, settings) = generated(tmp_path / "model", out)
    assert len(base[0]) == 12  # it goes on
    assert ids == [IM_END]
    assert settings["eos_token_id"] == [IM_END, END]
    assert (settings.get("temperature") == 0.7) == named  # the base's other settings
    assert (eos, pad) == ("<|im_end|>", "<|endoftext|>")
    said = capsys.readouterr().out
    assert (
        "turns end with '<|im_end|>' (2), and the base alone stops at '<|endoftext|>' (0)" in said
    )
    facts = json.loads((out / "export.json").read_text())["stops"]
    learned = [{"id": IM_END, "token": "<|im_end|>", "count": 24}]
    assert facts == {"learned": learned, "eos_token_id": [IM_END, END]}
    page = (out / "README.md").read_text()
    assert "**A turn ends with `<|im_end|>`**" in page
    assert "stops at both" in page


def test_an_adapter_says_where_to_stop(tmp_path, capsys):
    recipe, out = stopping(tmp_path, base_stops=False), tmp_path / "out"
    run_command(tmp_path / "adapter", out, recipe=recipe)
    assert f"else pass eos_token_id=[{IM_END}, {END}] to generate" in capsys.readouterr().out
    page = (out / "README.md").read_text()
    assert f"model.generate(**inputs, eos_token_id=[{IM_END}, {END}])" in page
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert settings.eos_token_id == [IM_END, END]
    assert json.loads((out / "forgetting-card.json").read_text())["stops"]["learned"][0]["id"] == 2


def test_what_stops_with_its_base_is_left_as_it_is(tmp_path, capsys):
    recipe, out = stopping(tmp_path, base_stops=True), tmp_path / "out"
    run_command(tmp_path / "adapter", out, merged=True, recipe=recipe)
    [(ids, eos, _, settings)] = generated(out)
    assert (ids, eos, settings["eos_token_id"]) == ([IM_END], "<|im_end|>", IM_END)
    assert "turns end with '<|im_end|>' (2), as the base's do" in capsys.readouterr().out
    page = (out / "README.md").read_text()
    assert "A turn ends with `<|im_end|>`, at which the base stops, too." in page


def test_a_template_that_writes_the_end_of_sequence_keeps_it(tmp_path):
    """Else it would write another text than the one that was learned."""
    template = "{% if false %}{{ eos_token }}{% endif %}" + CHATML
    recipe = stopping(tmp_path, base_stops=False, template=template)
    run_command(tmp_path / "adapter", tmp_path / "out", merged=True, recipe=recipe)
    [(ids, eos, _, settings)] = generated(tmp_path / "out")
    assert (ids, eos) == ([IM_END], "<|endoftext|>")
    assert settings["eos_token_id"] == [IM_END, END]


def test_a_runs_own_ends_are_taken_from_the_run(tmp_path):
    """Its data may be gone; a token that ends calls may be among them."""
    recipe = stopping(tmp_path, base_stops=False)
    run = RunDirectory(tmp_path / "runs/tiny")
    run.path.mkdir(parents=True, mode=0o700)
    run.config.write_text(load_config(recipe).dump_yaml())
    (tmp_path / "adapter").rename(run.adapter)
    ends = [{"id": 7, "token": "x", "count": 3}, {"id": IM_END, "token": "<|im_end|>", "count": 1}]
    run.update_state(status="done", step=4, num_steps=4, turn_ends=ends)
    (tmp_path / "train.jsonl").unlink()
    run_command(run.path, tmp_path / "out")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == [7, IM_END, END]
