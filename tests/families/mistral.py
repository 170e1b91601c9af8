"""Mistral's templates of three ages: there is no header of an answer, and `</s>` ends each.

The third version puts the system text into the last user turn, the seventh at the start; tools
stand before the last user turn in both. So what comes before an earlier answer is rewritten. Calls
have ids of nine characters.
"""

from __future__ import annotations

from families.kit import Family, Part, Said, to_json
from families.talks import TALKS

_PLAIN = ("one", "three", "edges", "same_words", "system")
_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>",
)  # fmt: skip
_REASONING = {"reasoning", "reasoning_three", "reasoning_steps"}

# SPACE: a blank after each mark and before an answer, of the tokenizers before Tekken.
# SYSTEM_HERE: of which user turn the system text is a part.
_V3 = """
{%- macro known(id) -%}
    {%- if id is not defined or id | length != 9 -%}
        {{- raise_exception('The id of a call has 9 characters') -}}
    {%- endif -%}
    {{- id -}}
{%- endmacro -%}
{%- set own = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if own else messages -%}
{%- set questions = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set count = namespace(n=0) -%}
{%- for turn in turns if turn.role != 'tool' and not turn.tool_calls -%}
    {%- if (turn.role == 'user') != (count.n % 2 == 0) -%}
        {{- raise_exception('user and assistant have to take turns') -}}
    {%- endif -%}
    {%- set count.n = count.n + 1 -%}
{%- endfor -%}
{{- bos_token -}}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {%- if tools and turn == questions[-1] -%}
            {{- '[AVAILABLE_TOOLS]SPACE' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]SPACE' -}}
        {%- if own and SYSTEM_HERE -%}{{- messages[0].content ~ '\\n\\n' -}}{%- endif -%}
        {{- turn.content ~ '[/INST]' -}}
    {%- elif turn.tool_calls -%}
        ⟦{{- '[TOOL_CALLS]SPACE[' -}}
        {%- for each in turn.tool_calls -%}
            {{- (each.function | tojson)[:-1] ~ ', "id": "' ~ known(each.id) ~ '"}' -}}
            {{- '' if loop.last else ', ' -}}
        {%- endfor -%}
        {{- ']' ~ eos_token -}}⟧
    {%- elif turn.role == 'assistant' -%}
        ⟦{{- 'SPACE' ~ turn.contentTRIM ~ eos_token -}}⟧
    {%- elif turn.role == 'tool' -%}
        {{- '[TOOL_RESULTS]SPACE{"content": ' ~ turn.content ~ ', "call_id": "' -}}
        {{- known(turn.tool_call_id) ~ '"}[/TOOL_RESULTS]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def _called(turn) -> str:
    listed = [
        to_json({**call["function"], "id": call["id"]}) for call in turn.get("tool_calls", ())
    ]
    return "[" + ", ".join(listed) + "]"


def _v3_writer(space: str, *, system_only_when_asked: bool):
    def write(messages, tools=None, prompt=False) -> list[Part]:
        own = messages[0]["role"] == "system"
        asked = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
        with_system = asked if own else None
        if system_only_when_asked and asked != len(messages) - 1:
            with_system = None
        parts: list[Part] = ["<s>"]
        for index, turn in enumerate(messages):
            if turn["role"] == "user":
                if tools and index == asked:
                    parts.append(f"[AVAILABLE_TOOLS]{space}{to_json(tools)}[/AVAILABLE_TOOLS]")
                system = messages[0]["content"] + "\n\n" if index == with_system else ""
                parts.append(f"[INST]{space}{system}{turn['content']}[/INST]")
            elif turn["role"] == "tool":
                answer = f'"content": {turn["content"]}, "call_id": "{turn["tool_call_id"]}"'
                parts.append(f"[TOOL_RESULTS]{space}{{{answer}}}[/TOOL_RESULTS]")
            elif turn["role"] == "assistant":
                words = space + (turn["content"].strip() if space else turn["content"])
                if turn.get("tool_calls"):
                    words = f"[TOOL_CALLS]{space}{_called(turn)}"
                parts.append(Said(turn=index, words=words, end="</s>"))
        return parts

    return write


def _v3(name: str, space: str, *, here: str, **more) -> Family:
    template = _V3.replace("SPACE", space).replace("SYSTEM_HERE", here)
    return Family(
        name=name,
        templates={"default": template.replace("TRIM", " | trim" if space else "")},
        write=_v3_writer(space, system_only_when_asked=here == "loop.last"),
        special=_SPECIAL,
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        adds=("<s>",),
        stops=("</s>",),
        takes=tuple(name for name in TALKS if name not in {*_REASONING, "call_with_words"}),
        **more,
    )


MISTRAL_V3 = _v3("mistral-v3", " ", here="turn == questions[-1]")
# As it is published: the system text is there only while the last turn is the user's, so in no
# conversation that has its answer.
MISTRAL_NEMO = _v3("mistral-nemo", "", here="loop.last", unseen=("system", "steps"))

_V7 = """
{%- set own = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if own else messages -%}
{%- set questions = turns | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- if own -%}{{- '[SYSTEM_PROMPT]' ~ messages[0].content ~ '[/SYSTEM_PROMPT]' -}}{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {%- if tools and turn == questions[-1] -%}
            {{- '[AVAILABLE_TOOLS]' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' ~ turn.content ~ '[/INST]' -}}
    {%- elif turn.role == 'assistant' -%}
        ⟦{{- turn.content -}}
        {%- if turn.tool_calls -%}
            {{- '[TOOL_CALLS][' -}}
            {%- for each in turn.tool_calls -%}
                {%- if each.id is not defined or each.id | length != 9 -%}
                    {{- raise_exception('The id of a call has 9 characters') -}}
                {%- endif -%}
                {{- (each.function | tojson)[:-1] ~ ', "id": "' ~ each.id ~ '"}' -}}
                {{- ']' if loop.last else ', ' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- eos_token -}}⟧
    {%- elif turn.role == 'tool' -%}
        {{- '[TOOL_RESULTS]' ~ turn.tool_call_id ~ '[TOOL_CONTENT]' ~ turn.content -}}
        {{- '[/TOOL_RESULTS]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def _write_v7(messages, tools=None, prompt=False) -> list[Part]:
    asked = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
    parts: list[Part] = ["<s>"]
    for index, turn in enumerate(messages):
        content = turn["content"]
        if turn["role"] == "system":
            parts.append(f"[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]")
        elif turn["role"] == "user":
            if tools and index == asked:
                parts.append(f"[AVAILABLE_TOOLS]{to_json(tools)}[/AVAILABLE_TOOLS]")
            parts.append(f"[INST]{content}[/INST]")
        elif turn["role"] == "tool":
            parts.append(f"[TOOL_RESULTS]{turn['tool_call_id']}[TOOL_CONTENT]{content}")
            parts.append("[/TOOL_RESULTS]")
        else:
            words = f"{content}[TOOL_CALLS]{_called(turn)}" if "tool_calls" in turn else content
            parts.append(Said(turn=index, words=words, end="</s>"))
    return parts


MISTRAL_V7 = Family(
    name="mistral-v7",
    templates={"default": _V7},
    write=_write_v7,
    special=(*_SPECIAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    adds=("<s>",),
    stops=("</s>",),
    takes=tuple(name for name in TALKS if name not in _REASONING),
)
