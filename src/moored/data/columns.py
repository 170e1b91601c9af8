"""The names that columns of rows and keys of turns have, ours and the field's.

What they hold is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moored.config import Source

# How the field names an answer's reasoning; templates read one of them, and which is their matter.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# What the field calls "learn this turn, or do not": OpenAI (weight), axolotl (train, training),
# LLaMA-Factory, ms-swift and slime (loss, loss_mask).
FLAGS = ("loss", "loss_mask", "train", "training", "trainable", "weight")
# Likewise about learning, but of a part of a turn, by a fraction, or the other way round.
UNKNOWN_FLAGS = (
    "ignore_loss",
    "loss_scale",
    "loss_weight",
    "mask",
    "masked",
    "no_loss",
    "train_detail",
    "training_detail",
    "train_on_turn",
)

Kind = Literal["messages", "prompt_completion", "text"]
RowLayout = Literal["messages", "prompt_completion", "text", "sharegpt", "alpaca"]
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
BESIDE = ("system", "tools")  # a chat or a pair
CONVERSATIONS = ("conversations", "conversation")
ALPACA = ("instruction", "output")
ALPACA_BESIDE = ("input", "history")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FIELDS = (*(name for names in COLUMNS.values() for name in names), *BESIDE)
# Columns that are a part of the sample wherever they are met. Who leaves one unread is to say so.
PARTS = (
    "instruction",
    "input",
    "context",
    "history",
    "system_prompt",
    "system_message",
    "functions",
    *REASONING_KEYS,
    "chain_of_thought",
    "chosen",
    "rejected",
    "documents",
    "chat_template_kwargs",
    "completion_mask",
    "assistant_masks",
    *MEDIA,
)
VERDICTS = (*FLAGS, *UNKNOWN_FLAGS, "label")  # `label: false` is KTO's word for a bad answer


def wanted(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of a source that may hold samples, and those that are read whatever they hold."""
    foreign = (*CONVERSATIONS, *ALPACA, *ALPACA_BESIDE)
    mapped = tuple(source.fields.get(name, name) for name in FIELDS)
    judged = tuple(name for name in (*PARTS, *VERDICTS) if name not in MEDIA)
    return _without((*mapped, *foreign), source), _without(
        [name for name in (*foreign, *judged) if name not in mapped], source
    )


def _without(names: Iterable[str], source: Source) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name not in source.ignore)
