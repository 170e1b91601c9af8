"""A chat template: conversations rendered by it as text.

Where in the text the answers are is `chat_layout.py`'s matter, tokens are `chat.py`'s.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would give other tokens tomorrow, and with them another run.
_TODAY = datetime.datetime(2024, 7, 26, 12, 0)
_DIRECTIVES = [*"debBmyYHIMSpaAjFTD", "-d", "-m", "-H", "-I"]
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{_TODAY.strftime(f'%{code}')}')" for code in _DIRECTIVES)
    + " }}{%- endmacro %}\n"
)

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


class TemplateError(Exception):
    """One conversation that the template cannot lay out, in words; the caller adds the place."""


class ChatTemplate:
    """Renders conversations for one tokenizer.

    A tokenizer may have several templates with names; of these a conversation with tools takes
    `tool_use` where there is one, and `default` otherwise, as transformers does.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: Jinja text to use instead of the tokenizer's own.

    Attributes:
        named: the templates by name; empty where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        own = text or tokenizer.chat_template or {}
        named = {"default": own} if isinstance(own, str) else dict(own)
        self.named: dict[str, str] = {
            name: _FIXED_DATE + jinja if "strftime_now" in jinja else jinja
            for name, jinja in named.items()
        }
        self._special_tokens: dict[str, Any] = tokenizer.special_tokens_map

    def text_for(self, tools: Tools) -> str:
        """The template of a conversation with these tools, or none.

        Raises:
            TemplateError: only templates of other names are there.
        """
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in self.named:
                return self.named[name]
        raise TemplateError(
            f"the tokenizer has chat templates named {', '.join(sorted(self.named))}, and none "
            "named default: set data.chat_template to one of them"
        )

    def is_marked(self, tools: Tools) -> bool:
        """Whether it says by generation marks what the assistant says."""
        return bool(_MARKED.search(self.text_for(tools)))

    def render(
        self, messages: Sequence[Message], tools: Tools = None, *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text; with the generation prompt, what is given to answer it.

        Raises:
            TemplateError: the template refuses it; the reason in words.
        """
        return self._render(messages, tools, generation_prompt, marked=False)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Tools = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans [start, stop) between generation marks.

        Raises:
            TemplateError: the template refuses it; the reason in words.
        """
        return self._render(messages, tools, False, marked=True)

    def suited(self, messages: Sequence[Message], tools: Tools = None) -> Sequence[Message]:
        """The conversation with its calls' arguments in the form that this template writes.

        Most templates write an object as JSON; some put its text in as it is, and would write
        Python's form of an object. These get JSON text.
        """
        if not any(arguments for _, arguments in _calls(messages)):
            return messages
        problem: TemplateError | None = None
        try:
            if not _has_python(self.render(messages, tools), messages):
                return messages
        except TemplateError as error:
            problem = error
        texts = [_with_json_arguments(message) for message in messages]
        try:
            self.render(texts, tools)
        except TemplateError:
            if problem is not None:
                raise problem from None
        return texts

    def _render(
        self, messages: Sequence[Message], tools: Tools, generation_prompt: bool, *, marked: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation says str
        try:
            texts, spans = render(
                conversations=[[dict(message) for message in messages]],
                tools=tools,
                chat_template=self.text_for(tools),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except TemplateError:
            raise
        except Exception as error:  # the template is somebody's program
            reason = str(error).strip().splitlines() or [type(error).__name__]
            role = "system" if "system" in reason[0].lower() else None
            fix = (
                "put its text into the first user turn, or set data.chat_template"
                if role and any(message["role"] == role for message in messages)
                else "change the conversation or set data.chat_template"
            )
            raise TemplateError(
                f"the chat template refuses this conversation ({reason[0][:120]}): {fix}"
            ) from error
        return texts[0], [tuple(span) for span in spans[0]] if marked else []


def _calls(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """Name and arguments of every call of a conversation."""
    calls = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            inner = call.get("function") or call
            calls.append((str(inner.get("name", "")), inner.get("arguments")))
    return calls


def _has_python(text: str, messages: Sequence[Message]) -> bool:
    """Whether some call's object stands there as Python prints it, which no model is to learn."""
    return any(
        isinstance(arguments, Mapping)
        and str(arguments) in text
        and str(arguments) != json.dumps(arguments, ensure_ascii=False)
        for _, arguments in _calls(messages)
    )


def _with_json_arguments(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():
        inner = dict(call.get("function") or call)
        if isinstance(inner.get("arguments"), Mapping):
            inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
        calls.append({**call, "function": inner} if call.get("function") else inner)
    return {**message, "tool_calls": calls} if calls else message
