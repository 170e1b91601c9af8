"""Llama 3, and Llama 3.1 and 3.2 with tools: a header, a blank line, trimmed words, `<|eot_id|>`.

The tokenizer and the template both write the start token. `<|eom_id|>` ends a turn of the built-in
tools alone, which no conversation here has.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_BOS, _END = "<|begin_of_text|>", "<|eot_id|>"
_PLAIN = ("one", "three", "edges", "same_words", "system")
DAY = "26 Jul 2024"


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_LLAMA3 = """
{%- for turn in messages -%}
    {{- bos_token if loop.first else '' -}}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' -}}
    {%- if turn.role == 'assistant' -%}
        ⟦{{- turn.content | trim ~ '<|eot_id|>' -}}⟧
    {%- else -%}
        {{- turn.content | trim ~ '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def _write_llama3(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = [_BOS]
    for index, turn in enumerate(messages):
        words = turn["content"].strip()
        parts.append(_header(turn["role"]))
        is_said = turn["role"] == "assistant"
        parts.append(Said(turn=index, words=words, end=_END) if is_said else words + _END)
    return [*parts, _header("assistant")] if prompt else parts


LLAMA3 = Family(
    name="llama-3",
    templates={"default": _LLAMA3},
    write=_write_llama3,
    special=_SPECIAL,
    bos=_BOS,
    eos=_END,
    pad="<|finetune_right_pad_id|>",
    adds=(_BOS,),
    stops=("<|end_of_text|>", _END),
    takes=_PLAIN,
)

# A system turn with the day in any case; tools in the first user turn; one call a turn, without
# words beside it; a tool's answer quoted as JSON.
_LLAMA32 = """
{{- bos_token -}}
{%- if date_string is not defined -%}
    {%- if strftime_now is defined -%}
        {%- set date_string = strftime_now('%d %b %Y') -%}
    {%- else -%}
        {%- set date_string = '26 Jul 2024' -%}
    {%- endif -%}
{%- endif -%}
{%- set own = messages[0].role == 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Environment: ipython\\n' if tools else '' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ date_string ~ '\\n\\n' -}}
{{- (messages[0].content | trim if own else '') ~ '<|eot_id|>' -}}
{%- for turn in (messages[1:] if own else messages) -%}
    {%- if turn.role == 'tool' or turn.role == 'ipython' -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' -}}
        {{- turn.content | tojson ~ '<|eot_id|>' -}}
    {%- elif 'tool_calls' in turn -%}
        {%- if turn.tool_calls | length != 1 -%}
            {{- raise_exception('One call a turn is all that this model makes') -}}
        {%- endif -%}
        {%- set f = turn.tool_calls[0].function -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        ⟦{{- '{"name": "' ~ f.name ~ '", "parameters": ' -}}
        {{- f.arguments | tojson ~ '}<|eot_id|>' -}}⟧
    {%- elif turn.role == 'assistant' -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        ⟦{{- turn.content | trim ~ '<|eot_id|>' -}}⟧
    {%- else -%}
        {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' -}}
        {%- if loop.first and tools -%}
            {{- 'Answer with JSON, {"name": ..., "parameters": ...}, to call one of:\\n\\n' -}}
            {%- for tool in tools -%}{{- tool | tojson(indent=4) ~ '\\n\\n' -}}{%- endfor -%}
        {%- endif -%}
        {{- turn.content | trim ~ '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def _write_llama32(messages, tools=None, prompt=False) -> list[Part]:
    own = messages[0]["role"] == "system"
    system = messages[0]["content"].strip() if own else ""
    where = "Environment: ipython\n" if tools else ""
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DAY}\n\n"
    parts: list[Part] = [_BOS, _header("system"), where, dates, system, _END]
    for index, turn in enumerate(messages):
        if turn["role"] == "tool":
            parts.append(_header("ipython") + to_json(turn["content"]) + _END)
        elif turn["role"] == "user":
            parts.append(_header("user"))
            if tools and index == own:
                parts.append('Answer with JSON, {"name": ..., "parameters": ...}, to call one of:')
                parts += ["\n\n" + to_json(tool, indent=4) for tool in tools]
                parts.append("\n\n")
            parts.append(turn["content"].strip() + _END)
        elif turn["role"] == "assistant":
            words = turn["content"].strip()
            if functions := calls(turn):
                (function,) = functions
                inner = to_json(function["arguments"])
                words = f'{{"name": "{function["name"]}", "parameters": {inner}}}'
            parts += [_header("assistant"), Said(turn=index, words=words, end=_END)]
    return [*parts, _header("assistant")] if prompt else parts


LLAMA32 = Family(
    name="llama-3.2",
    templates={"default": _LLAMA32},
    write=_write_llama32,
    special=_SPECIAL,
    bos=_BOS,
    eos=_END,
    pad="<|finetune_right_pad_id|>",
    adds=(_BOS,),
    stops=("<|end_of_text|>", "<|eom_id|>", _END),
    takes=(*_PLAIN, "tools_unused", "call", "call_last", "steps"),
    today=DAY,
)
