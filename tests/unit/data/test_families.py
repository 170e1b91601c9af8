"""The stand-ins for families of models: their templates write what was written by hand for them.

Nothing of Moored is tested here: this is what its table of templates rests on.
"""

from __future__ import annotations

import jinja2
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
            # Of an answer that others follow, Harmony writes another end than where it stops.
            assert said.endswith((*family.stops, "<|end|>")), said
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
def test_what_a_family_does_not_take_is_refused_left_out_or_not_as_asked(tokenizers, name, talk):
    """So that a table may ask for a line here, and does not ask for it without reason."""
    family, tokenizer = FAMILIES[name], tokenizers[name, False]
    messages, tools = family.talk(talk)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        text = rendered(tokenizer, family, messages, tools)
        asked = [
            rendered(tokenizer, family, messages[:index], tools, add_generation_prompt=True)
            for index in answers
        ]
    except jinja2.TemplateError:
        return
    parts = [rendered(tokenizer, family, messages[: index + 1], tools) for index in answers]
    if not all(map(str.startswith, parts, asked)):
        return
    wanted = [tools[0]["function"]["description"]] if tools else []
    for message in messages:
        wanted += [message["content"].strip(), message.get(family.reasoning_key, "")]
        for call in message.get("tool_calls", ()):
            wanted += ['"city": "{city}"'.format(**call["function"]["arguments"])]
    if all(words in text for words in wanted):
        pytest.fail(f"nothing is missing in {text!r}")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_single_and_flagged_as_in_the_real_tokenizer(tokenizers, name):
    family, tokenizer = FAMILIES[name], tokenizers[name, False]
    assert set(family.strips) <= set(family.special)
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
    ("glm-4.5", "reasoning"): [
        "[gMASK]<sop><|user|>\n2+2?<|assistant|>«\n<think>Two and two.</think>\n4<|endoftext|>»"
    ],
    ("mistral-v3", "system"): [
        "<s>[INST] 2+2?[/INST] 4</s>[INST] Be brief.\n\nAnd 3+3?[/INST]« 6</s>»",
        "<s>[INST] Be brief.\n\n2+2?[/INST]« 4</s>»",
    ],
    # The second is in no rendering: the template writes the system text only before it is answered.
    ("mistral-nemo", "system"): [
        "<s>[INST]2+2?[/INST]4</s>[INST]Be brief.\n\nAnd 3+3?[/INST]«6</s>»",
        "<s>[INST]Be brief.\n\n2+2?[/INST]«4</s>»",
    ],
    ("mistral-v7", "system"): [
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]2+2?[/INST]«4</s>»"
        "[INST]And 3+3?[/INST]«6</s>»"
    ],
    ("gemma-2", "edges"): [
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n«four<end_of_turn>»\n"
        "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n«done<end_of_turn>»"
    ],
    ("gemma-3", "system"): [
        "<bos><start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n"
        "«4<end_of_turn>»\n<start_of_turn>user\nAnd 3+3?<end_of_turn>\n<start_of_turn>model\n"
        "«6<end_of_turn>»"
    ],
    ("deepseek-r1-kept", "reasoning_three"): [
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>\n\n4<｜end▁of▁sentence｜>"
        "<｜User｜>And 3+3?<｜Assistant｜>\n\n6<｜end▁of▁sentence｜><｜User｜>Thanks<｜Assistant｜>"
        "<think>\n«Polite.\n</think>\n\nAt your service<｜end▁of▁sentence｜>»",
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>\n\n4<｜end▁of▁sentence｜>"
        "<｜User｜>And 3+3?<｜Assistant｜>"
        "<think>\n«Three and three.\n</think>\n\n6<｜end▁of▁sentence｜>»",
        "<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>"
        "<think>\n«Two and two.\n</think>\n\n4<｜end▁of▁sentence｜>»",
    ],
    ("deepseek-v3.1", "system"): [
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2+2?"
        "<｜Assistant｜></think>«4<｜end▁of▁sentence｜>»"
        "<｜User｜>And 3+3?<｜Assistant｜></think>«6<｜end▁of▁sentence｜>»"
    ],
    ("command-r", "system"): [
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«4<|END_OF_TURN_TOKEN|>»"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And 3+3?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«6<|END_OF_TURN_TOKEN|>»"
    ],
    ("granite-3", "one"): [
        "<|start_of_role|>system<|end_of_role|>Today's Date: July 26, 2024. You help."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>2+2?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«4<|end_of_text|>»"
    ],
}


