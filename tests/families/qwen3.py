"""Qwen 3, which drops the reasoning of what came before the last question, and its kin.

The last turn gets a think block even without reasoning; the same turn later on has none. So every
answer before the last question is rewritten.
"""

from __future__ import annotations

from families.chatml import answered, called, offered
from families.kit import Family, Part, Said
from families.talks import TALKS

_START, _END = "<|im_start|>", "<|im_end|>"

# OPENED: whether the generation prompt opens the think block, as of models that always think.
_QWEN3 = """
{%- macro called(turn, words) -%}
    {%- for each in turn.tool_calls -%}
        {%- set f = each.function if each.function is defined else each -%}
        {{- '' if loop.first and not words else '\\n' -}}
        {{- '<tool_call>\\n{"name": "' ~ f.name ~ '", "arguments": ' -}}
        {{- f.arguments if f.arguments is string else f.arguments | tojson -}}
        {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set own = messages[0].role == 'system' -%}
{%- if own or tools -%}
    {{- '<|im_start|>system\\n' ~ (messages[0].content if own else '') -}}
    {%- if tools -%}
        {{- ('\\n\\n' if own else '') ~ '# Tools\\n\\nThese functions may be called:\\n<tools>' -}}
        {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
        {{- '\\n</tools>\\n\\nAnswer a call as JSON inside of <tool_call></tool_call>.' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- set asked = namespace(last=messages | length - 1) -%}
{%- set found = namespace(it=false) -%}
{%- for turn in messages | reverse -%}
    {%- if not found.it and turn.role == 'user' and not (turn.content.startswith('<tool_response>')
            and turn.content.endswith('</tool_response>')) -%}
        {%- set found.it = true -%}
        {%- set asked.last = loop.revindex0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
    {%- if turn.role == 'user' or (turn.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
    {%- elif turn.role == 'assistant' -%}
        {%- set words = turn.content -%}
        {%- set thought = '' -%}
        {%- if turn.reasoning_content is string -%}
            {%- set thought = turn.reasoning_content -%}
        {%- elif '</think>' in words -%}
            {%- set thought = words.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set words = words.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {%- set thinks = loop.index0 > asked.last and (loop.last or thought) -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if thinks and OPENED -%}{{- '<think>\\n' -}}{%- endif -%}
        ⟦
        {%- if thinks -%}
            {{- ('' if OPENED else '<think>\\n') ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' -}}
            {{- words.lstrip('\\n') -}}
        {%- else -%}
            {{- words -}}
        {%- endif -%}
        {{- called(turn, words) -}}{{- '<|im_end|>' -}}
        ⟧
        {{- '\\n' -}}
    {%- elif turn.role == 'tool' -%}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' -}}
        {%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if OPENED -%}
        {{- '<think>\\n' -}}
    {%- elif enable_thinking is defined and not enable_thinking -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def _writer(opened: bool):
    def write(messages, tools=None, prompt=False) -> list[Part]:
        own = messages[0]["role"] == "system"
        system = [messages[0]["content"]] if own else []
        system += [offered(tools)] if tools else []
        parts: list[Part] = []
        if system:
            parts.append(f"{_START}system\n" + "\n\n".join(system) + f"{_END}\n")
        question = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
        for index, turn in enumerate(messages):
            if turn["role"] == "user":
                parts.append(f"{_START}user\n{turn['content']}{_END}\n")
            elif turn["role"] == "tool":
                parts.append(answered(messages, index))
            elif turn["role"] == "assistant":
                thought, last = turn.get("reasoning_content", ""), index == len(messages) - 1
                words, given = called(turn), f"{_START}assistant\n"
                if index > question and (last or thought):
                    words = f"{thought}\n</think>\n\n{words}"
                    if opened:
                        given += "<think>\n"
                    else:
                        words = "<think>\n" + words
                parts += [given, Said(turn=index, words=words, end=_END), "\n"]
        if prompt:
            parts.append(f"{_START}assistant\n" + ("<think>\n" if opened else ""))
        return parts

    return write


def _family(name: str, opened: bool) -> Family:
    return Family(
        name=name,
        templates={"default": _QWEN3.replace("OPENED", str(opened).lower())},
        write=_writer(opened),
        special=("<|endoftext|>", _START, _END),
        plain_added=(
            "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
            "<think>", "</think>",
        ),
        bos=None,
        eos=_END,
        pad="<|endoftext|>",
        stops=(_END, "<|endoftext|>"),
        takes=tuple(TALKS),
    )  # fmt: skip


QWEN3 = _family("qwen3", opened=False)
QWEN3_THINKING = _family("qwen3-thinking", opened=True)
