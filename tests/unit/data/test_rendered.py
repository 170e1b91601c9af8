"""Rows whose words hold what a template or a tokenizer writes: start tokens, marks of turns."""

from __future__ import annotations

import logging

import pytest

import chats
from datakit import CHAT, EOS, PLAIN_TOKENIZER, TOKENIZER, jsonl, load, turn
from moored.utils.errors import UserError

RENDERED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def marked(samples, tokenizer) -> list[str]:
    """Each sample as text with « » around its targets."""
    out = []
    for one in samples:
        text, inside = "", False
        for token, learned in zip(one.input_ids.tolist(), one.label_mask.tolist(), strict=True):
            text += ("«" if learned else "»") * (learned != inside) + tokenizer.decode([token])
            inside = learned
        out.append(text + "»" * inside)
    return out


BOS_IS_NOT_ADDED = chats.tokenizer(bos_token="<s>")
BOS_IS_EOS = chats.tokenizer(bos_token=EOS)
TEXTS = {
    "one is there": (PLAIN_TOKENIZER, "<s>hello", f"<s>«hello{EOS}»"),
    "two are there": (PLAIN_TOKENIZER, "<s><s>hello", f"<s>«hello{EOS}»"),
    "none is there": (PLAIN_TOKENIZER, "hello", f"<s>«hello{EOS}»"),
    "and the end": (PLAIN_TOKENIZER, f"<s>hello{EOS}\n", f"<s>«hello{EOS}»"),
    "of the next text": (PLAIN_TOKENIZER, f"a{EOS}<s>b", f"<s>«a{EOS}»<s>«b{EOS}»"),
    "that is not added": (BOS_IS_NOT_ADDED, "<s>hello", f"<s>«hello{EOS}»"),
    "that is the end, too": (BOS_IS_EOS, f"{EOS}hello", f"{EOS}«hello{EOS}»"),
}


@pytest.mark.parametrize(("tokenizer", "text", "expected"), TEXTS.values(), ids=TEXTS)
def test_a_text_has_one_start_token_which_is_not_learned(tokenizer, text, expected, tmp_path):
    found = load(jsonl(tmp_path / "a.jsonl", [{"text": text}]), tokenizer)
    assert marked(found, tokenizer) == [expected]


def test_a_prompt_and_a_whole_file_likewise(tmp_path):
    pair = {"prompt": "<s>hello ", "completion": "there"}
    found = load(jsonl(tmp_path / "a.jsonl", [pair]), PLAIN_TOKENIZER)
    assert marked(found, PLAIN_TOKENIZER) == [f"<s>hello «there{EOS}»"]
    (tmp_path / "a.txt").write_text("<s>hello there how are you<s>line")
    windows = load(tmp_path / "a.txt", PLAIN_TOKENIZER, max_length=6)
    start = PLAIN_TOKENIZER.convert_tokens_to_ids("<s>")
    for window in windows:
        assert window.input_ids[0] == start
        assert window.input_ids[1] != start
        assert not window.label_mask[1:][window.input_ids[1:] == start].any()


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": RENDERED, "completion": "hi<|im_end|>"},
        {"prompt": RENDERED, "completion": "hi"},
        {"prompt": "hello", "completion": "hi<|im_end|>"},
        {"prompt": "<|im_start|>system\nbe brief", "completion": "hi"},
    ],
)
def test_a_pair_in_the_models_format_is_not_laid_out_again(pair, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [pair])
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: (prompt|completion): holds '<\|im_.*rendered: true"
    ):
        load(path)
    (text,) = marked(load(path, source={"rendered": True}), TOKENIZER)
    end = "" if "<|im_end|>" in pair["completion"] else "<|im_end|>"
    assert text == f"{pair['prompt']}«{pair['completion']}{end}»"


def test_a_start_token_that_the_template_writes_is_not_written_twice(tmp_path):
    tokenizer = chats.tokenizer("{{ bos_token }}" + chats.CHATML, add_bos=True)
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "<s>hello", "completion": "hi"}])
    with pytest.raises(UserError, match="prompt: holds '<s>'"):
        load(path, tokenizer)
    rows = [{"prompt": f"<s>{RENDERED}", "completion": "hi<|im_end|>"}]
    found = load(jsonl(tmp_path / "b.jsonl", rows), tokenizer, source={"rendered": True})
    assert marked(found, tokenizer) == [f"<s>{RENDERED}«hi<|im_end|>»"]


def test_rendered_means_nothing_for_chats(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match="laid out by the template"):
        load(path, source={"rendered": True, "format": "messages"})


