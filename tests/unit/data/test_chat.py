"""What is learned of a conversation, for templates of many kinds, on a real tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chats
from moored.data.chat import ChatEncoder
from moored.data.chat_layout import ChatLayout
from moored.data.template import TemplateError
from moored.utils.errors import UserError

EOS = "<|endoftext|>"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    start = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return start + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def learned(tokenizer, messages, template=None) -> list[str]:
    """The text of each run of targets, after checking that tokens and masks fit."""
    encoder = ChatEncoder(tokenizer, template)
    (tokens,) = encoder.encode(encoder.layouts(messages))
    assert not isinstance(tokens, str), tokens
    assert len(tokens.input_ids) == len(tokens.label_mask)
    runs: list[list[int]] = []
    for index, (token, is_target) in enumerate(
        zip(tokens.input_ids.tolist(), tokens.label_mask.tolist(), strict=True)
    ):
        if is_target and (index == 0 or not tokens.label_mask[index - 1]):
            runs.append([])
        if is_target:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def prompts_are_what_generation_sees(tokenizer, messages, template=None) -> None:
    """Independently: transformers' own prompt for each answer is the prefix of what is learned."""
    encoder = ChatEncoder(tokenizer, template)
    (tokens,) = encoder.encode(encoder.layouts(messages))
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(
            messages[:index],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert tokens.input_ids[: len(asked)].tolist() == asked
        assert tokens.label_mask[len(asked)]
        assert not tokens.label_mask[len(asked) - 1]
        assert encoder.prompt_ids(messages[:index]) == asked


TWO = turns("hello", "hi there", "how are you", "fine\nand you ")
EXPECTED = {
    "chatml": (chats.CHATML, TWO, ["hi there<|im_end|>", "fine\nand you <|im_end|>"]),
    "marked": (chats.MARKED, TWO, ["hi there<|im_end|>", "fine\nand you <|im_end|>"]),
    "marked-end": (chats.MARKED_WITH_END, TWO, ["hi there<|im_end|>", "fine\nand you <|im_end|>"]),
    "llama3-trims": (chats.LLAMA3, TWO, ["hi there<|eot_id|>", "fine\nand you<|eot_id|>"]),
    "gemma": (chats.GEMMA, TWO, ["hi there<end_of_turn>", "fine\nand you<end_of_turn>"]),
    "llama2": (chats.LLAMA2, TWO, [" hi there </s>", " fine\nand you </s>"]),
    "nothing-ends": (chats.PLAIN, TWO, ["hi there\n", f"fine\nand you \n{EOS}"]),
    "thinking": (
        chats.THINKING,
        TWO,
        ["hi there<|im_end|>", "<think>\n\n</think>\n\nfine\nand you <|im_end|>"],
    ),
    "system": (chats.CHATML, turns("a", "b", system="be brief"), ["b<|im_end|>"]),
    "system-llama3": (chats.LLAMA3, turns("a", "b", system="be brief"), ["b<|eot_id|>"]),
    "late-system": (chats.LATE_SYSTEM, turns("a", "b", system="be brief"), [" b</s>"]),
    "line-break-first": (chats.CHATML, turns("a", "\n\nb"), ["\n\nb<|im_end|>"]),
    "unicode": (chats.LLAMA3, turns("é", "naïve 🙂 漢字"), ["naïve 🙂 漢字<|eot_id|>"]),
    "like-the-header": (chats.CHATML, turns("x", "x assistant\nx"), ["x assistant\nx<|im_end|>"]),
    "same-words-twice": (chats.LLAMA3, turns("x", "x", "x", "x"), ["x<|eot_id|>"] * 2),
}


@pytest.mark.parametrize(("template", "messages", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_answers_and_their_ends_are_learned(template, messages, expected):
    tokenizer = chats.tokenizer(template)
    assert learned(tokenizer, messages) == expected
    prompts_are_what_generation_sees(tokenizer, messages)


def test_the_template_of_the_recipe_comes_first():
    tokenizer = chats.tokenizer(chats.CHATML)
    assert learned(tokenizer, TWO, chats.LLAMA3)[0] == "hi there<|eot_id|>"
    prompts_are_what_generation_sees(tokenizer, TWO, chats.LLAMA3)


def test_padding_with_the_end_token_keeps_it_a_target():
    tokenizer = chats.tokenizer(chats.CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    assert learned(tokenizer, TWO)[-1] == "fine\nand you <|im_end|>"


def test_a_template_that_ends_with_nothing_is_cut_before_the_end_token():
    """What follows the marked words is not learned, so the end must come right after them."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = chats.tokenizer(template)
    encoder = ChatEncoder(tokenizer)
    (tokens,) = encoder.encode(encoder.layouts(turns("a", "b")))
    assert tokenizer.decode(tokens.input_ids) == f"user: a\nassistant: b{EOS}"
    assert learned(tokenizer, turns("a", "b", "c", "d")) == ["b", f"d{EOS}"]


REFUSED = {
    "no-system-role": (
        chats.GEMMA,
        turns("a", "b", system="be brief"),
        r"System role not supported\): put its text into the first user turn",
    ),
    "drops-tools": (
        chats.LLAMA2.replace("{% else %}", "{% elif m['role'] == 'assistant' %}"),
        [*turns("a", "b"), {"role": "tool", "content": "42"}, *turns("c", "d")[1:]],
        r"leaves out or rewrites messages\[2\] \(tool\)",
    ),
    "strips-reasoning": (
        chats.CHATML.replace("m['content'] }}<", "m['content'].split('</think>')[-1] }}<"),
        turns("a", "<think>hm</think>b"),
        r"leaves out or rewrites messages\[1\] \(assistant\)",
    ),
    "markers-elsewhere": (
        chats.MARKED.replace("{{ m['content'] }}{% endgen", "{% endgen", 1).replace(
            "{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"
        ),
        TWO,
        r"markers do not cover every assistant turn",
    ),
    "broken": ("{% for m in messages %}", TWO, "refuses this conversation"),
    "type-error": ("{{ messages + 1 }}", TWO, "refuses this conversation"),
}


@pytest.mark.parametrize(("template", "messages", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_derived_is_refused_with_the_fix(template, messages, reason):
    encoder = ChatEncoder(chats.tokenizer(template))
    with pytest.raises(TemplateError, match=reason) as caught:
        encoder.layouts(messages)
    assert "\n" not in str(caught.value)
    assert "data.chat_template" in str(caught.value)


def learned_of_each(template, messages, **options) -> list[list[str]]:
    """The texts of the targets of each sample that a conversation becomes."""
    encoder = ChatEncoder(chats.tokenizer(template))
    layouts = encoder.layouts(messages, **options)
    for tokens, layout in zip(encoder.encode(layouts), layouts, strict=True):
        assert not isinstance(tokens, str), tokens
        assert tokens.label_mask[-1]
        shown = encoder.tokenizer.decode(tokens.input_ids)
        assert shown == layout.text + ("" if layout.is_closed else EOS)
    return [[layout.text[slice(*span)] for span in layout.spans] for layout in layouts]


def test_a_system_text_that_moves_makes_a_sample_of_each_answer():
    messages = turns("a", "b", "c", "d", system="be brief")
    assert learned_of_each(chats.LATE_SYSTEM, messages) == [[" d</s>"], [" b</s>"]]


def test_what_is_written_otherwise_once_it_is_answered_is_learned_as_it_was_asked():
    """Then no rendering is what the model sees: it is given the one, and says the other."""
    encoder = ChatEncoder(chats.tokenizer(chats.COUNTING))
    last, first = encoder.layouts(TWO)
    assert last.text.startswith("3 turns\n")
    assert first.text.startswith("1 turns\n")
    said = [["fine\nand you <|im_end|>"], ["hi there<|im_end|>"]]
    assert learned_of_each(chats.COUNTING, TWO) == said
    asked = encoder.prompt_ids(TWO[:3])
    (tokens,) = encoder.encode([last])
    assert tokens.input_ids[: len(asked)].tolist() == asked


def test_an_earlier_answer_that_is_laid_out_otherwise_is_learned_as_it_was_said():
    twice = (
        "{% for m in messages %}{{ m['role'] }}|{{ m['content'] }}"
        "{% if m['role'] == 'assistant' and not loop.last %}/{{ m['content'] }}{% endif %}|"
        "{% if loop.last and m['role'] == 'assistant' %}!{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant|{% endif %}"
    )
    assert learned_of_each(twice, TWO) == [["fine\nand you |!"], ["hi there|!"]]


CUTTING = chats.CHATML.replace(
    "{{ m['content'] }}<",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<",
)


def test_words_that_are_cut_once_others_follow_are_split_on_demand_only():
    messages = turns("a", "<think>hm</think>b", "c", "d")
    with pytest.raises(TemplateError, match=r"messages\[1\].*data\.rewritten_turns=split"):
        ChatEncoder(chats.tokenizer(CUTTING)).layouts(messages)
    found = learned_of_each(CUTTING, messages, split=True)
    assert found == [["d<|im_end|>"], ["<think>hm</think>b<|im_end|>"]]
    unlearned = [False, False, False, True]
    assert learned_of_each(CUTTING, messages, learned=unlearned) == [["d<|im_end|>"]]


def test_turns_that_are_not_to_be_learned_stay_in_the_context():
    messages = turns("a", "bad", "c", "good")
    for template in (chats.CHATML, chats.MARKED, chats.THINKING, chats.LATE_SYSTEM):
        encoder = ChatEncoder(chats.tokenizer(template))
        (whole,) = encoder.layouts(messages)
        (last,) = encoder.layouts(messages, learned=[False, False, False, True])
        assert (last.text, last.spans) == (whole.text, whole.spans[1:])
        (first,) = encoder.layouts(messages, learned=[False, True, False, False])
        assert first.text == whole.text[: whole.spans[0][1]]
        assert first.spans == whole.spans[:1]
        assert encoder.layouts(messages, learned=[False] * 4) == []


ENDS = {
    "another end and a final one": (  # Phi 3
        chats.CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}").replace(
            "helpful.<|im_end|>\n{% else %}{{ eos_token }}", "helpful.<|im_end|>\n"
        ),
        ["hi there<|im_end|>", f"fine\nand you <|im_end|>\n{EOS}"],
    ),
    "blanks before the end": (
        chats.CHATML.replace("{{ m['content'] }}", "{{ m['content'] }} \n "),
        ["hi there \n <|im_end|>", "fine\nand you  \n <|im_end|>"],
    ),
    "the next header": (  # GLM
        "{% for m in messages %}<|{{ 'im_start' if m['role'] == 'user' else 'eot_id' }}|>"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|eot_id|>{% endif %}",
        ["hi there<|im_start|>", f"fine\nand you {EOS}"],
    ),
    "an end that depends on what follows": (
        chats.CHATML.replace(
            "<|im_end|>\n{% endfor",
            "{{ '<|eot_id|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}\n"
            "{% endfor",
        ),
        ["hi there<|im_end|>", "fine\nand you <|eot_id|>"],
    ),
    "a prompt for the next answer, always": (
        chats.CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"),
        ["hi there<|im_end|>", "fine\nand you <|im_end|>"],
    ),
    "words after the last end": (
        chats.CHATML + "{% if not add_generation_prompt %}(over){% endif %}",
        ["hi there<|im_end|>", "fine\nand you <|im_end|>"],
    ),
    "the start of the next, which is no end": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST]{{ m['content'] }}[/INST]"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        ["hi there", f"fine\nand you {EOS}"],
    ),
}


@pytest.mark.parametrize(("template", "expected"), ENDS.values(), ids=ENDS)
def test_the_end_of_every_turn_is_learned_whatever_it_is(template, expected):
    settings = {"bos_token": "<s>"} if "<s>" in template else {}
    assert learned(chats.tokenizer(template, **settings), TWO) == expected


@pytest.mark.parametrize("name", ["CHATML", "THINKING", "another end", "the next header"])
def test_a_chat_gets_one_mask_with_marks_and_without(name):
    template = getattr(chats, name, None) or next(t for n, (t, _) in ENDS.items() if name in n)
    words = "{{ m['content'] }}"
    assert words in template
    said = f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{words}{{% endgeneration %}}"
    marked = template.replace(words, f"{said}{{% else %}}{words}{{% endif %}}")
    plain, same = (learned(chats.tokenizer(text), TWO) for text in (template, marked))
    if name == "THINKING":  # what the marks leave out is not learned
        plain[-1] = plain[-1].removeprefix("<think>\n\n</think>\n\n")
    assert same == plain


def test_tool_turns_pass_where_the_template_knows_them():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    template = chats.CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
    )
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sum": 1}'},
        {"role": "assistant", "content": "one"},
    ]
    first, last = learned(chats.tokenizer(template), messages)
    assert '"name": "add"' in first
    assert first.endswith("<|im_end|>")
    assert last == "one<|im_end|>"
    quoting = template.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}", 1)
    with pytest.raises(TemplateError, match="leaves out or rewrites"):  # "add" is, the rest is not
        ChatEncoder(chats.tokenizer(quoting)).layouts(
            [*messages[:3], {**messages[3], "content": 'say "one"'}]
        )


def test_today_is_the_same_day_every_day():
    template = "Today is {{ strftime_now('%A, %-d %b %Y') }}.\n" + chats.CHATML
    tokenizer = chats.tokenizer(template)
    assert ChatEncoder(tokenizer).layouts(TWO)[0].text.startswith("Today is Friday, 26 Jul 2024.\n")
    assert learned(tokenizer, TWO)[0] == "hi there<|im_end|>"


def test_prompt_and_completion_without_a_template():
    tokenizer = chats.tokenizer(add_bos=True)
    encoder = ChatEncoder(tokenizer)
    pairs = [("hello ", "there"), ("hello", " there"), ("line\n", "\nline"), ("a", "b" + EOS)]
    layouts = [encoder.plain_layout(prompt, completion) for prompt, completion in pairs]
    for (prompt, completion), tokens in zip(
        pairs, encoder.encode(layouts, chat=False), strict=True
    ):
        asked = tokenizer(prompt)["input_ids"]  # as at inference: with the start token
        assert tokens.input_ids[: len(asked)].tolist() == asked == encoder.text_ids(prompt)
        assert (
            tokenizer.decode(tokens.input_ids[len(asked) :]) == completion.removesuffix(EOS) + EOS
        )
        assert tokens.label_mask.tolist() == [False] * len(asked) + [True] * (
            len(tokens.input_ids) - len(asked)
        )


def test_boundaries_that_a_tokenizer_would_join_are_kept_apart():
    """`hello ` + `there` joined hold the token ` there`, which begins in the prompt."""
    tokenizer = chats.tokenizer()
    joined = tokenizer("hello there")["input_ids"]
    asked = tokenizer("hello ")["input_ids"]
    assert joined[: len(asked)] != asked  # else this test shows nothing
    (tokens,) = ChatEncoder(tokenizer).encode([ChatLayout(text="hello there", spans=((6, 11),))])
    assert tokens.input_ids[: len(asked)].tolist() == asked
    assert tokenizer.decode(tokens.input_ids[tokens.label_mask]) == "there" + EOS


def test_a_tokenizer_that_marks_word_starts_refuses_a_cut_word():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    model.train_from_iterator(["hello there again"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    encoder = ChatEncoder(tokenizer)
    cut, whole = (ChatLayout(text="hello there", spans=((at, 11),)) for at in (8, 5))
    problem, tokens = encoder.encode([cut, whole], chat=False)
    assert isinstance(problem, str)
    assert "let prompts end, or answers begin, with a space" in problem
    assert tokenizer.decode(tokens.input_ids[tokens.label_mask]).strip() == "there</s>"


def test_tokenizers_that_cannot_be_used_are_refused():
    tokenizer = chats.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*set eos_token"):
        ChatEncoder(tokenizer)

    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(UserError, match=r"some/model: has no fast version.*tokenizer\.json"):
        ChatEncoder(Slow())


ONE_TOKENIZER = chats.tokenizer()
WORDS = st.text(
    st.one_of(st.sampled_from(" \n\tab.é漢🙂<|>"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())


@pytest.mark.parametrize("name", ["CHATML", "MARKED", "THINKING"])
@settings(deadline=None)
@given(st.lists(WORDS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_any_words_come_back_exactly(name, contents):
    template = getattr(chats, name)
    messages = turns(*contents)
    expected = [f"{text}<|im_end|>" for text in contents[1::2]]
    if name == "THINKING":
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert learned(ONE_TOKENIZER, messages, template) == expected
    encoder = ChatEncoder(ONE_TOKENIZER, template)
    (tokens,) = encoder.encode(encoder.layouts(messages))
    asked = ONE_TOKENIZER.apply_chat_template(
        messages[:1], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert tokens.input_ids[: len(asked)].tolist() == asked
    assert tokens.label_mask[len(asked)]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("template", [chats.CHATML, chats.MARKED])
def test_what_the_template_does_not_say_is_not_taught_as_silence(template):
    """A call that is left out would teach the model to say nothing and stop."""
    encoder = ChatEncoder(chats.tokenizer(template))
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(TemplateError, match=r"tool_calls|do not cover"):
        encoder.layouts([TWO[0], calling, {"role": "tool", "content": "4"}, TWO[1]])
    with pytest.raises(TemplateError, match="leaves the tools out"):
        encoder.layouts(TWO[:2], TOOLS)
    with pytest.raises(TemplateError, match=r"reasoning_content|do not cover"):
        encoder.layouts([TWO[0], {**TWO[1], "reasoning_content": "hm"}])
    earlier = {**TWO[1], "reasoning_content": "hm"}
    with pytest.raises(TemplateError, match=r"messages\[1\].reasoning_content|do not cover"):
        encoder.layouts([TWO[0], earlier, *TWO[:2]])


def test_marks_that_cover_a_later_answer_do_not_cover_an_earlier_one_of_its_words():
    template = chats.MARKED.replace("m['role'] == 'assistant'", "loop.last")
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}] * 2
    said[-1] = {"role": "assistant", "content": "oh yes"}
    with pytest.raises(TemplateError, match="do not cover every assistant turn"):
        ChatEncoder(chats.tokenizer(template)).layouts(said)


def test_a_generation_prompt_that_opens_the_answer():
    template = chats.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = chats.tokenizer(template)
    thinking = [TWO[0], {"role": "assistant", "content": "<think>\nx</think>yes"}]
    assert learned(tokenizer, thinking) == ["x</think>yes<|im_end|>"]
    with pytest.raises(TemplateError, match=r"opens an answer with '<think>\\n'"):
        ChatEncoder(tokenizer).layouts([TWO[0], {"role": "assistant", "content": "yes"}])


@pytest.mark.parametrize("fault", ["{{ 1 / 0 }}", "{{ range(10 ** 9) }}"])
def test_a_template_is_somebodys_program(fault):
    with pytest.raises(TemplateError, match="refuses this conversation"):
        ChatEncoder(chats.tokenizer(fault + chats.CHATML)).layouts(TWO)
