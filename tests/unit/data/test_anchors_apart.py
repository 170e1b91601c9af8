"""Anchors share no text with what is measured: by content, however it is cut or written."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moored.config import load_config
from moored.data import BaseIdentity
from moored.data.base_samples import drawn_folder, write_drawn
from moored.data.heldout import anchor_samples
from moored.models.base_files import resolve_base
from moored.utils import atomic_dir
from moored.utils.errors import UserError
from tiny import ALONE, tiny_recipe, tiny_tokenizer, write_recipe

LONG = "The harbour master wrote every ship into a heavy book, with its cargo and its crew ({})."
OTHER = "Nobody in the village had counted the steps to the lighthouse since the old keeper left."


def long(number: int) -> str:
    return LONG.format(number)


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def anchors_of(folder: Path, anchors: dict[str, Any], **sections: Any) -> int:
    """How many windows they have."""
    recipe = tiny_recipe(folder)
    recipe["regularizer"]["anchors"] = {"window_tokens": 32, **anchors}
    for name, section in sections.items():
        recipe[name] = recipe[name] | section if name != "retention" else section
    config = load_config(write_recipe(folder, recipe))
    located = resolve_base(config.model, ALONE)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    return len(anchor_samples(config, located.tokenizer, base))


def refusal(folder: Path, anchors: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        anchors_of(folder, anchors, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_case_signs_and_blanks_do_not_make_another_text(tmp_path):
    held = jsonl(tmp_path / "held.jsonl", [{"text": OTHER}, {"text": "one  fox, too"}])
    kept = jsonl(tmp_path / "kept.jsonl", [{"text": "no"}, {"text": "  One fox - TOO!\n"}])
    assert refusal(tmp_path, {"path": held}, retention={"kept": {"path": kept}}) == (
        "regularizer.anchors: 1 of its 2 texts are also in retention.kept, such as held.jsonl:2 in "
        "kept.jsonl:2: what is measured must not be held in training: take them out of one"
    )


def test_a_paragraph_is_found_however_the_files_are_cut(tmp_path):
    text = tmp_path / "held.txt"
    text.write_text("\n\n".join(long(i) for i in range(9)))
    kept = jsonl(tmp_path / "kept.jsonl", [{"text": OTHER}, {"text": long(4)}])
    told = refusal(tmp_path, {"path": str(text)}, retention={"kept": {"path": kept}})
    assert "retention.kept, such as held.txt" in told
    assert "in kept.jsonl:2:" in told
    # The other way round, and line by line.
    text.write_text("\n".join(long(i) for i in range(9)))
    told = refusal(tmp_path, {"path": kept}, retention={"whole": {"path": str(text)}})
    assert "retention.whole, such as kept.jsonl:2 in held.txt" in told


@pytest.mark.parametrize("asks", [True, False])
def test_what_data_eval_asks_and_answers_is_measured(tmp_path, asks):
    held = jsonl(tmp_path / "held.jsonl", [{"text": f"{OTHER}\n{long(1)}"}])
    turns = (long(1), "Yes.") if asks else ("What did he write?", long(1))
    rows = [{"prompt": p, "completion": c} for p, c in (("count 1", "one"), turns)]
    source = {"path": jsonl(tmp_path / "asked.jsonl", rows)}
    recipe = tiny_recipe(tmp_path)["data"] | {"eval": [source], "max_length": 200}
    told = refusal(tmp_path, {"path": held}, data=recipe)
    assert "also in data.eval, such as held.jsonl:1 in asked.jsonl:2" in told


def test_the_probe_of_a_budget_is_measured(tmp_path):
    held = jsonl(tmp_path / "held.jsonl", [{"text": OTHER}, {"text": long(2)}])
    path = jsonl(tmp_path / "probe.jsonl", [{"text": long(2).upper()}])
    probe = {"path": path, "window_tokens": 32}
    budget = {"drift_nats_per_token": 0.1, "every": 2, "probe": probe}
    told = refusal(tmp_path, {"path": held}, regularizer={"budget": budget})
    assert "also in regularizer.budget.probe, such as held.jsonl:2 in probe.jsonl:1" in told


def test_what_stands_anywhere_is_no_shared_text(tmp_path):
    rows = [{"text": f"Chapter one\n\nYes.\n\n{long(i)}", "of": "a"} for i in range(3)]
    rows += [{"text": f"Chapter one\n\nYes.\n\n{OTHER} {i}", "of": "b"} for i in range(3)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    one, other = ({"path": path, "domain_field": "of", "domain": name} for name in "ab")
    assert anchors_of(tmp_path, one, retention={"b": other | {"window_tokens": 32}}) > 1


def drawing(texts: list[str], new: Path) -> dict[str, Any]:
    encode = tiny_tokenizer().encode
    write_drawn(new, [(encode("Hello"), encode(text)) for text in texts])
    return {}


def test_texts_that_the_base_wrote_are_compared_with_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path)
    anchors = {"builtin": "base-samples", "max_tokens": 400, "window_tokens": 64}
    recipe["regularizer"]["anchors"] = anchors
    kept = jsonl(tmp_path / "kept.jsonl", [{"text": OTHER}, {"text": long(3)}, {"text": "Yes."}])
    for name, written in (("same", long(3)), ("other", long(4))):
        recipe["retention"] = {name: {"path": kept}}
        config = load_config(write_recipe(tmp_path, recipe))
        located = resolve_base(config.model, ALONE)
        base = BaseIdentity(model=config.model, revision=located.source.revision)
        assert config.regularizer.anchors is not None
        shutil.rmtree(folder := drawn_folder(config.regularizer.anchors, base), ignore_errors=True)
        atomic_dir.make_once(folder, partial(drawing, [written, "Yes."]))
        if name == "same":
            with pytest.raises(
                UserError, match=r"in retention.same, such as .*:1 in .*kept.jsonl:2"
            ):
                anchor_samples(config, located.tokenizer, base)
        else:
            assert len(anchor_samples(config, located.tokenizer, base)) == 2