@pytest.mark.parametrize(
    "row",
    [{"text": RENDERED + "hi<|im_end|>"}, {"messages": [turn("user", "a<|im_end|>b"), CHAT[1]]}],
)
def test_marks_of_turns_among_words_are_counted(row, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(jsonl(tmp_path / "a.jsonl", [row, {"text": "hello"}]))
    assert "data.train: 1 of 2 samples hold the chat template's own marks of turns" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}, {"text": "hello"}]))
    assert not caplog.text


def test_an_empty_block_of_reasoning_is_not_learned_without_a_word(tmp_path, caplog):
    tokenizer = chats.tokenizer(chats.THINKING)
    with caplog.at_level(logging.WARNING):
        load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "hello"}]), tokenizer)
    assert "data.train: 1 of 2 samples learn a block of reasoning without a word" in caplog.text
    opened = chats.THINKING.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # of which a part is given
        load(jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}]), chats.tokenizer(opened))
    assert "data.train: 1 of 1 samples learn a block of reasoning without a word" in caplog.text


def test_an_answer_that_ends_with_nothing_is_not_learned_without_a_word(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT * 2}, {"messages": CHAT}])
    with caplog.at_level(logging.WARNING):
        load(path, chats.tokenizer(chats.PLAIN))
    assert "1 of 2 samples have an answer that the chat template ends with no token" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(path, chats.tokenizer(chats.LLAMA3))
    assert not caplog.text


def test_chats_that_become_several_samples_are_named_and_counted(tmp_path, caplog):
    messages = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), *CHAT]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    with caplog.at_level(logging.INFO):
        found = load(path, chats.tokenizer(chats.LATE_SYSTEM))
    assert [one.sample_id for one in found] == ["a.jsonl:1", "a.jsonl:1.2"]
    assert "1 samples more than rows" in caplog.text


def test_a_chat_of_which_nothing_is_to_be_learned_is_dropped(tmp_path, caplog):
    unlearned = [CHAT[0], {**CHAT[1], "loss": False}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": unlearned}])
    with caplog.at_level(logging.WARNING):
        found = load(path, max_dropped_fraction=0.5)
    assert [one.sample_id for one in found] == ["a.jsonl:1"]
    assert "1 of 2 samples dropped (1 without a token to learn)" in caplog.text


NAMED = {
    "default": chats.CHATML,
    "tool_use": "{% if tools %}{{ tools | tojson }}{% endif %}" + chats.LLAMA3,
}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_named_templates_are_taken_as_transformers_does(tmp_path):
    tokenizer = chats.tokenizer(NAMED)
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": TOOLS}]
    found = load(jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    for one, tools in zip(found, (None, TOOLS), strict=True):
        stock = tokenizer.apply_chat_template(CHAT, tools=tools, return_dict=False)
        ids = one.input_ids.tolist()
        assert ids == stock[: len(ids)]
        assert tokenizer.decode(stock[len(ids) :]).strip() == ""
    other = chats.tokenizer({"rag": chats.CHATML, "tool_use": NAMED["tool_use"]})
    with pytest.raises(UserError, match="templates named rag, tool_use, and none named default"):
        load(jsonl(tmp_path / "b.jsonl", rows), other)
    assert len(load(jsonl(tmp_path / "c.jsonl", rows[1:]), other)) == 1


CALLING = chats.CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or () %}<call>{{ c.function.name }} ARGUMENTS"
    "</call>{% endfor %}",
)
FORMS = {
    "as JSON": (
        "{{ c.function.arguments | tojson }}",
        '<call>add {"a": true, "b": "e\\"x"}</call>',
    ),
    "as they are": ("{{ c.function.arguments }}", '<call>add {"a": true, "b": "e\\"x"}</call>'),
    "joined to text": (
        "{{ '' + c.function.arguments }}",
        '<call>add {"a": true, "b": "e\\"x"}</call>',
    ),
    "one by one": (
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
        '<call>add a=True;b=e"x;</call>',
    ),
}


@pytest.mark.parametrize(("form", "expected"), FORMS.values(), ids=FORMS)
def test_arguments_reach_the_template_in_the_form_that_it_writes(form, expected, tmp_path):
    function = {"name": "add", "arguments": {"a": True, "b": 'e"x'}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
    ]
    tokenizer = chats.tokenizer(CALLING.replace("ARGUMENTS", form))
    (text,) = marked(
        load(jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer), tokenizer
    )
    assert text.endswith(f"«{expected}<|im_end|>»")


@pytest.mark.parametrize("form", ["", "{{ c.function.arguments.a }}"])
def test_arguments_that_the_template_leaves_out_are_refused(form, tmp_path):
    function = {"name": "add", "arguments": {"a": 1, "b": {"c": ["deep"]}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
    ]
    tokenizer = chats.tokenizer(CALLING.replace("ARGUMENTS", form))
    path = jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(
        UserError, match=r"leaves out messages\[1\]\.tool_calls\[0\]\.function\.arg"
    ):
        load(path, tokenizer)
