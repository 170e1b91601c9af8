"""What a family of models is in tests: its tokenizer, and the marking of what has to be learned.

No family is described here: see the files beside. Nothing of Moored is imported either, so that
what is written here can be held against it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from families.talks import TALKS

Message = dict[str, Any]
_OPEN, _CLOSE = "«", "»"
# In a family's template these stand where the marks of generation go in its marked variant. Every
# tag around them strips its blanks, so both variants write the same text.
FROM, TO = "⟦", "⟧"
_NO_REASONING = re.compile(r"^<think>\s*</think>\n*")
_CORPUS = ["hello there how are you", "line\n\nline \n  line", "user assistant system model tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the model itself generates in one assistant turn, from its prompt to where it stops.

    Attributes:
        turn: index of the message.
        words: without what ends them.
        end: the token at which inference stops.
        own: the turn writes its end itself. Otherwise it is borrowed: the next turn's header, or,
            after the last turn, a token that is not in the template's text at all (`added`).
        added: the end is not in the template's text.
        tail: what the template writes after the very last turn's end and is learned too.
    """

    turn: int
    words: str
    end: str
    own: bool = True
    added: bool = False
    tail: str = ""

    @property
    def learned(self) -> str:
        """The text of the targets."""
        return self.words + self.end + self.tail

    @property
    def written(self) -> str:
        """What of it is in the template's text."""
        return self.words + ("" if self.added else self.end) + self.tail

    def same_as(self, other: Said) -> bool:
        """Whether the turn says here what it says as the last one, `other`.

        A block of reasoning without a word, which a template gives to a last turn alone, says
        nothing; and how a turn ends may depend on what follows.
        """
        return _NO_REASONING.sub("", self.words) == _NO_REASONING.sub("", other.words)


