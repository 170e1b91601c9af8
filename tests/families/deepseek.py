"""DeepSeek's models: two that reason, of which one keeps the last answer's reasoning, and V3.1.

An answer after the results of tools has no header. R1's prompt opens the think block, and its
template, as published, drops all that was thought from every answer: none in it begins as asked. In
`r1-kept` the last answer keeps its own. Neither flags its headers as special tokens.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_BOS, _END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# DROPS: of which answers the reasoning is left out.
_R1 = """
{%- set own = messages[0].role == 'system' -%}
{{- bos_token ~ (messages[0].content if own else '') -}}
{%- if tools -%}
    {{- '\\n\\n## Tools' -}}
    {%- for tool in tools -%}{{- '\\n' ~ tool | tojson -}}{%- endfor -%}
{%- endif -%}
{%- for turn in messages -%}
    {%- set after_tool = loop.previtem is defined and loop.previtem.role == 'tool' -%}
    {%- if turn.role == 'user' -%}
        {{- '<｜User｜>' ~ turn.content -}}
    {%- elif turn.role == 'tool' -%}
        {{- '\\n' if after_tool else '<｜tool▁outputs▁begin｜>' -}}
        {{- '<｜tool▁output▁begin｜>' ~ turn.content ~ '<｜tool▁output▁end｜>' -}}
        {%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' -%}
            {{- '<｜tool▁outputs▁end｜>' -}}
        {%- endif -%}
    {%- elif turn.role == 'assistant' -%}
        {%- set words = turn.content.split('</think>')[-1] if DROPS else turn.content -%}
        {{- '' if after_tool else '<｜Assistant｜>' -}}
        {%- if words.startswith('<think>\\n') and not after_tool -%}
            {%- set words = words[8:] -%}
            {{- '<think>\\n' -}}
        {%- endif -%}
        ⟦{{- words -}}
        {%- for each in turn.tool_calls -%}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' -}}
            {{- '<｜tool▁call▁begin｜>' ~ each.type ~ '<｜tool▁sep｜>' ~ each.function.name -}}
            {{- '\\n```json\\n' ~ each.function.arguments | tojson -}}
            {{- '\\n```<｜tool▁call▁end｜>' -}}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
        {%- endfor -%}
        {{- '<｜end▁of▁sentence｜>' -}}⟧
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
    {{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""


def _start(messages, tools) -> str:
    own = messages[0]["role"] == "system"
    listed = "".join("\n" + to_json(tool) for tool in tools or ())
    text = _BOS + (messages[0]["content"] if own else "")
    return f"{text}\n\n## Tools{listed}" if tools else text


def _write_r1(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = [_start(messages, tools)]
    for index, turn in enumerate(messages):
        before = messages[index - 1]["role"] if index else ""
        after = messages[index + 1]["role"] if index + 1 < len(messages) else ""
        if turn["role"] == "user":
            parts.append(_USER + turn["content"])
        elif turn["role"] == "tool":
            parts.append("\n" if before == "tool" else "<｜tool▁outputs▁begin｜>")
            parts.append(f"<｜tool▁output▁begin｜>{turn['content']}<｜tool▁output▁end｜>")
            parts.append("" if after == "tool" else "<｜tool▁outputs▁end｜>")
        elif turn["role"] == "assistant":
            words = turn["content"]
            if after:
                words = words.rpartition("</think>")[2]
            if before != "tool":
                thinks = words.startswith("<think>\n")
                parts.append(_ASSISTANT + ("<think>\n" if thinks else ""))
                words = words.removeprefix("<think>\n")
            blocks = [
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{function['name']}\n```json\n"
                f"{to_json(function['arguments'])}\n```<｜tool▁call▁end｜>"
                for function in calls(turn)
            ]
            if blocks:
                words += f"<｜tool▁calls▁begin｜>{chr(10).join(blocks)}<｜tool▁calls▁end｜>"
            parts.append(Said(turn=index, words=words, end=_END))
    if prompt and messages[-1]["role"] != "tool":
        parts.append(_ASSISTANT + "<think>\n")
    return parts


_V31 = """
{%- set own = messages[0].role == 'system' -%}
{%- set thinks = thinking is defined and thinking -%}
{{- bos_token ~ (messages[0].content if own else '') -}}
{%- if tools -%}
    {{- '\\n\\n## Tools' -}}
    {%- for tool in tools -%}{{- '\\n' ~ tool | tojson -}}{%- endfor -%}
{%- endif -%}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- '<｜User｜>' ~ turn.content -}}
    {%- elif turn.role == 'tool' -%}
        {{- '<｜tool▁output▁begin｜>' ~ turn.content ~ '<｜tool▁output▁end｜>' -}}
    {%- elif turn.role == 'assistant' -%}
        {%- if loop.previtem.role == 'user' -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
        ⟦{{- turn.content.split('</think>')[-1] -}}
        {%- for each in turn.tool_calls -%}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '' -}}
            {{- '<｜tool▁call▁begin｜>' ~ each.function.name ~ '<｜tool▁sep｜>' -}}
            {{- each.function.arguments | tojson ~ '<｜tool▁call▁end｜>' -}}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
        {%- endfor -%}
        {{- '<｜end▁of▁sentence｜>' -}}⟧
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role == 'user' -%}
    {{- '<｜Assistant｜>' ~ ('<think>' if thinks else '</think>') -}}
{%- endif -%}
"""


def _write_v31(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = [_start(messages, tools)]
    for index, turn in enumerate(messages):
        if turn["role"] == "user":
            parts.append(_USER + turn["content"])
        elif turn["role"] == "tool":
            parts.append(f"<｜tool▁output▁begin｜>{turn['content']}<｜tool▁output▁end｜>")
        elif turn["role"] == "assistant":
            if messages[index - 1]["role"] == "user":
                parts.append(_ASSISTANT + "</think>")
            blocks = [
                f"<｜tool▁call▁begin｜>{function['name']}<｜tool▁sep｜>"
                f"{to_json(function['arguments'])}<｜tool▁call▁end｜>"
                for function in calls(turn)
            ]
            words = turn["content"]
            if blocks:
                words += f"<｜tool▁calls▁begin｜>{''.join(blocks)}<｜tool▁calls▁end｜>"
            parts.append(Said(turn=index, words=words, end=_END))
    if prompt and messages[-1]["role"] == "user":
        parts.append(_ASSISTANT + "</think>")
    return parts


def _family(name: str, template: str, write, *takes: str) -> Family:
    return Family(
        name=name,
        templates={"default": template},
        write=write,
        special=(_BOS, _END, "<｜▁pad▁｜>"),
        plain_added=(
            _USER, _ASSISTANT, "<think>", "</think>",
            "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
            "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
        ),
        bos=_BOS,
        eos=_END,
        pad="<｜▁pad▁｜>",
        adds=(_BOS,),
        stops=(_END,),
        takes=takes,
        reasoning_key="content",
    )  # fmt: skip


DEEPSEEK_R1 = _family("deepseek-r1", _R1.replace("DROPS", "true"), _write_r1)
DEEPSEEK_R1_KEPT = _family(
    "deepseek-r1-kept", _R1.replace("DROPS", "not loop.last"), _write_r1,
    "reasoning", "reasoning_three", "reasoning_steps",
)  # fmt: skip
DEEPSEEK_V31 = _family(
    "deepseek-v3.1", _V31, _write_v31,
    "one", "three", "edges", "same_words", "system", "tools_unused", "call", "call_with_words",
    "call_last", "parallel", "steps",
)  # fmt: skip
