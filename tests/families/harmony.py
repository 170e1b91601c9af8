"""Harmony, the format of gpt-oss: channels, an end for the last answer and another for the earlier.

The prompt ends with `<|start|>assistant`, so the channel is generated. `<|return|>` ends the last
answer and `<|end|>` the same answer later on: each answer is rewritten. Reasoning beside a call is
there until an answer follows the results, and then no more, not even in the conversation that ends
with that answer: what it is asked after is then in no rendering.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, calls, to_json

_DAY = "2024-07-26"

_HARMONY = """
{{- '<|start|>system<|message|>You are a model.\\nKnowledge cutoff: 2024-06\\nCurrent date: ' -}}
{{- strftime_now('%Y-%m-%d') ~ '\\n\\nReasoning: ' ~ (reasoning_effort or 'medium') -}}
{{- '\\n\\n# Valid channels: analysis, commentary, final.' -}}
{{- "\\nCalls go to the commentary channel: 'functions'." if tools else '' -}}{{- '<|end|>' -}}
{%- set own = messages[0].role == 'system' or messages[0].role == 'developer' -%}
{%- set turns = messages[1:] if own else messages -%}
{%- if own or tools -%}
    {{- '<|start|>developer<|message|>' -}}
    {%- if own -%}{{- '# Instructions\\n\\n' ~ messages[0].content ~ '\\n\\n' -}}{%- endif -%}
    {%- if tools -%}
        {{- '# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n' -}}
        {%- for tool in tools | map(attribute='function') -%}
            {{- '// ' ~ tool.description ~ '\\ntype ' ~ tool.name ~ ' = (_: {\\n' -}}
            {%- for key, what in tool.parameters.properties.items() -%}
                {{- key ~ ': ' ~ what.type ~ ',\\n' -}}
            {%- endfor -%}
            {{- '}) => any;\\n\\n' -}}
        {%- endfor -%}
        {{- '} // namespace functions' -}}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endif -%}
{%- set called = namespace(name='') -%}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- '<|start|>user<|message|>' ~ turn.content ~ '<|end|>' -}}
    {%- elif turn.role == 'tool' -%}
        {{- '<|start|>functions.' ~ called.name ~ ' to=assistant<|channel|>commentary' -}}
        {{- '<|message|>' ~ turn.content | tojson ~ '<|end|>' -}}
    {%- elif 'tool_calls' in turn -%}
        {%- if turn.content and turn.thinking -%}
            {{- raise_exception('content or thinking beside a call, not both') -}}
        {%- endif -%}
        {%- set answer = namespace(follows=false) -%}
        {%- for later in turns[loop.index:] -%}
            {%- if later.role == 'assistant' and 'tool_calls' not in later -%}
                {%- set answer.follows = true -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set thought = turn.content or turn.thinking -%}
        {%- set f = turn.tool_calls[0].function -%}
        {%- set called.name = f.name -%}
        {{- '<|start|>assistant' -}}
        ⟦
        {%- if thought and not answer.follows -%}
            {{- '<|channel|>analysis<|message|>' ~ thought ~ '<|end|><|start|>assistant' -}}
        {%- endif -%}
        {{- ' to=functions.' ~ f.name ~ '<|channel|>commentary json<|message|>' -}}
        {{- f.arguments | tojson ~ '<|call|>' -}}
        ⟧
    {%- elif turn.role == 'assistant' -%}
        {%- set ends = loop.last and not add_generation_prompt -%}
        {{- '<|start|>assistant' -}}
        ⟦
        {%- if ends and 'thinking' in turn -%}
            {{- '<|channel|>analysis<|message|>' ~ turn.thinking ~ '<|end|><|start|>assistant' -}}
        {%- endif -%}
        {{- '<|channel|>final<|message|>' ~ turn.content -}}
        {{- '<|return|>' if ends else '<|end|>' -}}
        ⟧
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


def _thought(text: str) -> str:
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


def _start(messages, tools) -> str:
    text = (
        "<|start|>system<|message|>You are a model.\nKnowledge cutoff: 2024-06\n"
        f"Current date: {_DAY}\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final."
    )
    if tools:
        text += "\nCalls go to the commentary channel: 'functions'."
    text += "<|end|>"
    said = []
    if messages[0]["role"] == "system":
        said.append(f"# Instructions\n\n{messages[0]['content']}\n\n")
    if tools:
        said.append("# Tools\n\n## functions\n\nnamespace functions {\n\n")
        for function in (tool["function"] for tool in tools):
            fields = function["parameters"]["properties"].items()
            lines = "".join(f"{name}: {what['type']},\n" for name, what in fields)
            said.append(f"// {function['description']}\ntype {function['name']} = (_: {{\n")
            said.append(lines + "}) => any;\n\n")
        said.append("} // namespace functions")
    return f"{text}<|start|>developer<|message|>{''.join(said)}<|end|>" if said else text


def _write(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = [_start(messages, tools)]
    called = ""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not calls(m)]
    for index, turn in enumerate(messages):
        if turn["role"] == "user":
            parts.append(f"<|start|>user<|message|>{turn['content']}<|end|>")
        elif turn["role"] == "tool":
            parts.append(f"<|start|>functions.{called} to=assistant<|channel|>commentary")
            parts.append(f"<|message|>{to_json(turn['content'])}<|end|>")
        elif turn["role"] == "assistant":
            thought = turn.get("thinking", "")
            if calls(turn):
                (function,) = calls(turn)
                called, thought = function["name"], thought or turn["content"]
                answered = bool(answers) and answers[-1] > index
                words = _thought(thought) if thought and not answered else ""
                words += f" to=functions.{called}<|channel|>commentary json<|message|>"
                words += to_json(function["arguments"])
                end = "<|call|>"
            else:
                last = index == len(messages) - 1
                words = _thought(thought) if thought and last else ""
                words += f"<|channel|>final<|message|>{turn['content']}"
                end = "<|return|>" if last else "<|end|>"
            parts += ["<|start|>assistant", Said(turn=index, words=words, end=end)]
    return [*parts, "<|start|>assistant"] if prompt else parts


HARMONY = Family(
    name="gpt-oss",
    templates={"default": _HARMONY},
    write=_write,
    special=(
        "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
        "<|start|>", "<|end|>", "<|message|>", "<|call|>",
    ),
    bos="<|startoftext|>",
    eos="<|return|>",
    pad="<|endoftext|>",
    stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    takes=(
        "one", "three", "edges", "same_words", "system", "tools_unused", "call",
        "call_with_words", "call_last", "steps", "reasoning", "reasoning_three",
        "reasoning_steps",
    ),
    unseen=("call_with_words", "reasoning_steps"),
    reasoning_key="thinking",
    today=_DAY,
)  # fmt: skip
