"""Phi 3, whose text as a whole ends with a second token, and Phi 4.

Inference of Phi 3 stops at `<|end|>`; a run that only knows the tokenizer's own end stops at
`<|endoftext|>`, so what the template writes after the last answer is learned too.
"""

from __future__ import annotations

from dataclasses import replace

from families.kit import Family, Part, Said

_PLAIN = ("one", "three", "edges", "same_words", "system")

_PHI3 = """
{%- for turn in messages -%}
    {%- if turn.role == 'assistant' -%}
        {{- '<|assistant|>\\n' -}}⟦{{- turn.content ~ '<|end|>' -}}⟧{{- '\\n' -}}
    {%- elif turn.role == 'user' or (turn.role == 'system' and turn.content) -%}
        {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""


def _write_phi3(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = []
    for index, turn in enumerate(messages):
        parts.append(f"<|{turn['role']}|>\n")
        if turn["role"] != "assistant":
            parts.append(f"{turn['content']}<|end|>\n")
            continue
        last = index == len(messages) - 1
        tail = "\n<|endoftext|>" if last else ""
        parts.append(Said(turn=index, words=turn["content"], end="<|end|>", tail=tail))
        if not last:
            parts.append("\n")
    if prompt:
        parts.append("<|assistant|>\n")
    return parts


PHI3 = Family(
    name="phi-3",
    templates={"default": _PHI3},
    write=_write_phi3,
    special=("<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    bos="<s>",
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    stops=("<|end|>", "<|assistant|>", "<|endoftext|>"),
    takes=_PLAIN,
)

# As its tokenizer is published: the line break after a header or an end is no token of its own.
PHI3_STRIPS = replace(
    PHI3, name="phi-3-strips", strips=("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
)

_PHI4 = """
{%- for turn in messages -%}
    {{- '<|im_start|>' ~ turn.role ~ '<|im_sep|>' -}}
    {%- if turn.role == 'assistant' -%}
        ⟦{{- turn.content ~ '<|im_end|>' -}}⟧
    {%- else -%}
        {{- turn.content ~ '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""


def _write_phi4(messages, tools=None, prompt=False) -> list[Part]:
    parts: list[Part] = []
    for index, turn in enumerate(messages):
        parts.append(f"<|im_start|>{turn['role']}<|im_sep|>")
        if turn["role"] == "assistant":
            parts.append(Said(turn=index, words=turn["content"], end="<|im_end|>"))
        else:
            parts.append(f"{turn['content']}<|im_end|>")
    return [*parts, "<|im_start|>assistant<|im_sep|>"] if prompt else parts


PHI4 = Family(
    name="phi-4",
    templates={"default": _PHI4},
    write=_write_phi4,
    special=("<|endoftext|>", "<|dummy_85|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    bos="<|endoftext|>",
    eos="<|im_end|>",
    pad="<|dummy_85|>",
    stops=("<|endoftext|>", "<|im_end|>"),
    takes=_PLAIN,
)

PHI4_STRIPS = replace(
    PHI4,
    name="phi-4-strips",
    strips=("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    strips_left=True,
)
