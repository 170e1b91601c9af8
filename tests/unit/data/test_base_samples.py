"""Texts drawn from the base: from its very distribution, once, and scored as they were written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from moored.config import Config, load_config
from moored.config.regularizer import Anchors
from moored.data import TrainStream
from moored.data.base_samples import (
    ANCHOR_QUESTIONS,
    FILE,
    QUESTIONS,
    BaseIdentity,
    drawn_folder,
)
from moored.data.heldout import anchor_samples
from moored.evaluation.evaluate import build_suite
from moored.models.base_files import resolve_base
from moored.prepare import prepare_command
from moored.prepare.base_generation import draw
from moored.prepare.items import find_everything
from moored.utils.errors import UserError
from tiny import ALONE, tiny_recipe, tiny_tokenizer, write_recipe

TOKENS, WINDOW = 4000, 220


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path, tie_word_embeddings=False, initializer_range=0.2)
    recipe["model"]["quantization"] = "none"
    own = {"builtin": "base-samples", "max_tokens": TOKENS, "window_tokens": WINDOW}
    recipe["retention"] = {"own": own}
    return load_config(write_recipe(tmp_path, recipe))


def rows_in(folder: Path) -> list[tuple[list[int], list[int]]]:
    rows = map(json.loads, (folder / FILE).read_text().splitlines())
    return [(row["prompt"], row["text"]) for row in rows]


def test_they_are_drawn_from_the_whole_distribution_at_temperature_one(config, tmp_path):
    """For x drawn from p, the mean of -log p(x) is the mean entropy of p: neither a cut-off tail
    nor another temperature passes. In dense fp64; five standard errors."""
    [folder] = draw(config, resolve_base(config.model, ALONE))
    rows, tokenizer = rows_in(folder), tiny_tokenizer()
    assert sum(len(text) for _, text in rows) == TOKENS
    assert all(len(text) > 0 and len(prompt) + len(text) <= WINDOW for prompt, text in rows)
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    said = [tokenizer.decode(prompt) for prompt, _ in rows]
    assert said == [asked.format(question) for question in QUESTIONS][: len(rows)]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    surprise: list[float] = []
    for prompt, text in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0]
        logs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        nats = -logs[torch.arange(len(text)), torch.tensor(text)]
        surprise += (nats - entropy).tolist()
    mean = sum(surprise) / len(surprise)
    spread = math.sqrt(sum((value - mean) ** 2 for value in surprise) / len(surprise))
    assert spread > 0.5, "not a test"
    assert abs(mean) < 5 * spread / math.sqrt(len(surprise))


def test_they_are_drawn_once_and_the_same_again(config, tmp_path, capsys):
    located = resolve_base(config.model, ALONE)
    with pytest.raises(UserError) as caught:
        build_suite(config, located, ALONE)
    assert str(caught.value) == (
        "retention.own.builtin=base-samples: they are not drawn yet: run `moored prepare` with "
        "this recipe once, where the base fits one device"
    )
    prepare_command.run(config)  # which proves in a process of its own that a run finds them
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    folder = drawn_folder(config.retention["own"], base)
    assert str(folder) in capsys.readouterr().out
    written = (folder / FILE).stat().st_mtime_ns, (folder / FILE).read_bytes()
    assert draw(config, located) == [folder]
    assert ((folder / FILE).stat().st_mtime_ns, (folder / FILE).read_bytes()) == written
    shutil.rmtree(folder)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    draw(config, located)
    assert (folder / FILE).read_bytes() == written[1]
    assert torch.equal(torch.random.get_rng_state(), before)

    # What is scored is what the base wrote, and all of it.
    text = build_suite(config, located, ALONE).retention["own"]
    assert sum(batch.num_targets for batch in text.batches) == TOKENS

    (folder / FILE).write_bytes(written[1][:-1])
    with pytest.raises(UserError, match=r"is broken .*: run `moored prepare`"):
        build_suite(config, located, ALONE)
    draw(config, located)
    assert (folder / FILE).read_bytes() == written[1]


def test_anchors_are_drawn_apart(config, capsys):
    """Other questions, another seed, and every second one a chat from its bare start."""
    anchors = Anchors(builtin="base-samples", max_tokens=TOKENS, window_tokens=WINDOW)
    regularizer = config.regularizer.model_copy(update={"anchors": anchors})
    data = config.data.model_copy(update={"max_length": 256})
    both = config.model_copy(update={"regularizer": regularizer, "data": data})
    located = resolve_base(config.model, ALONE)
    draw(config, located)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    with pytest.raises(UserError, match=r"^regularizer.anchors.builtin=base-samples: they are not"):
        find_everything(both)
    prepare_command.run(both)  # which proves in a process of its own that a run finds them
    assert str(drawn_folder(anchors, base)) in capsys.readouterr().out
    measured, held = (rows_in(folder) for folder in draw(both, located))
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer.decode(prompt) for prompt, _ in held]
    assert set(prompts[::2]) == {"<|im_start|>user\n"}
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert set(prompts[1::2]) <= {asked.format(question) for question in ANCHOR_QUESTIONS}
    assert len(prompts) > 10
    assert not set(QUESTIONS) & set(ANCHOR_QUESTIONS)
    assert not {tuple(text[:20]) for _, text in measured} & {tuple(text[:20]) for _, text in held}
    # Behind its own question's end the base goes on; an answer ends where it ends.
    window = anchors.window_tokens
    assert all(len(p) + len(t) == window for p, t in held[:-1:2])
    assert all(tokenizer.eos_token_id not in text[:-1] for _, text in held[1::2])
    samples = anchor_samples(both, located.tokenizer, base)
    assert [len(s) for s in samples] == [len(p) + len(t) for p, t in held]
    stream = TrainStream.of_anchors(both, located.tokenizer, samples, 4)
    batches = stream.next_step(dp_rank=0, dp_size=1)
    assert sum(batch.num_targets for batch in batches) == 0
    tokens = sum(batch.num_tokens for batch in batches)
    assert sum(batch.num_prompt for batch in batches) == tokens - 3  # the last of each of three


def test_what_changes_them_gives_them_another_place(config):
    corpus, model = config.retention["own"], config.model
    base = BaseIdentity(model=model, revision="a")
    others = [
        drawn_folder(corpus, BaseIdentity(model=model, revision="b")),
        *(
            drawn_folder(corpus.model_copy(update={name: 100}), base)
            for name in ("max_tokens", "window_tokens")
        ),
        *(
            drawn_folder(corpus, BaseIdentity(model=model.model_copy(update=change), revision="a"))
            for change in ({"quantization": "nf4"}, {"dtype": "bfloat16"})
        ),
    ]
    assert len({drawn_folder(corpus, base), *others}) == len(others) + 1
    elsewhere = model.model_copy(update={"name_or_path": "moved", "cache_quantized": True})
    assert drawn_folder(corpus, BaseIdentity(model=elsewhere, revision="a")) == drawn_folder(
        corpus, base
    )


def test_a_base_without_a_template_writes_from_its_start_token(config, tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = tmp_path / "model" / name
        if path.suffix == ".json":
            settings = json.loads(path.read_text())
            settings.pop("chat_template", None)
            path.write_text(json.dumps(settings))
        else:
            path.unlink(missing_ok=True)
    short = config.model_copy(
        update={"retention": {"own": config.retention["own"].model_copy(update={"max_tokens": 64})}}
    )
    [folder] = draw(short, resolve_base(short.model, ALONE))
    assert {tuple(prompt) for prompt, _ in rows_in(folder)} == {(tiny_tokenizer().eos_token_id,)}