Part = str | Said
Writer = Callable[..., list[Part]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample a conversation becomes.

    Attributes:
        num_messages: of the conversation, from its start, are in it.
        marked: its text up to the last learned token, with « » around what is learned.
        learned: the indices of the assistant turns that are learned in it.
        as_asked: False where the template, given the turns of the sample, writes something else
            before the last answer than its prompt for that answer: the text is then the prompt and
            what was said, which no rendering of the template is.
    """

    num_messages: int
    marked: str
    learned: tuple[int, ...]
    as_asked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A stand-in for a family's tokenizer and chat template, and what is right to learn of a chat.

    Attributes:
        name: of the family.
        templates: Jinja text by name ("default" and others); most have a default alone.
        write: (messages, tools, prompt=False) -> parts: the conversation written by hand, strings
            for what is given to the model, `Said` for what it generates; with `prompt` what it is
            given to answer. It knows nothing of Jinja.
        special: added tokens that the tokenizer flags as special.
        plain_added: single tokens that it does not flag as special.
        strips: of the special tokens, those whose token swallows the blanks after it.
        strips_left: those swallow the blanks before them too.
        bos: the start token, or None.
        eos: the tokenizer's own end of sequence.
        pad: the padding token.
        adds: the tokens that the tokenizer puts before a plain text by itself.
        stops: at which real inference stops (generation_config's eos_token_id).
        takes: names of the `TALKS` that it lays out whole.
        unseen: of those it takes, the ones of which one answer or more is never rendered as asked
            (see `Sample.as_asked`): to be learned as marked, or refused in a line, but never as the
            template renders them.
        reasoning_key: the message's key for reasoning; "content" for `<think>` in the words.
        today: the 26th of July 2024 as the template writes the day, where it does.
    """

    name: str
    templates: Mapping[str, str]
    write: Writer
    special: tuple[str, ...]
    plain_added: tuple[str, ...] = ()
    strips: tuple[str, ...] = ()
    strips_left: bool = False
    bos: str | None
    eos: str
    pad: str
    adds: tuple[str, ...] = ()
    stops: tuple[str, ...]
    takes: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    reasoning_key: str = "reasoning_content"
    today: str | None = None

    @property
    def refused(self) -> tuple[str, ...]:
        """Talks for which a line is right, and no sample.

        Its template refuses them, silently leaves something out, or opens an answer otherwise than
        it asks for one.
        """
        return tuple(name for name in TALKS if name not in self.takes)

    def template(self, *, marked: bool = False, tools: bool = False) -> str:
        """The template as stock transformers would choose it; with marks of generation or none."""
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        return variant(self.templates[name], marked=marked)

    def dated(self, template: str) -> str:
        """A template for which it is the 26th of July 2024, as `write` has it."""
        if self.today is None:
            return template
        return f"{{%- macro strftime_now(how) -%}}{self.today}{{%- endmacro -%}}{template}"

    def talk(self, name: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """A conversation and its tools, in this family's keys."""
        messages, tools = copy.deepcopy(TALKS[name])
        for message in messages:
            thought = message.pop("reasoning_content", None)
            if thought is None:
                continue
            if self.reasoning_key == "content":
                message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
            else:
                message[self.reasoning_key] = thought
        return messages, tools

    def tokenizer(self, *, marked: bool = False) -> transformers.PreTrainedTokenizerFast:
        """A small real one: byte-level BPE with the family's tokens and its chat template."""
        chosen = {name: variant(text, marked=marked) for name, text in self.templates.items()}
        return build(self, chosen["default"] if len(chosen) == 1 else chosen)

    def text(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as the template has to write it; or the prompt for its next answer."""
        return _written(self.write(messages, tools, prompt=prompt))

    def decoded(self, marked: str) -> str:
        """A marked text as its tokens are decoded again: without the blanks that tokens swallow."""
        for token in self.strips:
            name = re.escape(token)
            marked = re.sub(rf"(?<={name})[\s«»]+", _marks_alone, marked)
            if self.strips_left:
                marked = re.sub(rf"[\s«»]+(?={name})", _marks_alone, marked)
        return marked

    def samples(
        self, messages: Sequence[Message], tools: Any = None, *, tail: bool = True
    ) -> list[Sample]:
        """What the conversation becomes, from the whole of it to the shortest part.

        Each assistant turn is learned once: in the whole conversation where that has it as it was
        generated, after what its prompt was; otherwise in the longest part that does.
        `tail`: what follows the very last end is learned too (see `Said.tail`), which marks of
        generation leave out.
        """
        asked = {
            index: self.text(messages[:index], tools, prompt=True)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        }
        last = {index: _said(self.write(messages[: index + 1], tools))[index] for index in asked}
        left = set(asked)
        samples = []
        for end in sorted(asked, reverse=True):
            if end not in left:
                continue
            parts = self.write(messages[: end + 1], tools)
            position, here = 0, set()
            for part in parts:
                if isinstance(part, Said) and part.turn in left:
                    before = _written(parts)[:position]
                    if before == asked[part.turn] and part.same_as(last[part.turn]):
                        here.add(part.turn)
                position += len(_written([part]))
            as_asked = end in here
            if not as_asked:
                parts, here = [asked[end], last[end]], {end}
            samples.append(
                Sample(
                    num_messages=end + 1,
                    marked=_marked(parts, here, tail),
                    learned=tuple(sorted(here)),
                    as_asked=as_asked,
                )
            )
            left -= here
        return samples

    def mark(
        self, messages: Sequence[Message], tools: Any = None, *, tail: bool = True
    ) -> list[str]:
        """The texts of `samples`: « » around what is learned, nothing after the last »."""
        return [sample.marked for sample in self.samples(messages, tools, tail=tail)]


def variant(template: str, *, marked: bool) -> str:
    """A template with the marks of generation, or with none."""
    start, stop = ("{%- generation -%}", "{%- endgeneration -%}") if marked else ("", "")
    return template.replace(FROM, start).replace(TO, stop)


def to_json(value: Any, indent: int | None = None) -> str:
    """As transformers' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def calls(message: Message) -> list[dict[str, Any]]:
    """The functions that a turn calls."""
    return [call["function"] for call in message.get("tool_calls") or ()]


def _marks_alone(blanks: re.Match[str]) -> str:
    return "".join(blanks[0].split())


def _said(parts: Sequence[Part]) -> dict[int, Said]:
    return {part.turn: part for part in parts if isinstance(part, Said)}


def _written(parts: Sequence[Part]) -> str:
    return "".join(part.written if isinstance(part, Said) else part for part in parts)


def _marked(parts: Sequence[Part], turns: set[int], tail: bool) -> str:
    pieces = []
    for part in parts:
        if not isinstance(part, Said):
            pieces.append(part)
        elif part.turn in turns:
            learned = part.learned if tail else part.words + part.end
            pieces.append(_OPEN + learned + _CLOSE)
        else:
            pieces.append(part.written)
    text = "".join(pieces)
    return text[: text.rindex(_CLOSE) + 1]


def build(family: Family, template: Any) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that knows the family's tokens."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        _CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for token in family.special:
        right, left = token in family.strips, family.strips_left and token in family.strips
        model.add_special_tokens([AddedToken(token, special=True, rstrip=right, lstrip=left)])
    model.add_tokens([AddedToken(token, special=False) for token in family.plain_added])
    if family.adds:
        model.post_processor = processors.TemplateProcessing(
            single=" ".join([*family.adds, "$A"]),
            special_tokens=[(token, model.token_to_id(token)) for token in family.adds],
        )
    tokens = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        chat_template=template,
        **{name: token for name, token in tokens.items() if token is not None},
    )
