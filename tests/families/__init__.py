"""Stand-ins for today's families of chat models, and what is right to learn of a conversation.

`FAMILIES` has them by name. Of each: its chat template, written anew with the structure of the real
one, with and without marks of generation; which tokens it has and where inference stops; and, by
hand and without Jinja, how a conversation is written and which of it is learned:

    family = FAMILIES["qwen3"]
    messages, tools = family.talk("call")     # a conversation of `TALKS`, in the family's keys
    family.takes, family.refused              # talks it lays out, and those it cannot
    family.unseen                             # of those it takes: never rendered as asked
    family.tokenizer(marked=False)            # a small real tokenizer with the template
    family.template(marked=True, tools=True)  # the Jinja text
    family.text(messages, tools, prompt=False)  # what the template has to write
    family.mark(messages, tools)              # ["<|im_start|>user...«4<|im_end|>»", ...]
    family.samples(messages, tools)           # the same with the turns each sample is of

Learned is all that the model generates after its prompt, up to the token at which inference stops
(of Phi 3 the text's last token too, unless `tail=False`, as its marks of generation have it). A
template that rewrites earlier turns makes several samples of a conversation: first the whole, then
its parts `messages[:n]`, from long to short. Each assistant turn is learned once, in the longest in
which it is as it was generated, after what was asked. A marked text ends at its last »; what the
template writes after that is not in it. Where tokens swallow blanks (`family.strips`),
`family.decoded(marked)` is what its tokens decode to.
"""

from __future__ import annotations

from families.chatml import CHATML, QWEN25
from families.command import COMMAND_R, COMMAND_R_PUBLISHED
from families.deepseek import DEEPSEEK_R1, DEEPSEEK_R1_KEPT, DEEPSEEK_V31
from families.gemma import GEMMA2, GEMMA3
from families.glm import GLM4, GLM45
from families.granite import GRANITE3, GRANITE4
from families.harmony import HARMONY
from families.kit import Family, Sample
from families.llama import LLAMA3, LLAMA32
from families.mistral import MISTRAL_NEMO, MISTRAL_V3, MISTRAL_V7
from families.phi import PHI3, PHI3_STRIPS, PHI4, PHI4_STRIPS
from families.qwen3 import QWEN3, QWEN3_THINKING
from families.talks import TALKS, TOOLS

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        CHATML, QWEN25, QWEN3, QWEN3_THINKING, LLAMA3, LLAMA32, PHI3, PHI3_STRIPS, PHI4,
        PHI4_STRIPS, GLM4, GLM45, MISTRAL_V3, MISTRAL_NEMO, MISTRAL_V7, GEMMA2, GEMMA3,
        DEEPSEEK_R1, DEEPSEEK_R1_KEPT, DEEPSEEK_V31, HARMONY, COMMAND_R, COMMAND_R_PUBLISHED,
        GRANITE3, GRANITE4,
    )
}  # fmt: skip

__all__ = ["FAMILIES", "TALKS", "TOOLS", "Family", "Sample"]
