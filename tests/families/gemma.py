"""Gemma 2, which has no system turn, and Gemma 3, which puts its text into the first user turn.

Both call the assistant `model` and trim words; the tokenizer's own end is another token than a
turn's.
"""

from __future__ import annotations

from families.kit import Family, Part, Said

_PLAIN = ("one", "three", "edges", "same_words")
_TURNS = """
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate') -}}
    {%- endif -%}
    {%- if turn.role == 'assistant' -%}
        {{- '<start_of_turn>model\\n' -}}⟦{{- turn.content | trim ~ '<end_of_turn>' -}}⟧
    {%- else -%}
        {{- '<start_of_turn>' ~ turn.role ~ '\\n' ~ (first if loop.first else '') -}}
        {{- turn.content | trim ~ '<end_of_turn>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
_GEMMA2 = (
    """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- set turns, first = messages, '' -%}
"""
    + _TURNS
)
_GEMMA3 = (
    """
{{- bos_token -}}
{%- set own = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if own else messages -%}
{%- set first = messages[0].content ~ '\\n\\n' if own else '' -%}
"""
    + _TURNS
)


def _write(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = ["<bos>"]
    first = ""
    for index, turn in enumerate(messages):
        words = turn["content"].strip()
        if turn["role"] == "system":
            first = turn["content"] + "\n\n"
        elif turn["role"] == "user":
            parts.append(f"<start_of_turn>user\n{first}{words}<end_of_turn>\n")
            first = ""
        else:
            said = Said(turn=index, words=words, end="<end_of_turn>")
            parts += ["<start_of_turn>model\n", said, "\n"]
    return [*parts, "<start_of_turn>model\n"] if prompt else parts


def _family(name: str, template: str, *more: str) -> Family:
    return Family(
        name=name,
        templates={"default": template},
        write=_write,
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        adds=("<bos>",),
        stops=("<eos>", "<end_of_turn>"),
        takes=(*_PLAIN, *more),
    )


GEMMA2 = _family("gemma-2", _GEMMA2)
GEMMA3 = _family("gemma-3", _GEMMA3, "system")
