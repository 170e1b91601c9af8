"""What is learned of chats, for the templates of today's model families, against marks by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES, TOOLS
from moored.data.batch import Sample, collate, pack
from moored.data.chat import ChatEncoder, Tokens
from moored.data.template import TemplateError


def marked(tokenizer, tokens: Tokens | str) -> str:
    """The tokens as text, with « » around what is learned."""
    assert isinstance(tokens, Tokens), tokens
    pairs = zip(tokens.input_ids.tolist(), tokens.label_mask.tolist(), strict=True)
    text = ""
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text += f"«{words}»" if learned else words
    return text


def tokens_of(tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """A marked text as token ids, and which of them begin inside of marks.

    The other way round, for tokens that take the blanks around them along.
    """
    bare, inside, where = "", False, []
    for character in text:
        if character in "«»":
            inside = character == "«"
        else:
            bare += character
            where.append(inside)
    found = tokenizer(bare, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [where[start] for start, _ in found["offset_mapping"]]


TABLE = [
    (family, name, is_marked)
    for family in FAMILIES.values()
    for name in family.takes
    for is_marked in (False, True)
]


@pytest.mark.parametrize(
    ("family", "name", "is_marked"),
    TABLE,
    ids=[f"{f.name}-{name}-{'marked' if m else 'plain'}" for f, name, m in TABLE],
)
def test_what_is_learned_is_what_a_hand_marks(family, name, is_marked):
    tokenizer = family.tokenizer(marked=is_marked)
    template = family.dated(family.template(marked=is_marked)) if family.today else None
    encoder = ChatEncoder(tokenizer, template)
    messages, tools = family.talk(name)
    if (family.name, name) == ("mistral-nemo", "steps"):
        with pytest.raises(TemplateError, match=r"leaves out or rewrites messages\[0\] \(system\)"):
            encoder.layouts(messages, tools)  # it is gone as soon as a tool has answered
        return
    # Of a template that cuts words of an answer once others follow, this has to be asked for.
    cuts = family.reasoning_key == "content" or (family.name, name) == (
        "gpt-oss",
        "call_with_words",
    )
    layouts = encoder.layouts(messages, tools, split=cuts)
    found = encoder.encode(layouts)
    expected = family.mark(messages, tools)
    if family.name.endswith("strips"):
        assert [(t.input_ids.tolist(), t.label_mask.tolist()) for t in found] == [
            tokens_of(tokenizer, text) for text in expected
        ]
    else:
        assert [marked(tokenizer, tokens) for tokens in found] == expected


REFUSED = [(family, name) for family in FAMILIES.values() for name in family.refused]


@pytest.mark.parametrize(("family", "name"), REFUSED, ids=[f"{f.name}-{n}" for f, n in REFUSED])
@pytest.mark.parametrize("is_marked", [False, True], ids=["plain", "marked"])
def test_what_a_template_leaves_out_is_refused_in_a_line(family, name, is_marked):
    messages, tools = family.talk(name)
    with pytest.raises(TemplateError) as caught:
        ChatEncoder(family.tokenizer(marked=is_marked)).layouts(messages, tools)
    assert "\n" not in str(caught.value)


TAKING = [family for family in FAMILIES.values() if family.takes]


@pytest.mark.parametrize("family", TAKING, ids=[family.name for family in TAKING])
def test_targets_are_the_same_padded_and_packed(family):
    encoder = ChatEncoder(family.tokenizer())
    samples, expected = [], []
    for name in family.takes:
        if name in family.unseen:
            continue
        messages, tools = family.talk(name)
        layouts = encoder.layouts(messages, tools, split=True)
        for number, tokens in enumerate(encoder.encode(layouts)):
            mask = tokens.label_mask
            samples.append(
                Sample(sample_id=f"{name}.{number}", input_ids=tokens.input_ids, label_mask=mask)
            )
            expected.append(tokens.input_ids[1:][mask[1:]].tolist())
    longest = max(len(sample) for sample in samples)
    padded = collate([[sample] for sample in samples], pad_token_id=encoder.eos)
    packed = collate(pack(samples, 2 * longest), pad_token_id=encoder.eos)
    assert padded.targets.tolist() == [token for targets in expected for token in targets]
    rows = pack(samples, 2 * longest)
    places = {sample.sample_id: index for index, sample in enumerate(samples)}
    in_rows = [expected[places[sample.sample_id]] for row in rows for sample in row]
    assert packed.targets.tolist() == [token for targets in in_rows for token in targets]
    for batch in (padded, packed):  # each from the position before it
        flat = batch.input_ids.flatten()
        assert flat[batch.target_index + 1].tolist() == batch.targets.tolist()


LETTERS = st.sampled_from("ab 7.,\n\"'\\é漢🙂/#:-_")
WORDS = st.text(LETTERS, min_size=1, max_size=12).filter(lambda text: text.strip())
VALUES = st.recursive(
    st.one_of(WORDS, st.integers(-99, 99), st.booleans(), st.just("Rome")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def talks(draw, family):
    """A chat of one to four questions, with calls and reasoning where the family has them."""
    takes = set(family.takes) - set(family.unseen)
    key = family.reasoning_key
    messages = []
    if "system" in takes and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    tools = TOOLS if "call" in takes and draw(st.booleans()) else None
    thinks = "reasoning_three" in takes and key != "content" and draw(st.booleans())

    def says(**more):
        thought = {key: draw(WORDS).strip()} if thinks and draw(st.booleans()) else {}
        return {"role": "assistant", **thought, **more}

    for question in range(draw(st.integers(1, 4))):
        # Some find the last question by its words, so each has its own.
        messages.append({"role": "user", "content": f"{question}{draw(WORDS)}"})
        for number in range(draw(st.integers(0, 2)) if tools else 0):
            city = {"city": draw(VALUES)} if family.name != "glm-4.5" else {"city": draw(WORDS)}
            function = {"name": "weather", "arguments": city}
            call = {"id": f"call0000{number}", "type": "function", "function": function}
            messages.append(says(content="", tool_calls=[call]))
            messages.append(
                {
                    "role": "tool",
                    "name": "weather",
                    "tool_call_id": call["id"],
                    "content": draw(WORDS),
                }
            )
        # Some take line breaks off an answer's start in one place and not in another.
        messages.append(says(content=draw(WORDS).lstrip("\n")))
    return messages, tools


DRAWN = [
    family
    for family in FAMILIES.values()
    if {"one", "three"} <= set(family.takes) and not family.name.endswith("strips")
]


@pytest.mark.parametrize("is_marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("family", DRAWN, ids=[family.name for family in DRAWN])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_chat_is_learned_turn_by_turn_and_once(family, is_marked, data):
    messages, tools = data.draw(talks(family))
    tokenizer = _TOKENIZERS[family.name, is_marked]
    template = family.dated(family.template(marked=is_marked, tools=bool(tools)))
    encoder = ChatEncoder(tokenizer, template)
    found = encoder.encode(encoder.layouts(messages, tools))
    assert [marked(tokenizer, tokens) for tokens in found] == family.mark(messages, tools)


_TOKENIZERS = {
    (family.name, is_marked): family.tokenizer(marked=is_marked)
    for family in DRAWN
    for is_marked in (False, True)
}
