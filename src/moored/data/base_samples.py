"""Texts that the base itself wrote, as tokens: where they are kept, and read as samples.

What draws them loads the base, and is `base_generation.py`. They stand in for the data that the
base was trained on, which nobody has: for x drawn from the base, the mean of log p(x) - log q(x), q
the policy, is the KL from base to policy over whole texts, by definition; so the drift measured on
them is how far the policy left its base where the base itself goes. (Samples of the model in place
of its data: LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.batch import Sample
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Corpus, ModelConfig

FILE = "samples.jsonl"
SCHEME = 1  # raised when the same key would be drawn otherwise
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Whose texts they are.

    Attributes:
        model: of the recipe: quantisation and precision.
        revision: of the files, as `resolve_model` says.
    """

    model: ModelConfig
    revision: str

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """All that the texts depend on, as JSON values."""
        nf4 = self.model.quantization == "nf4"
        return {
            "scheme": SCHEME,
            "seed": SEED,
            "revision": self.revision,
            "quantization": self.model.quantization,
            "double_quantization": self.model.double_quantization if nf4 else None,
            "dtype": self.model.dtype,
            "max_tokens": corpus.max_tokens,
            "window_tokens": corpus.window_tokens,
        }


def drawn_folder(corpus: Corpus, base: BaseIdentity) -> Path:
    """Where the texts of this base and these lengths are, or will be."""
    facts = json.dumps(base.facts(corpus), sort_keys=True)
    return cache_folder() / "base-samples" / hashlib.sha256(facts.encode()).hexdigest()[:24]


def drawn_samples(name: str, corpus: Corpus, base: BaseIdentity, *, label: str) -> list[Sample]:
    """The texts as samples: a prompt (or start token), and what the base wrote, which is scored.

    Raises:
        UserError: they were not drawn yet.
    """
    folder = drawn_folder(corpus, base)
    if (fault := atomic_dir.verify(folder)) is not None:
        why = f"{folder} is broken ({fault})" if folder.exists() else "they are not drawn yet"
        raise UserError(
            f"{label}.builtin=base-samples: {why}: run `moored prepare` with this recipe once, "
            "where the base fits one device"
        )
    samples: list[Sample] = []
    for number, line in enumerate((folder / FILE).read_text().splitlines(), 1):
        row = json.loads(line)
        ids = np.array(row["prompt"] + row["text"], dtype=np.int32)
        mask = np.arange(len(ids)) >= len(row["prompt"])
        samples.append(Sample(sample_id=f"{name}:{number}", input_ids=ids, label_mask=mask))
    return samples


def write_drawn(folder: Path, rows: Iterable[tuple[list[int], list[int]]]) -> None:
    """Prompt and text of each row, as token ids."""
    with open(folder / FILE, "w", encoding="utf-8") as file:
        for prompt, text in rows:
            file.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
