"""The stand-ins for families of models: their templates write what was written by hand for them.

Nothing of Moored is tested here: this is what its table of templates rests on.
"""

from __future__ import annotations

import pytest

from families import FAMILIES, TALKS

LAID_OUT = [(name, talk) for name, family in FAMILIES.items() for talk in family.takes]
REFUSED = [(name, talk) for name, family in FAMILIES.items() for talk in family.refused]
VARIANTS = pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])


def rendered(tokenizer, family, messages, tools, **more) -> str:
    """By stock transformers, which chooses among named templates itself."""
    template = family.dated(tokenizer.get_chat_template(tools=tools))
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False, **more
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {
        (name, marked): family.tokenizer(marked=marked)
        for name, family in FAMILIES.items()
        for marked in (False, True)
    }


@VARIANTS
@pytest.mark.parametrize(("name", "talk"), LAID_OUT)
def test_the_template_writes_what_was_written_by_hand(tokenizers, name, talk, marked):
    family, tokenizer = FAMILIES[name], tokenizers[name, marked]
    messages, tools = family.talk(talk)
    assert rendered(tokenizer, family, messages, tools) == family.text(messages, tools)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = rendered(tokenizer, family, messages[:index], tools, add_generation_prompt=True)
            assert asked == family.text(messages[:index], tools, prompt=True)
            part = rendered(tokenizer, family, messages[: index + 1], tools)
            assert part == family.text(messages[: index + 1], tools)


@pytest.mark.parametrize(("name", "talk"), LAID_OUT)
def test_each_answer_is_learned_once_and_ends_where_inference_stops(name, talk):
    family = FAMILIES[name]
    messages, tools = family.talk(talk)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    samples = family.samples(messages, tools)
    assert sorted(turn for sample in samples for turn in sample.learned) == answers
    assert all(sample.as_asked for sample in samples) == (talk not in family.unseen)
    for sample in samples:
        whole = family.text(messages[: sample.num_messages], tools)
        for _, said in halves(sample.marked):
            assert said.endswith(family.stops), said
        if sample.as_asked:
            bare = sample.marked.replace("«", "").replace("»", "")
            assert whole.startswith(bare) or whole + family.eos == bare
        for turn, (given, _) in zip(sample.learned, halves(sample.marked), strict=True):
            assert given == family.text(messages[:turn], tools, prompt=True)


def halves(marked: str) -> list[tuple[str, str]]:
    """Each learned stretch with all that comes before it."""
    before, *pieces = marked.split("«")
    out = []
    for piece in pieces:
        said, rest = piece.split("»")
        out.append((before, said))
        before += said + rest
    return out


@pytest.mark.parametrize(("name", "talk"), REFUSED)
def test_what_a_family_does_not_take_is_refused_or_left_out(tokenizers, name, talk):
    """So that a table may ask for a line here, and does not ask for it without reason."""
    family = FAMILIES[name]
    messages, tools = family.talk(talk)
    try:
        text = rendered(tokenizers[name, False], family, messages, tools)
    except Exception:  # the template raises
        return
    wanted = [tools[0]["function"]["description"]] if tools else []
    for message in messages:
        wanted += [message["content"], message.get(family.reasoning_key, "")]
        wanted += [call["function"]["arguments"]["city"] for call in message.get("tool_calls", ())]
    position = 0
    for word in wanted:
        found = text.find(word.strip(), position)
        if found < 0:
            return
    pytest.fail(f"nothing is missing in {text!r}")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_single_and_flagged_as_in_the_real_tokenizer(tokenizers, name):
    family, tokenizer = FAMILIES[name], tokenizers[name, False]
    for token in (*family.special, *family.plain_added):
        (index,) = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert tokenizer.added_tokens_decoder[index].special == (token in family.special)
    assert {family.eos, family.pad, *family.stops} <= {*family.special, *family.plain_added}
    start = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    assert tuple(start) == family.adds
    tokens = tokenizer("2+2? naïve 漢字")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "2+2? naïve 漢字"


def test_every_talk_is_taken_by_some_family():
    assert {talk for _, talk in LAID_OUT} == set(TALKS)


# Written out by hand, whole: they hold what the splitting above makes of a conversation.
SPELT = {
    ("chatml", "one"): ["<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»"],
    ("qwen3", "one"): [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\n4<|im_end|>»"
    ],
    ("qwen3-thinking", "reasoning"): [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "«Two and two.\n</think>\n\n4<|im_end|>»"
    ],
    ("qwen3", "reasoning_three"): [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nPolite.\n</think>\n\nAt your service<|im_end|>»",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nThree and three.\n</think>\n\n6<|im_end|>»",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nTwo and two.\n</think>\n\n4<|im_end|>»",
    ],
    ("llama-3", "edges"): [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nso?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«done<|eot_id|>»"
    ],
    ("phi-3", "system"): [
        "<|system|>\nBe brief.<|end|>\n<|user|>\n2+2?<|end|>\n<|assistant|>\n«4<|end|>»\n"
        "<|user|>\nAnd 3+3?<|end|>\n<|assistant|>\n«6<|end|>\n<|endoftext|>»"
    ],
    ("phi-4", "one"): [
        "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>«4<|im_end|>»"
    ],
    ("glm-4", "system"): [
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n2+2?<|assistant|>«\n4<|user|>»\nAnd 3+3?"
        "<|assistant|>«\n6<|endoftext|>»"
    ],
}


@pytest.mark.parametrize(("name", "talk"), SPELT)
def test_marks_are_where_they_were_spelt_out(name, talk):
    family = FAMILIES[name]
    assert family.mark(*family.talk(talk)) == SPELT[name, talk]


ENDINGS = {
    ("qwen2.5", "parallel"): [
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>»'
        "\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nsnow\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n«Rome.<|im_end|>»"
    ],
    ("qwen3", "call"): [
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nIt is sunny.<|im_end|>»",
        '<|im_start|>assistant\n«<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", '
        '"arguments": {"city": "Rome"}}\n</tool_call><|im_end|>»',
    ],
    ("qwen3", "reasoning_steps"): [
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\nIt is sunny.<|im_end|>\n<|im_start|>user\nThanks"
        "<|im_end|>\n<|im_start|>assistant\n«<think>\nPolite.\n</think>\n\nAny time.<|im_end|>»",
        "<|im_start|>assistant\n«<think>\nI have to look.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nSo it says.\n</think>\n\nIt is sunny.<|im_end|>»",
    ],
    ("llama-3.2", "call"): [
        '«{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>»<|start_header_id|>ipython'
        '<|end_header_id|>\n\n"sunny"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
        "«It is sunny.<|eot_id|>»"
    ],
    ("glm-4", "call_with_words"): [
        '<|assistant|>«\nI look.<|assistant|>weather\n{"city": "Rome"}<|observation|>»\nsunny'
        "<|assistant|>«\nIt is sunny.<|endoftext|>»"
    ],
}


@pytest.mark.parametrize(("name", "talk"), ENDINGS)
def test_marked_texts_with_tools_end_as_spelt_out(name, talk):
    family = FAMILIES[name]
    marked = family.mark(*family.talk(talk))
    assert len(marked) == len(ENDINGS[name, talk])
    for text, ending in zip(marked, ENDINGS[name, talk], strict=True):
        assert text.endswith(ending)
        assert "«" not in text.removesuffix(ending)
