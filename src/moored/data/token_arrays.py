"""Samples as token ids in arrays, those of a whole source in flat ones, and what was left out.

`samples.py` makes them, `batch.py` makes batches of them. No torch here.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import DataConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids (int32) and which of them are targets (bool).

    Attributes:
        notes: of its layout.
    """

    input_ids: np.ndarray
    label_mask: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One tokenised sample.

    Attributes:
        sample_id: unique in its data set and stable between runs, for instance `train.jsonl:12`.
        input_ids: int32 [n], without padding.
        label_mask: bool [n]; True where the token itself is a target (predicted from the one before
            it). The first token can be none, whatever the mask says.
        kl_mask: bool [n] or None (everywhere); where the regulariser applies, of the tokens that a
            batch looks at.
    """

    sample_id: str
    input_ids: np.ndarray
    label_mask: np.ndarray
    kl_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """How many of its tokens are predicted."""
        return int(np.count_nonzero(self.label_mask[1:]))


@dataclass(slots=True, kw_only=True)
class Drops:
    """Samples that were met but are not used (truncated ones are used).

    Attributes:
        split: samples besides the first of a conversation that had to become several.
        empty_reasoning: samples in which a block of reasoning without a word is learned.
        open_turns: samples in which an answer before the last ends with no token to stop at.
        turn_tokens: samples whose words hold the chat template's own marks of turns.
        lengths: in tokens, of every sample that was met, before it was cut.
    """

    met: int = 0
    too_long: int = 0
    no_target: int = 0
    truncated: int = 0
    unreadable: int = 0
    split: int = 0
    empty_reasoning: int = 0
    open_turns: int = 0
    turn_tokens: int = 0
    lengths: array[int] = field(default_factory=lambda: array("i"))

    def counts(self) -> dict[str, int]:
        """All but the lengths, by name."""
        names = [one.name for one in fields(self) if one.name != "lengths"]
        return {name: getattr(self, name) for name in names}

    def add(self, other: Drops) -> None:
        """Counts what was met in another source, too."""
        for name in (*self.counts(), "lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def dropped(self) -> int:
        """How many are not used."""
        return self.too_long + self.no_target + self.unreadable

    def reasons(self, data: DataConfig) -> list[str]:
        """How many were dropped and why, in words."""
        return [
            f"{count} {reason}"
            for count, reason in (
                (self.too_long, f"longer than data.max_length={data.max_length}"),
                (self.no_target, "without a token to learn"),
                (self.unreadable, "not as they must be"),
            )
            if count
        ]

    def notes(self) -> list[str]:
        """What is learned, but should be looked at, in words."""
        return [
            f"{count} of {self.met} samples {what}"
            for count, what in (
                (
                    self.empty_reasoning,
                    "learn a block of reasoning without a word, as the chat template writes it: "
                    "the model learns not to think; give reasoning_content, or a template "
                    "without it",
                ),
                (
                    self.open_turns,
                    "have an answer that the chat template ends with no token to stop at, before "
                    "the last: there the model learns no end",
                ),
                (
                    self.turn_tokens,
                    "hold the chat template's own marks of turns among their words, which are "
                    "read as such: clean them, or give chats as messages",
                ),
            )
            if count
        ]

    @property
    def split_note(self) -> str:
        """Says that chats became several samples, in words."""
        return (
            f"{self.split} samples more than rows, since the chat template writes earlier turns "
            "otherwise once others follow"
        )

    def check(self, where: str, data: DataConfig) -> None:
        """Says what was dropped.

        Raises:
            UserError: too many, or all.
        """
        if self.truncated:
            logger.info("%s: %d samples cut to %d tokens", where, self.truncated, data.max_length)
        for note in self.notes():
            logger.warning("%s: %s", where, note)
        if self.split:
            logger.info("%s: %s", where, self.split_note)
        if not self.dropped and self.met:
            return
        reasons = self.reasons(data)
        line = f"{where}: {self.dropped} of {self.met} samples dropped ({', '.join(reasons)})"
        fraction = self.dropped / max(1, self.met)
        if fraction <= data.max_dropped_fraction and self.dropped < self.met:
            logger.warning("%s", line)
            return
        raise UserError(
            f"{line}, more than data.max_dropped_fraction={data.max_dropped_fraction:g} allows: "
            f"{self._fix(data)}"
        )

    def _fix(self, data: DataConfig) -> str:
        if self.too_long + self.no_target == 0:
            return "mend the data"
        lengths = sorted(self.lengths)
        keep = max(1, math.ceil(len(lengths) * (1 - data.max_dropped_fraction)))
        longer = f"set data.max_length={lengths[keep - 1]} or more" if lengths else "mend the data"
        return longer if data.too_long == "truncate" else f"{longer}, or data.too_long=truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """The tokens of many samples, one after the other.

    Attributes:
        offsets: int64 [samples + 1]; sample i is tokens [offsets[i], offsets[i + 1]).
        input_ids: int32 [tokens].
        label_mask: bool [tokens].
    """

    offsets: np.ndarray
    input_ids: np.ndarray
    label_mask: np.ndarray


class HeldSource(Sequence[Sample]):
    """The samples of one source (or of one block of a stream), held in flat arrays.

    Attributes:
        kept_in: the folder of the cache that they were read from, or None.
    """

    def __init__(self, name: str, parts: Sequence[tuple[str, Tokens]], drops: Drops):
        lengths = [len(tokens.input_ids) for _, tokens in parts]
        empty = [np.zeros(0, dtype=np.int32)]
        flat = Flat(
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            input_ids=np.concatenate(empty + [tokens.input_ids for _, tokens in parts]),
            label_mask=np.concatenate(
                [m.astype(bool) for m in empty] + [t.label_mask for _, t in parts]
            ),
        )
        flat.input_ids.flags.writeable = flat.label_mask.flags.writeable = False
        self._fill(name, [sample_id for sample_id, _ in parts], flat, drops)

    @classmethod
    def kept(
        cls,
        name: str,
        sample_ids: Sequence[str],
        flat: Flat,
        drops: Drops,
        *,
        digest: str,
        folder: Path,
    ) -> Self:
        """The same from arrays that were kept in `folder`; nothing is copied."""
        source = cls.__new__(cls)
        source._fill(name, sample_ids, flat, drops, digest, folder)
        return source

    def _fill(
        self,
        name: str,
        sample_ids: Sequence[str],
        flat: Flat,
        drops: Drops,
        digest: str | None = None,
        kept_in: Path | None = None,
    ) -> None:
        self.name = name
        self.drops = drops
        self.sample_ids = sample_ids
        self.flat = flat
        self.kept_in = kept_in
        self._digest = digest

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        start, stop = self.flat.offsets[index], self.flat.offsets[index + 1]
        return Sample(
            sample_id=self.sample_ids[int(index)],
            input_ids=self.flat.input_ids[start:stop],
            label_mask=self.flat.label_mask[start:stop],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return len(self.flat.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted and learned."""
        mask = self.flat.label_mask
        return int(np.count_nonzero(mask) - np.count_nonzero(mask[self.flat.offsets[:-1]]))

    def digest(self) -> str:
        """SHA-256 of ids, tokens and masks."""
        if self._digest is None:
            sha = hashlib.sha256("\0".join(self.sample_ids).encode())
            for values in (self.flat.offsets, self.flat.input_ids, self.flat.label_mask):
                sha.update(values.tobytes())
            self._digest = sha.hexdigest()
        return self._digest
