"""Drawing texts from the base: ancestral sampling, seeded, once, kept in the cache.

How they are read is `base_samples.py`'s matter. Works in one process, on its GPU if it has one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import Any

import torch
import transformers

from moored.adapted import dropout_off
from moored.config import Config, Corpus
from moored.config.regularizer import Anchors
from moored.data import pad_token_id
from moored.data.base_samples import (
    ANCHOR_QUESTIONS,
    QUESTIONS,
    BaseIdentity,
    drawn_folder,
    seed_of,
    write_drawn,
)
from moored.data.batch import left_padded
from moored.data.chat import ChatEncoder
from moored.distributed.mesh import alone
from moored.evaluation.generate import each_token
from moored.models.base_files import BaseFiles, resolve_dtype
from moored.models.loading import load_base
from moored.utils import atomic_dir
from moored.utils.progress import Phase

log = logging.getLogger(__name__)
ROWS = 16  # at a time; what is drawn depends on it


def draw(config: Config, located: BaseFiles) -> list[Path]:
    """Have the texts of every corpus that is to be drawn from the base.

    At temperature 1 and from the whole vocabulary, so that they are what the base says, not what is
    likeliest. A base with a chat template answers everyday questions; another one writes from its
    start token. Anchors have other questions, and every second one is a chat that the base writes
    from its start, the question too. A text is cut at `window_tokens`, prompt included;
    `max_tokens` are drawn in all.

    Args:
        config: the recipe.
        located: the base.

    Returns:
        Their folders; what lies there already is verified and stays.

    Raises:
        UserError: the base cannot be loaded, or the cache not be written.
    """
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    corpora = [c for c in config.corpora().values() if c.builtin == "base-samples"]
    model: list[Any] = []  # loaded for the first one that is not there
    folders: list[Path] = []
    for corpus in corpora:
        folder = drawn_folder(corpus, base)

        def make(new: Path, corpus: Corpus = corpus) -> dict[str, Any]:
            log.info("drawing %d tokens from the base, once", corpus.max_tokens)
            if not model:
                model.append(_load(config, located))
            rows = list(_rows(model[0], config, located, corpus))
            write_drawn(new, rows)
            return {
                "made_from": base.facts(corpus),
                "num_texts": len(rows),
                "num_tokens": sum(len(text) for _, text in rows),
                "device": str(model[0].device),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }

        atomic_dir.make_once(folder, make)
        folders.append(folder)
    return folders


def _load(config: Config, located: BaseFiles) -> Any:
    mesh = alone("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_base(located.source.path, config.model, mesh, config.parallel)[0]
    # Said in full: a model's own generation_config.json may cut off unlikely tokens.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    return model


def _rows(
    model: Any, config: Config, located: BaseFiles, corpus: Corpus
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and texts until there are enough tokens; the last text is cut."""
    chat = ChatEncoder(located.tokenizer)
    dtype = resolve_dtype(config.model, model.device)
    prompts = cycle(_prompts(chat, corpus))
    devices = [model.device] if model.device.type == "cuda" else []
    left = corpus.max_tokens
    with (
        torch.no_grad(),
        dropout_off(model),
        torch.random.fork_rng(devices),
        torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        Phase("drawing texts from the base", corpus.max_tokens, "tokens") as phase,
    ):
        torch.manual_seed(seed_of(corpus))
        while left > 0:
            asked = list(islice(prompts, ROWS))
            texts = _texts(model, asked, chat, corpus, phase)
            for prompt, text in zip(asked, texts, strict=True):
                if text[:left]:
                    yield prompt, text[:left]
                left = max(0, left - len(text))
                phase.advance(len(text))


def _prompts(chat: ChatEncoder, corpus: Corpus) -> list[list[int]]:
    """What the base is given: questions that leave room for an answer, else its start token."""
    short: list[list[int]] = []
    is_anchors = isinstance(corpus, Anchors)
    if chat.templates:
        asked = [_asked(chat, text) for text in (ANCHOR_QUESTIONS if is_anchors else QUESTIONS)]
        short = [ids for ids in asked if 2 * len(ids) <= corpus.window_tokens]
        if is_anchors:
            start = _start(chat)
            short = [ids for question in short for ids in (start, question)] or [start]
    return short or [chat.prefix or [chat.eos]]


def _asked(chat: ChatEncoder, text: str) -> list[int]:
    return chat.prompt_ids([{"role": "user", "content": text}])


def _start(chat: ChatEncoder) -> list[int]:
    """The start of any chat, up to where the user's own words begin."""
    pairs = zip(_asked(chat, "A"), _asked(chat, "zebra"), strict=False)
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)] or [chat.eos]


def _texts(
    model: Any, prompts: list[list[int]], chat: ChatEncoder, corpus: Corpus, phase: Phase
) -> list[list[int]]:
    pad = pad_token_id(chat.tokenizer)
    ids, mask = left_padded(prompts, pad)
    tokens = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=corpus.window_tokens - min(map(len, prompts)),
        eos_token_id=None if isinstance(corpus, Anchors) else chat.eos,
        pad_token_id=pad,
        use_cache=True,
        stopping_criteria=each_token(phase),
    )[:, ids.shape[1] :].tolist()
    texts: list[list[int]] = []
    start = _start(chat) if isinstance(corpus, Anchors) and chat.templates else None
    for prompt, row in zip(prompts, tokens, strict=True):
        ends = chat.eos in row and prompt != start  # behind its question the base answers it
        end = row.index(chat.eos) + 1 if ends else len(row)
        texts.append(row[: min(end, corpus.window_tokens - len(prompt))])
    return texts
