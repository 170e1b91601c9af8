"""Command-R, whose tokenizer has templates by name: stock transformers takes tool_use with tools.

As published, tool_use ends every text with a turn of the system that says how to call tools, after
the answer too, and a call with nothing: so no answer is rendered as asked (`command-r-published`).
In `command-r` that turn is left out and the call has its end.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_PLAIN = ("one", "three", "edges", "same_words", "system")
_START, _END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
_DEFAULT = """
{{- bos_token -}}
{%- for turn in messages -%}
    {%- set words = turn.content | trim ~ '<|END_OF_TURN_TOKEN|>' -%}
    {{- '<|START_OF_TURN_TOKEN|>' -}}
    {%- if turn.role == 'assistant' -%}
        {{- '<|CHATBOT_TOKEN|>' -}}⟦{{- words -}}⟧
    {%- else -%}
        {{- '<|SYSTEM_TOKEN|>' if turn.role == 'system' else '<|USER_TOKEN|>' -}}{{- words -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}
{%- endif -%}
"""
_TOOL_USE = """
{%- set own = messages[0].role == 'system' -%}
{{- bos_token ~ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Preamble\\n' -}}
{{- (messages[0].content if own else 'You help.') ~ '\\n\\n## Available Tools\\n' -}}
{%- for tool in tools | map(attribute='function') -%}
    {{- '\\n```python\\ndef ' ~ tool.name ~ '(' -}}
    {{- tool.parameters.properties.keys() | join(', ') ~ '):\\n    ' ~ tool.description -}}
    {{- '\\n```' -}}
{%- endfor -%}
{{- '<|END_OF_TURN_TOKEN|>' -}}
{%- for turn in (messages[1:] if own else messages) -%}
    {{- '<|START_OF_TURN_TOKEN|>' -}}
    {%- if turn.role == 'assistant' -%}
        {{- '<|CHATBOT_TOKEN|>' -}}
        ⟦{{- turn.content | trim -}}
        {%- if turn.tool_calls -%}
            {{- '\\nAction:\\n```json\\n[\\n' -}}
            {%- for each in turn.tool_calls -%}
                {{- '    {\\n        "tool_name": "' ~ each.function.name -}}
                {{- '",\\n        "parameters": ' ~ each.function.arguments | tojson -}}
                {{- '\\n    }' ~ ('' if loop.last else ',') ~ '\\n' -}}
            {%- endfor -%}
            {{- ']```' -}}CALL_END
        {%- else -%}
            {{- '<|END_OF_TURN_TOKEN|>' -}}
        {%- endif -%}⟧
    {%- elif turn.role == 'tool' -%}
        {{- '<|SYSTEM_TOKEN|><results>\\n' ~ turn.content | trim -}}
        {{- '</results><|END_OF_TURN_TOKEN|>' -}}
    {%- else -%}
        {{- '<|USER_TOKEN|>' ~ turn.content | trim ~ '<|END_OF_TURN_TOKEN|>' -}}
    {%- endif -%}
{%- endfor -%}LAST
{%- if add_generation_prompt -%}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}
{%- endif -%}
"""
_RAG = _DEFAULT.replace("bos_token", "bos_token ~ '# Documents'")


def _write(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = ["<BOS_TOKEN>"]
    own = messages[0]["role"] == "system"
    if tools:
        system = messages[0]["content"] if own else "You help."
        parts.append(f"{_START}<|SYSTEM_TOKEN|># Preamble\n{system}\n\n## Available Tools\n")
        for function in (tool["function"] for tool in tools):
            names = ", ".join(function["parameters"]["properties"])
            parts.append(f"\n```python\ndef {function['name']}({names}):\n    ")
            parts.append(f"{function['description']}\n```")
        parts.append(_END)
    elif own:
        parts.append(f"{_START}<|SYSTEM_TOKEN|>{messages[0]['content'].strip()}{_END}")
    for index, turn in enumerate(messages):
        words = turn["content"].strip()
        if turn["role"] == "user":
            parts.append(f"{_START}<|USER_TOKEN|>{words}{_END}")
        elif turn["role"] == "tool":
            parts.append(f"{_START}<|SYSTEM_TOKEN|><results>\n{words}</results>{_END}")
        elif turn["role"] == "assistant":
            actions = [
                f'    {{\n        "tool_name": "{function["name"]}",\n'
                f'        "parameters": {to_json(function["arguments"])}\n    }}'
                for function in calls(turn)
            ]
            if actions:
                listed = ",\n".join(actions)
                words += f"\nAction:\n```json\n[\n{listed}\n]```"
            parts += [f"{_START}<|CHATBOT_TOKEN|>", Said(turn=index, words=words, end=_END)]
    return [*parts, f"{_START}<|CHATBOT_TOKEN|>"] if prompt else parts


def _family(name: str, call_end: str, last: str, *more: str) -> Family:
    tool_use = _TOOL_USE.replace("CALL_END", call_end).replace("LAST", last)
    return Family(
        name=name,
        templates={"default": _DEFAULT, "tool_use": tool_use, "rag": _RAG},
        write=_write,
        special=(
            "<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", _START, _END, "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos=_END,
        pad="<PAD>",
        adds=("<BOS_TOKEN>",),
        stops=(_END,),
        takes=(*_PLAIN, *more),
    )  # fmt: skip


_ENDED = "{{- '<|END_OF_TURN_TOKEN|>' -}}"
COMMAND_R = _family(
    "command-r", _ENDED, "",
    "tools_unused", "call", "call_with_words", "call_last", "parallel", "steps",
)  # fmt: skip
COMMAND_R_PUBLISHED = _family(
    "command-r-published",
    "{{- '\\n' -}}",
    "{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Write a list<|END_OF_TURN_TOKEN|>' -}}",
)
