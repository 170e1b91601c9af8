"""Conversations and texts as tokens, with what is learned of them.

Where the answers are in the text is `chat_layout.py`'s matter. Here spans of characters become
masks of tokens, and are checked there: the tokens before an answer must be what the model will be
given when it has to answer. No file is read and no sample dropped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from moored.data.chat_layout import ChatLayout, chat_layouts, plain_layout
from moored.data.stop_tokens import StopStrings
from moored.data.template import ChatTemplate, Message, TemplateError, Tools
from moored.data.token_arrays import Tokens
from moored.utils.errors import UserError


class ChatEncoder:
    """Renders, tokenises and masks conversations and texts for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: Jinja text to use instead of the tokenizer's own.

    Attributes:
        eos: id of the end-of-sequence token.
        prefix: the start token where the tokenizer puts one before every text, else nothing.
        stops: the tokens at which a turn may end.

    Raises:
        UserError: the tokenizer is slow or has no end-of-sequence token, or the template's markers
            cannot be parsed.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer of {name}: has no fast version, so answers cannot be located in its "
                "tokens: use a model whose repository has a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {name}: has no end-of-sequence token, so the model could not learn "
                "to stop: set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer, template)
        start = list(tokenizer("", verbose=False)["input_ids"])
        self._bos: int | None = tokenizer.bos_token_id
        has_start = self._bos is not None and start[:1] == [self._bos]
        self.prefix: list[int] = start[:1] if has_start else []
        added = tokenizer.added_tokens_decoder
        self._special = {i for i, token in added.items() if token.special} | {self.eos}
        starts = {self._bos} - {self.eos}  # no turn ends with the start of the next text
        self.stops = StopStrings(
            [self._text_of(i) for i in sorted(self._special - starts)],
            [token.content for i, token in added.items() if i not in self._special],
        )

    @property
    def templates(self) -> dict[str, str]:
        """The chat templates by name; empty where there is none."""
        return self._template.named

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        """The added tokens with which the chat template marks turns; none without a template."""
        return self._marks[0]

    def with_end(self, answer: str) -> str:
        """An answer with the chat template's end of a turn, where it has no end of its own."""
        return answer if self.stops.closing(answer) is not None else answer + self._marks[1]

    @cached_property
    def _marks(self) -> tuple[tuple[str, ...], str]:
        """What the template writes around two turns: its added tokens, and the end of the last."""
        word = "\ue000"  # private use: no template has it
        asked = [{"role": "user", "content": word}]
        answered = [*asked, {"role": "assistant", "content": word}]
        if not self.templates:
            return (), ""
        try:
            header = self._template.render(asked, generation_prompt=True)
            whole = self._template.render(answered)
        except TemplateError:  # one that cannot ask a single question
            return (), ""
        end = whole[: self.stops.closing(whole) or 0].rpartition(word)[2]
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        marks = {t for t in added if t.strip() and t in header + end and "think" not in t.lower()}
        return tuple(sorted(marks)), end

    def layouts(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        learned: Sequence[bool] | None = None,
        split: bool = False,
    ) -> list[ChatLayout]:
        """The conversation as one or several samples, as `chat_layout.chat_layouts` says.

        Raises:
            TemplateError: an answer cannot be located, or the template leaves something out.
        """
        return chat_layouts(
            self._template, messages, tools, self.stops, learned=learned, split=split
        )

    def plain_layout(self, prompt: str, completion: str) -> ChatLayout:
        """A text that no template lays out; all but the prompt is learned."""
        return plain_layout(prompt + completion, len(prompt), self.stops)

    def encode(self, layouts: Sequence[ChatLayout], *, chat: bool = True) -> list[Tokens | str]:
        """Tokenises layouts; in the place of one that cannot be masked exactly, says why.

        Args:
            layouts: what to tokenise.
            chat: rendered by the template, which writes special tokens itself. Otherwise the
                tokenizer's own start token is put first, if it is not there.
        """
        if not layouts:
            return []
        whole = self.tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        before = [layout.text[:start] for layout in layouts for start, _ in layout.spans]
        given = iter(self._ids(before))
        out: list[Tokens | str] = []
        for index, layout in enumerate(layouts):
            ids, offsets = whole["input_ids"][index], whole["offset_mapping"][index]
            prefixes = [next(given) for _ in layout.spans]
            broken = [
                start
                for (start, _), prefix in zip(layout.spans, prefixes, strict=True)
                if ids[: len(prefix)] != prefix
            ]
            if broken:
                pieces = self._piecewise(layout.text, broken)
                if self._decode(pieces[0]) != self._decode(ids):
                    out.append(
                        "the tokenizer joins the first character of an answer with what comes "
                        "before it: let prompts end, or answers begin, with a space or line break"
                    )
                    continue
                ids, offsets = pieces
            out.append(self._mask(layout, ids, offsets, chat=chat))
        return out

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """What the model is given to answer `messages`: the assistant's header included.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self._ids([self.prompt_text(messages, tools)])[0]

    def prompt_text(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """The same as text.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        suited = self._template.suited(messages, tools)
        return self._template.render(suited, tools, generation_prompt=True)

    def answer_ends(self) -> tuple[int, ...]:
        """The tokens that end an answer to a single question, and the end of sequence.

        Raises:
            TemplateError: the template refuses it, or its answer cannot be located.
        """
        asked = {"role": "user", "content": "Is it?"}
        (tokens,) = self.encode(self.layouts([asked, {"role": "assistant", "content": "Yes."}]))
        if isinstance(tokens, str):
            raise TemplateError(tokens)
        return self.ends_of(tokens)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a plain text, with the start token where the tokenizer puts one."""
        ids = self._ids([text])[0]
        return [*self.prefix, *ids[self._num_starts(ids) :]] if self.prefix else ids

    def ends_of(self, tokens: Tokens) -> tuple[int, ...]:
        """The tokens that end a learned turn, the last turn's first, and the end of sequence."""
        last = tokens.label_mask & ~np.append(tokens.label_mask[1:], False)
        ends = tokens.input_ids[last][::-1].tolist()
        marks = self.tokenizer.added_tokens_decoder
        return tuple(dict.fromkeys([*(end for end in ends if end in marks), self.eos]))

    def _num_starts(self, ids: Sequence[int]) -> int:
        """How many start tokens a text rendered beforehand begins with."""
        count = 0
        while self._bos is not None and count < len(ids) and ids[count] == self._bos:
            count += 1
        return count

    def _text_of(self, token_id: int) -> str:
        token = self.tokenizer.added_tokens_decoder.get(token_id)
        return token.content if token else str(self.tokenizer.convert_ids_to_tokens(token_id))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _piecewise(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenises so that no token lies across a cut: as when the model goes on from there."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self.tokenizer(
                text[start:stop],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += piece["input_ids"]
            offsets += [(start + left, start + right) for left, right in piece["offset_mapping"]]
        return ids, offsets

    def _mask(
        self, layout: ChatLayout, ids: list[int], offsets: list[tuple[int, int]], *, chat: bool
    ) -> Tokens:
        mask = np.zeros(len(ids), dtype=bool)
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        for start, stop in layout.spans:
            first, past = np.searchsorted(starts, (start, stop))
            # A token that goes on past the end is the end itself, with the blanks that it takes
            # along, or joins words with what the template writes: that one is not learned.
            if past > first and offsets[past - 1][1] > stop and ids[past - 1] not in self._special:
                past -= 1
            mask[first:past] = True
        if layout.spans and not layout.is_closed:  # nothing there to stop at
            ids, mask = [*ids, self.eos], np.append(mask, True)
        if not chat:
            ids, mask = self._with_start(ids, mask)
        input_ids = np.array(ids, dtype=np.int32)
        if self._bos is not None and self._bos != self.eos:
            mask &= input_ids != self._bos  # who writes is given it, and never has to write it
        return Tokens(input_ids=input_ids, label_mask=mask, notes=layout.notes)

    def _with_start(self, ids: list[int], mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """One start token, where the tokenizer puts one or the text has one; it is not learned."""
        there = self._num_starts(ids)
        if there == len(ids):  # nothing but the end, where both are one token
            there = 0
        start = self.prefix or ids[: min(there, 1)]
        mask = np.concatenate([np.zeros(len(start), dtype=bool), mask[there:]])
        return [*start, *ids[there:]], mask
