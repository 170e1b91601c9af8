"""Small recipes, files and samples for the tests of the data rooms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chats
from moored import data
from moored.config import Config
from moored.data.files import open_sources
from moored.data.records import Record, read_records
from moored.data.samples import SampleSet, load_samples
from moored.utils.errors import UserErrors

TOKENIZER = chats.tokenizer(chats.CHATML)
PLAIN_TOKENIZER = chats.tokenizer(add_bos=True)
EOS = "<|endoftext|>"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
HEADER = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"


def config(train: list[dict[str, Any]], /, **sections: Any) -> Config:
    """A recipe for some sources; sections are merged over small defaults."""
    recipe: dict[str, Any] = {
        "name": "test",
        "model": {"name_or_path": "none"},
        "data": {"train": train, "max_length": 512} | sections.pop("data", {}),
        "train": {"steps": 100, "global_batch_sequences": 4} | sections.pop("train", {}),
    }
    recipe["train"] = {k: v for k, v in recipe["train"].items() if v is not None}
    return Config.model_validate(recipe | sections)


def jsonl(path: Path, rows: list[Any]) -> str:
    """Writes one object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str | Path, tokenizer=TOKENIZER, **options: Any) -> SampleSet:
    """Checks and tokenises one file."""
    recipe = config([{"path": str(path)} | options.pop("source", {})], data=options)
    data.check_data(recipe)
    return load_samples(recipe.data.train, tokenizer, recipe.data, len(tokenizer))


def records(path: str | Path, **source: Any) -> list[Record]:
    """What the rows of a file, a folder or (hub=True) a hub data set mean; nothing is tokenised.

    Raises:
        UserErrors: their problems.
    """
    place = "hub" if source.pop("hub", False) else "path"
    recipe = config([{place: str(path)} | source])
    problems: list[str] = []
    found = [
        record
        for reader in open_sources(recipe.data.train, "data.train", problems)
        for record in read_records(reader, recipe.data.train[0], problems)
    ]
    if problems:
        raise UserErrors(problems)
    return found


def turn(role: str, content: Any) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}