@pytest.mark.parametrize(("name", "talk"), SPELT)
def test_marks_are_where_they_were_spelt_out(name, talk):
    family = FAMILIES[name]
    assert family.mark(*family.talk(talk)) == SPELT[name, talk]


def test_a_tail_may_be_left_out():
    family = FAMILIES["phi-3"]
    (marked,) = family.mark(*family.talk("one"), tail=False)
    assert marked == "<|user|>\n2+2?<|end|>\n<|assistant|>\n«4<|end|>»"


ENDINGS = {
    ("qwen2.5", "parallel"): [
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>»'
        "\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nsnow\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n«Rome.<|im_end|>»"
    ],
    ("qwen3", "call"): [
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>»\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nIt is sunny.<|im_end|>»",
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
    ("glm-4.5", "reasoning_steps"): [
        "<|assistant|>«\n<think>Polite.</think>\nAny time.<|endoftext|>»",
        "<|assistant|>«\n<think>I have to look.</think>\n<tool_call>weather\n<arg_key>city"
        "</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call><|observation|>»\n<tool_response>\n"
        "sunny\n</tool_response><|assistant|>«\n<think>So it says.</think>\nIt is sunny."
        "<|endoftext|>»",
    ],
    ("mistral-v3", "steps"): [
        "[INST] Be brief.\n\nThanks[/INST]« Any time.</s>»",
        '[INST] Be brief.\n\nRome, then Oslo?[/INST]«[TOOL_CALLS] [{"name": "weather", '
        '"arguments": {"city": "Rome"}, "id": "call00001"}]</s>»[TOOL_RESULTS] {"content": sunny, '
        '"call_id": "call00001"}[/TOOL_RESULTS]«[TOOL_CALLS] [{"name": "weather", "arguments": '
        '{"city": "Oslo"}, "id": "call00002"}]</s>»[TOOL_RESULTS] {"content": snow, "call_id": '
        '"call00002"}[/TOOL_RESULTS]« Sun, then snow.</s>»',
    ],
    ("deepseek-v3.1", "call"): [
        "<｜Assistant｜></think>«<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>»'
        "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>«It is sunny.<｜end▁of▁sentence｜>»"
    ],
    ("gpt-oss", "three"): [
        "<|start|>assistant«<|channel|>final<|message|>4<|end|>»<|start|>user<|message|>And 3+3?"
        "<|end|><|start|>assistant«<|channel|>final<|message|>6,\nof course<|end|>»<|start|>user"
        "<|message|>Thanks<|end|><|start|>assistant"
        "«<|channel|>final<|message|>At your service<|return|>»",
    ],
    # The second is in no rendering: the call loses its reasoning once an answer follows it.
    ("gpt-oss", "reasoning_steps"): [
        "<|start|>assistant«<|channel|>analysis<|message|>Polite.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Any time.<|return|>»",
        "<|start|>assistant<|channel|>analysis<|message|>I have to look.<|end|><|start|>assistant "
        'to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>'
        "<|start|>assistant«<|channel|>analysis<|message|>So it says.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>»",
        "<|start|>assistant«<|channel|>analysis<|message|>I have to look.<|end|><|start|>assistant "
        'to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>»',
    ],
    ("command-r", "call"): [
        '«\nAction:\n```json\n[\n    {\n        "tool_name": "weather",\n        "parameters": '
        '{"city": "Rome"}\n    }\n]```<|END_OF_TURN_TOKEN|>»<|START_OF_TURN_TOKEN|>'
        "<|SYSTEM_TOKEN|><results>\nsunny</results><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|CHATBOT_TOKEN|>«It is sunny.<|END_OF_TURN_TOKEN|>»"
    ],
    ("granite-4", "call_with_words"): [
        '«I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|end_of_text|>»\n<|start_of_role|>user<|end_of_role|>\n<tool_response>\nsunny\n"
        "</tool_response><|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        "«It is sunny.<|end_of_text|>»"
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


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.strips])
@pytest.mark.parametrize("talk", ["one", "edges", "system"])
def test_tokens_swallow_blanks_as_said(tokenizers, name, talk):
    family, tokenizer = FAMILIES[name], tokenizers[name, False]
    messages, tools = family.talk(talk)
    (marked,) = family.mark(messages, tools)
    bare = marked.replace("«", "").replace("»", "")
    tokens = tokenizer(bare, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == family.decoded(marked).replace("«", "").replace("»", "")
    assert (family.decoded(marked) != marked) == (talk == "edges" or not family.strips_left)
