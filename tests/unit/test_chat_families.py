"""What is learned of chats, for the templates of today's model families, against marks by hand."""

from __future__ import annotations

import itertools

import pytest

from families import FAMILIES
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
    encoder = ChatEncoder(
        tokenizer, family.dated(family.template(marked=is_marked)) if family.today else None
    )
    messages, tools = family.talk(name)
    try:
        layouts = encoder.layouts(messages, tools)
    except TemplateError:
        assert name in family.unseen
        return
    found = [marked(tokenizer, tokens) for tokens in encoder.encode(layouts)]
    assert found == family.mark(messages, tools)
