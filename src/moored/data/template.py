"""A chat template: conversations rendered by it as text.

What of the text is learned is `chat.py`'s matter.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
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


class TemplateError(Exception):
    """One conversation that the template cannot lay out, in words; the caller adds the place."""


class ChatTemplate:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: Jinja text to use instead of the tokenizer's own.

    Attributes:
        text: the template; None where the tokenizer has none.
        marked: whether it says by generation marks what the assistant says.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several named templates
            own = own.get("default")
        self.text: str | None = text or own
        if self.text and "strftime_now" in self.text:
            self.text = _FIXED_DATE + self.text
        self.marked = bool(self.text and _MARKED.search(self.text))
        self._special_tokens: dict[str, Any] = tokenizer.special_tokens_map

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; with the generation prompt, what is given to answer it.

        Raises:
            TemplateError: the template refuses it; the reason in words.
        """
        return self._render(messages, tools, generation_prompt, marked=False)[0]

    def render_marked(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans [start, stop) between generation marks.

        Raises:
            TemplateError: the template refuses it; the reason in words.
        """
        return self._render(messages, tools, False, marked=True)

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        generation_prompt: bool,
        *,
        marked: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation says str
        try:
            texts, spans = render(
                conversations=[[dict(message) for message in messages]],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
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
