"""ChatML, and Qwen 2.5 on it: a role, a line break, the words, one end for every turn.

What a turn generates begins after `<|im_start|>assistant` and its line break, and the line break
after `<|im_end|>` is never asked for.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_PLAIN = ("one", "three", "edges", "same_words", "system")
_START, _END = "<|im_start|>", "<|im_end|>"

_CHATML = """
{%- for turn in messages -%}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' -}}
    {%- if turn.role == 'assistant' -%}
        ⟦{{- turn.content ~ '<|im_end|>' -}}⟧
    {%- else -%}
        {{- turn.content ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _write_chatml(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = []
    for index, turn in enumerate(messages):
        parts.append(f"{_START}{turn['role']}\n")
        if turn["role"] == "assistant":
            parts += [Said(turn=index, words=turn["content"], end=_END), "\n"]
        else:
            parts.append(f"{turn['content']}{_END}\n")
    return [*parts, f"{_START}assistant\n"] if prompt else parts


CHATML = Family(
    name="chatml",
    templates={"default": _CHATML},
    write=_write_chatml,
    special=("<|endoftext|>", _START, _END),
    bos=None,
    eos=_END,
    pad="<|endoftext|>",
    stops=(_END,),
    takes=_PLAIN,
)

# A default system turn; tools in the system turn, calls as JSON in tags, answers of tools grouped
# in one user turn.
_QWEN25 = """
{%- macro called(turn) -%}
    {%- for each in turn.tool_calls -%}
        {%- set f = each.function if each.function is defined else each -%}
        {{- '' if loop.first and not turn.content else '\\n' -}}
        {{- '<tool_call>\\n{"name": "' ~ f.name ~ '", "arguments": ' -}}
        {{- f.arguments | tojson -}}
        {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set own = messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' ~ (messages[0].content if own else 'You help.') -}}
{%- if tools -%}
    {{- '\\n\\n# Tools\\n\\nThese functions may be called:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nAnswer a call as JSON inside of <tool_call></tool_call>.' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' or (turn.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        ⟦{{- turn.content -}}{{- called(turn) -}}{{- '<|im_end|>' -}}⟧
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
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def offered(tools) -> str:
    """What Qwen's system turns say of tools, after the system text and its blank line."""
    listed = "".join("\n" + to_json(tool) for tool in tools)
    return (
        f"# Tools\n\nThese functions may be called:\n<tools>{listed}\n</tools>\n\n"
        "Answer a call as JSON inside of <tool_call></tool_call>."
    )


def called(turn) -> str:
    """The words of a turn and its calls, as Qwen writes them."""
    blocks = [turn["content"]] if turn["content"] else []
    for function in calls(turn):
        body = f'"name": "{function["name"]}", "arguments": {to_json(function["arguments"])}'
        blocks.append(f"<tool_call>\n{{{body}}}\n</tool_call>")
    return "\n".join(blocks)


def answered(messages, index) -> str:
    """The answer of a tool; several in a row stand in one user turn."""
    text = f"\n<tool_response>\n{messages[index]['content']}\n</tool_response>"
    if messages[index - 1]["role"] != "tool":
        text = f"{_START}user{text}"
    after = messages[index + 1 : index + 2]
    return text if after and after[0]["role"] == "tool" else f"{text}{_END}\n"


def _write_qwen25(messages, tools=None, prompt=False) -> list[Part]:
    own = messages[0]["role"] == "system"
    system = messages[0]["content"] if own else "You help."
    if tools:
        system += "\n\n" + offered(tools)
    parts: list[Part] = [f"{_START}system\n{system}{_END}\n"]
    for index, turn in enumerate(messages):
        if turn["role"] == "user":
            parts.append(f"{_START}user\n{turn['content']}{_END}\n")
        elif turn["role"] == "assistant":
            parts.append(f"{_START}assistant\n")
            parts += [Said(turn=index, words=called(turn), end=_END), "\n"]
        elif turn["role"] == "tool":
            parts.append(answered(messages, index))
    return [*parts, f"{_START}assistant\n"] if prompt else parts


QWEN25 = Family(
    name="qwen2.5",
    templates={"default": _QWEN25},
    write=_write_qwen25,
    special=("<|endoftext|>", _START, _END),
    plain_added=("<tool_call>", "</tool_call>"),
    bos=None,
    eos=_END,
    pad="<|endoftext|>",
    stops=(_END, "<|endoftext|>"),
    takes=(*_PLAIN, "tools_unused", "call", "call_with_words", "call_last", "parallel", "steps"),
)
