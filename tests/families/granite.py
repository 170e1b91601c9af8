"""Granite 3, which lists tools but writes no call, and Granite 4: a role between two tokens.

Without a system text both put one of their own first, that of Granite 3 with the day.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_PLAIN = ("one", "three", "edges", "same_words", "system", "tools_unused")
_END = "<|end_of_text|>"


def _role(name: str) -> str:
    return f"<|start_of_role|>{name}<|end_of_role|>"


_GRANITE3 = """
{%- set own = messages[0].role == 'system' -%}
{{- '<|start_of_role|>system<|end_of_role|>' -}}
{{- messages[0].content if own else "Today's Date: " ~ strftime_now('%B %d, %Y') ~ '. You help.' -}}
{{- '<|end_of_text|>\\n' -}}
{%- if tools -%}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' -}}
    {{- tools | tojson(indent=4) ~ '<|end_of_text|>\\n' -}}
{%- endif -%}
{%- for turn in (messages[1:] if own else messages) -%}
    {{- '<|start_of_role|>' ~ turn.role ~ '<|end_of_role|>' -}}
    {%- if turn.role == 'assistant' -%}
        ⟦{{- turn.content ~ '<|end_of_text|>' -}}⟧
    {%- else -%}
        {{- turn.content ~ '<|end_of_text|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
    {%- if loop.last and add_generation_prompt -%}
        {{- '<|start_of_role|>assistant<|end_of_role|>' -}}
    {%- endif -%}
{%- endfor -%}
"""
_DAY = "July 26, 2024"


def _write_granite3(messages, tools=None, prompt=False) -> list[Part]:
    own = messages[0]["role"] == "system"
    system = messages[0]["content"] if own else f"Today's Date: {_DAY}. You help."
    parts: list[Part] = [f"{_role('system')}{system}{_END}\n"]
    if tools:
        parts.append(f"{_role('available_tools')}{to_json(tools, indent=4)}{_END}\n")
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            said = Said(turn=index, words=turn["content"], end=_END)
            parts += [_role("assistant"), said, "\n"]
        elif turn["role"] != "system":
            parts.append(f"{_role(turn['role'])}{turn['content']}{_END}\n")
    return [*parts, _role("assistant")] if prompt else parts


_GRANITE4 = """
{%- set own = messages[0].role == 'system' -%}
{{- '<|start_of_role|>system<|end_of_role|>' ~ (messages[0].content if own else 'You help.') -}}
{%- if tools -%}
    {{- '\\n\\nThese functions may be called:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' ~ tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|end_of_text|>\\n' -}}
{%- for turn in (messages[1:] if own else messages) -%}
    {%- if turn.role == 'tool' -%}
        {%- if loop.previtem.role != 'tool' -%}
            {{- '<|start_of_role|>user<|end_of_role|>' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- '<|end_of_text|>\\n' -}}
        {%- endif -%}
    {%- elif turn.role == 'assistant' -%}
        {{- '<|start_of_role|>assistant<|end_of_role|>' -}}
        ⟦{{- turn.content -}}
        {%- for each in turn.tool_calls -%}
            {{- '\\n' if turn.content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": "' ~ each.function.name ~ '", "arguments": ' -}}
            {{- each.function.arguments | tojson ~ '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|end_of_text|>' -}}⟧
        {{- '\\n' -}}
    {%- else -%}
        {{- '<|start_of_role|>' ~ turn.role ~ '<|end_of_role|>' ~ turn.content -}}
        {{- '<|end_of_text|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""


def _write_granite4(messages, tools=None, prompt=False) -> list[Part]:
    own = messages[0]["role"] == "system"
    system = messages[0]["content"] if own else "You help."
    if tools:
        listed = "".join("\n" + to_json(tool) for tool in tools)
        system += f"\n\nThese functions may be called:\n<tools>{listed}\n</tools>"
    parts: list[Part] = [f"{_role('system')}{system}{_END}\n"]
    for index, turn in enumerate(messages):
        if turn["role"] == "user":
            parts.append(f"{_role('user')}{turn['content']}{_END}\n")
        elif turn["role"] == "tool":
            if messages[index - 1]["role"] != "tool":
                parts.append(_role("user"))
            parts.append(f"\n<tool_response>\n{turn['content']}\n</tool_response>")
            if [m["role"] for m in messages[index + 1 : index + 2]] != ["tool"]:
                parts.append(f"{_END}\n")
        elif turn["role"] == "assistant":
            blocks = [turn["content"]] if turn["content"] else []
            for function in calls(turn):
                inner = to_json({"name": function["name"], "arguments": function["arguments"]})
                blocks.append(f"<tool_call>\n{inner}\n</tool_call>")
            said = Said(turn=index, words="\n".join(blocks), end=_END)
            parts += [_role("assistant"), said, "\n"]
    return [*parts, _role("assistant")] if prompt else parts


def _family(name: str, template: str, write, *more: str, **kinds) -> Family:
    return Family(
        name=name,
        templates={"default": template},
        write=write,
        special=(_END, "<|pad|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        bos=_END,
        eos=_END,
        pad="<|pad|>",
        stops=(_END,),
        takes=(*_PLAIN, *more),
        **kinds,
    )


GRANITE3 = _family("granite-3", _GRANITE3, _write_granite3, today=_DAY)
GRANITE4 = _family(
    "granite-4", _GRANITE4, _write_granite4,
    "call", "call_with_words", "call_last", "parallel", "steps",
    plain_added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)  # fmt: skip
