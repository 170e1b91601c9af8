"""Sources to samples: formats, ids, lengths, fingerprints, held-out data, retention corpora."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chats
from datakit import CHAT, EOS, HEADER, PLAIN_TOKENIZER, TOKENIZER, config, jsonl, load, turn
from moored import data
from moored.config import Corpus
from moored.data.samples import SampleSet, load_samples
from moored.utils.errors import UserError, UserErrors


def texts(found: SampleSet, tokenizer=TOKENIZER) -> list[tuple[str, str]]:
    """(all but the targets, targets) of each sample."""
    return [
        (
            tokenizer.decode(one.input_ids[~one.label_mask]),
            tokenizer.decode(one.input_ids[one.label_mask]),
        )
        for one in found
    ]


def test_the_three_formats_in_one_file(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"messages": CHAT}, {"prompt": "hello", "completion": "hi"}, {"text": "hello there"}],
    )
    found = load(path)
    asked = HEADER + "hello<|im_end|>\n<|im_start|>assistant\n"
    assert texts(found) == [
        (asked, "hi<|im_end|>"),
        (asked, "hi<|im_end|>"),
        ("", "hello there" + EOS),
    ]
    assert [one.sample_id for one in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_prompt_and_completion_without_a_chat_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": " there"}])
    assert texts(load(path, PLAIN_TOKENIZER), PLAIN_TOKENIZER) == [("<s>hello", " there" + EOS)]
    chat = jsonl(tmp_path / "b.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: .*no chat template: set data\.chat_template"):
        load(chat, PLAIN_TOKENIZER)
    template = tmp_path / "template.jinja"
    template.write_text(chats.LLAMA3)
    found = load(path, PLAIN_TOKENIZER, chat_template=template)
    assert texts(found, PLAIN_TOKENIZER)[0][1] == "there<|eot_id|>"


def rows_of(kind: str) -> list[dict[str, Any]]:
    return {
        "messages": [{"messages": CHAT, "score": 1}, {"messages": CHAT * 2, "score": 2}],
        "prompt_completion": [
            {"prompt": "a", "completion": "b"},
            {"prompt": "c", "completion": "d"},
        ],
        "text": [{"text": "hello"}, {"text": "there"}],
    }[kind]


@pytest.mark.parametrize("kind", ["messages", "prompt_completion", "text"])
def test_every_kind_of_file_gives_the_same_samples(tmp_path, kind):
    rows = rows_of(kind)
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "pretty.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "windows.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "train.jsonl", rows)
    expected = texts(load(tmp_path / "a.jsonl"))
    for name in ("pretty.json", "lines.json", "windows.jsonl", "a.parquet"):
        assert texts(load(tmp_path / name)) == expected, name
    for name in ("saved", "hub"):
        recipe = config([{"hub": str(tmp_path / name)}])
        found = load_samples(recipe.data.train, TOKENIZER, recipe.data)
        assert texts(found) == expected, name
        assert found.sources[0].name == f"{name}/train"


def test_ids_are_lines_so_that_equal_rows_differ(tmp_path):
    row = json.dumps({"text": "hello"})
    (tmp_path / "a.jsonl").write_text(f"{row}\n\n{row}\n")
    (tmp_path / "b.json").write_text(f"[\n{row},\n\n{row}]")
    assert [one.sample_id for one in load(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]
    assert [one.sample_id for one in load(tmp_path / "b.json")] == ["b.json:2", "b.json:4"]


def test_sources_of_one_name_keep_their_samples_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "a.jsonl", [{"text": "hello"}])
    recipe = config([{"path": str(tmp_path / folder / "a.jsonl")} for folder in ("x", "y", "y")])
    found = load_samples(recipe.data.train, TOKENIZER, recipe.data)
    assert [one.sample_id for one in found] == ["a.jsonl:1", "a.jsonl#2:1", "a.jsonl#3:1"]


def test_a_folder_is_read_in_order_without_its_readme(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    jsonl(tmp_path / "data" / "b.jsonl", [{"text": "hello"}])
    jsonl(tmp_path / "data" / "sub" / "a.jsonl", [{"text": "hello"}])
    (tmp_path / "data" / "README.md").write_text("about these data")
    (tmp_path / "data" / ".hidden.jsonl").write_text("not json")
    found = load(tmp_path / "data")
    assert [one.sample_id for one in found] == ["data/b.jsonl:1", "data/sub/a.jsonl:1"]


def test_plain_files_are_cut_into_windows_that_lose_nothing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"hello there\r\nline \n" * 30)
    found = load(tmp_path / "a.txt", PLAIN_TOKENIZER, max_length=16)
    joined = "".join(PLAIN_TOKENIZER.decode(one.input_ids[1:]) for one in found)
    assert joined == "hello there\nline \n" * 30 + EOS
    assert {int(one.input_ids[0]) for one in found} == {PLAIN_TOKENIZER.bos_token_id}
    assert [len(one) for one in found][:-1] == [16] * (len(found) - 1)
    assert found.sources[0].sample_ids[:2] == ["a.txt:1.0", "a.txt:1.1"]


def test_fields_name_the_columns_and_format_picks_among_them(tmp_path):
    row = {"question": "hello", "answer": "hi", "text": "unused"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    fields = {"prompt": "question", "completion": "answer"}
    found = load(path, source={"fields": fields, "format": "prompt_completion"})
    assert texts(found)[0][1] == "hi<|im_end|>"
    assert texts(load(path, source={"format": "text"})) == [("", "unused" + EOS)]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet", source={"fields": fields, "format": "prompt_completion"})
    assert texts(found)[0][1] == "hi<|im_end|>"


def test_limit_takes_the_first_and_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello"}\n' * 3 + "broken\n")
    assert len(load(path, source={"limit": 3})) == 3


def test_long_samples_are_dropped_counted_and_too_many_refused(tmp_path, caplog):
    rows = [{"text": "hello " * n} for n in (2, 3, 4, 40, 60)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    longest = len(TOKENIZER(rows[3]["text"])["input_ids"]) + 1
    found = load(path, max_length=32, max_dropped_fraction=0.5)
    assert len(found) == 3
    assert "data.train: 2 of 5 samples dropped (2 longer than data.max_length=32)" in caplog.text
    with pytest.raises(UserError) as caught:
        load(path, max_length=32, max_dropped_fraction=0.2)
    assert re.search(
        rf"2 of 5 samples dropped .*max_dropped_fraction=0\.2.*max_length={longest} or more, or "
        r"data\.too_long=truncate",
        str(caught.value),
    )
    assert len(load(path, max_length=longest, max_dropped_fraction=0.2)) == 4  # the fix it names
    cut = load(path, max_length=32, too_long="truncate")
    assert [len(one) for one in cut][3:] == [32, 32]
    assert cut.describe()[0]["num_truncated"] == 2


def test_samples_without_a_target_are_dropped_and_counted(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [turn("user", "hello " * 90), CHAT[1]]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = load(path, max_length=64, too_long="truncate", max_dropped_fraction=0.5)
    assert [one.sample_id for one in found] == ["a.jsonl:1"]
    assert found.describe()[0]["num_dropped"] == 1
    with pytest.raises(
        UserError,
        match=r"1 of 2 samples dropped \(1 without a token to learn\).*max_length=\d+ or more$",
    ):
        load(path, max_length=64, too_long="truncate")
    with pytest.raises(UserError, match="1 of 1 samples dropped"):
        load(jsonl(path_of(tmp_path), rows[1:]), max_length=64, max_dropped_fraction=1.0)


def path_of(tmp_path: Path) -> Path:
    return tmp_path / "other.jsonl"


def test_tokens_the_model_does_not_know_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "hello there"}])
    recipe = config([{"path": path}])
    size = max(TOKENIZER("hello there")["input_ids"])
    with pytest.raises(
        UserError, match=rf"a\.jsonl:2: token '.*' has id {size}, outside .* of {size}"
    ):
        load_samples(recipe.data.train, TOKENIZER, recipe.data, size)


def test_fingerprints_tell_tokens_masks_and_ids_apart(tmp_path):
    def fingerprint(*rows: dict[str, Any], name: str = "a.jsonl", **options: Any) -> str:
        (tmp_path / name).unlink(missing_ok=True)
        return load(jsonl(tmp_path / name, list(rows)), **options).fingerprint()

    first = fingerprint({"prompt": "a", "completion": "b"})
    assert first == fingerprint({"prompt": "a", "completion": "b"})
    assert (
        len(
            {
                first,
                fingerprint({"prompt": "a", "completion": "c"}),
                fingerprint({"prompt": "a", "completion": "b"}, name="b.jsonl"),
                fingerprint({"prompt": "a", "completion": "b"}, source={"weight": 2.0}),
                fingerprint({"text": "a"}),
                fingerprint({"text": "a"}, {"text": "b"}),
            }
        )
        == 6
    )


def test_eval_samples_and_batches_are_the_same_for_every_number_of_ranks(tmp_path):
    first = jsonl(
        tmp_path / "a.jsonl", [{"prompt": "x" * n, "completion": "b"} for n in range(1, 8)]
    )
    second = jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    sources = [{"path": first}, {"path": second}]
    recipe = config(sources, data={"eval": sources}, evaluation={"max_examples": 5})
    found = data.eval_samples(recipe, TOKENIZER, vocab_size=len(TOKENIZER))
    assert [one.sample_id for one in found] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "a.jsonl:2",
        "b.jsonl:2",
        "a.jsonl:3",
    ]
    for dp_size in (1, 2, 3, 7):
        shares = [
            data.eval_batches(
                found, micro_batch_size=2, dp_rank=rank, dp_size=dp_size, pad_token_id=0
            )
            for rank in range(dp_size)
        ]
        assert len({len(share) for share in shares}) == 1
        seen = sorted(i for share in shares for batch in share for i in batch.sample_ids)
        assert seen == sorted(one.sample_id for one in found)


def test_streamed_held_out_data_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello"}])
    recipe = config([{"path": path}], data={"eval": [{"path": path, "streaming": True}]})
    with pytest.raises(UserError, match=r"data\.eval\.0\.streaming: .*remove it"):
        data.check_data(recipe)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN_TOKENIZER], ids=["chat", "plain"])
def test_prompts_are_what_comes_before_the_last_answer(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": " there "}])
    recipe = config([{"path": path}], data={"eval": [{"path": path}]})
    (prompt,) = data.prompts(recipe, tokenizer)
    (sample,) = data.eval_samples(recipe, tokenizer)
    asked = len(prompt.input_ids)
    assert prompt.input_ids == sample.input_ids[:asked].tolist()
    assert sample.label_mask.tolist() == [False] * asked + [True] * (len(sample) - asked)
    assert (prompt.sample_id, prompt.completion) == ("a.jsonl:1", " there ")
    stops = tokenizer.convert_ids_to_tokens(list(prompt.stop_token_ids))
    assert stops == (["<|im_end|>", EOS] if tokenizer is TOKENIZER else [EOS])


def test_prompts_of_longer_conversations(tmp_path):
    long = [turn("user", "hello " * 500), CHAT[1]]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT * 2}, {"messages": long}])
    recipe = config([{"path": path}], data={"eval": [{"path": path}], "max_dropped_fraction": 0.5})
    (prompt,) = data.prompts(recipe, TOKENIZER)  # the long one is dropped, as in training
    assert TOKENIZER.decode(prompt.input_ids) == TOKENIZER.apply_chat_template(
        (CHAT * 2)[:-1], add_generation_prompt=True, tokenize=False
    )


def test_an_answer_that_is_not_to_be_learned_is_not_asked_for(tmp_path):
    rows = [{"messages": [CHAT[0], CHAT[1] | {"loss": flag}]} for flag in (True, False, None)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = data.prompts(config([{"path": path}], data={"eval": [{"path": path}]}), TOKENIZER)
    assert [prompt.sample_id for prompt in found] == ["a.jsonl:1", "a.jsonl:3"]


def corpus(**options: Any) -> Corpus:
    return Corpus.model_validate(options)


def test_windows_cover_the_joined_documents(tmp_path):
    documents = ["hello there\n" * 8, "line\n\nline", "  ", "user assistant"]
    path = jsonl(tmp_path / "a.jsonl", [{"body": text} for text in documents])
    whole = "\n\n".join(text.strip("\n") for text in documents if text.strip())
    ids = PLAIN_TOKENIZER(whole, add_special_tokens=False)["input_ids"]
    bos = PLAIN_TOKENIZER.bos_token_id
    found = data.retention_samples(
        "book",
        corpus(path=path, text_field="body", window_tokens=9, max_tokens=1000),
        PLAIN_TOKENIZER,
    )
    assert [i for one in found for i in one.input_ids[1:].tolist()] == ids
    assert all(one.input_ids[0] == bos and not one.label_mask[0] for one in found)
    assert all(one.label_mask[1:].all() for one in found)
    assert [len(one) for one in found[:-1]] == [9] * (len(found) - 1)
    assert [one.sample_id for one in found[:2]] == ["book:0", "book:1"]
    few = data.retention_samples(
        "book",
        corpus(path=path, text_field="body", window_tokens=9, max_tokens=20),
        PLAIN_TOKENIZER,
    )
    assert sum(len(one) - 1 for one in few) == 20
    without_bos = data.retention_samples(
        "book", corpus(path=path, text_field="body", window_tokens=9, max_tokens=20), TOKENIZER
    )
    assert [len(one) for one in without_bos] == [9, 9, 2]
    assert [one.num_targets for one in without_bos] == [8, 8, 1]


def test_only_the_last_word_is_scored(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"text": "hello there hello"}, {"text": "one"}, {"text": "how are naïve\n"}],
    )
    for tokenizer in (TOKENIZER, PLAIN_TOKENIZER):
        found = data.retention_samples("l", corpus(path=path, target="last_word"), tokenizer)
        assert [one.sample_id for one in found] == ["l:1", "l:3"]
        assert [tokenizer.decode(one.input_ids[one.label_mask]) for one in found] == [
            " hello",
            " naïve",
        ]
        start = len(tokenizer("")["input_ids"])
        assert tokenizer.decode(found[0].input_ids[start:]) == "hello there hello"
    short = data.retention_samples(
        "l", corpus(path=path, target="last_word", window_tokens=2, max_tokens=9), TOKENIZER
    )
    assert tokenizer_text(short[0]) == " hello"
    assert len(short[0]) == 2


def tokenizer_text(sample) -> str:
    return TOKENIZER.decode(sample.input_ids[sample.label_mask])


def test_corpora_from_everywhere(tmp_path):
    (tmp_path / "a.txt").write_text("hello there")
    (tmp_path / "b.md").write_text("how are you")
    pq.write_table(pa.table({"text": ["hello", "", "there"]}), tmp_path / "c.parquet")
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "test.jsonl", [{"text": "hello"}])
    assert data.resolve_text(corpus(path=str(tmp_path / "a.txt"))) == ["hello there"]
    assert data.resolve_text(corpus(path=str(tmp_path / "c.parquet"))) == ["hello", "there"]
    assert data.resolve_text(corpus(hub=str(hub))) == ["hello"]
    reference = data.resolve_text(corpus(builtin="python-reference"))
    assert len(reference) > 50
    assert reference == data.resolve_text(corpus(builtin="python-reference"))
    assert any("assert_stmt" in text for text in reference)


def test_bad_corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = jsonl(tmp_path / "a.jsonl", [{"txt": "hello"}, {"txt": 3}])
    with pytest.raises(UserErrors) as caught:
        data.resolve_text(corpus(path=path), "retention.book")
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0] == (
        "a.jsonl:1: no field 'text', found 'txt'; did you mean 'txt'? "
        "Then set retention.book.text_field=txt"
    )
    blank = jsonl(tmp_path / "b.jsonl", [{"text": " "}])
    with pytest.raises(UserError, match=r"retention\.book: holds no text"):
        data.resolve_text(corpus(path=blank), "retention.book")
    one = jsonl(tmp_path / "c.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"retention\.book: too short, two words"):
        data.retention_samples("book", corpus(path=one, target="last_word"), TOKENIZER)
    with pytest.raises(UserError, match=r"retention\.book\.hub=nobody/none: .*: load it once"):
        data.resolve_text(corpus(hub="nobody/none"), "retention.book")


def test_a_text_is_parted_by_its_domains(tmp_path):
    rows = [
        {"text": f"{name} text number {i} of this domain", "from": name}
        for i in range(4)
        for name in ("law", "R & D")
    ]
    path = jsonl(tmp_path / "ours.jsonl", rows)
    whole = corpus(path=path, domain_field="from")
    parts = data.by_domain("ours", whole)
    assert {name: part.domain for name, part in parts.items()} == {
        "ours/law": "law", "ours/R-D": "R & D",
    }  # fmt: skip
    assert data.resolve_text(parts["ours/law"]) == [r["text"] for r in rows if r["from"] == "law"]
    assert len(data.resolve_text(whole)) == 8
    (sample,) = data.retention_samples("ours/law", parts["ours/law"], TOKENIZER)
    assert sample.sample_id == "ours/law:0"
    assert "R & D" not in TOKENIZER.decode(sample.input_ids)
    assert data.by_domain("ours", corpus(path=path)) == {"ours": corpus(path=path)}
    with pytest.raises(UserError, match="holds no text of from=tax"):
        data.resolve_text(corpus(path=path, domain_field="from", domain="tax"))
    many = jsonl(tmp_path / "b.jsonl", [{"text": "a b", "from": f"{i}"} for i in range(21)])
    with pytest.raises(UserError, match="domain_field=from: 21 different values, where 1 to 20"):
        data.by_domain("ours", corpus(path=many, domain_field="from"))
    alike = jsonl(tmp_path / "c.jsonl", [{"text": "a b", "from": v} for v in ("a b", "a-b")])
    with pytest.raises(UserError, match="differ only in signs"):
        data.by_domain("ours", corpus(path=alike, domain_field="from"))
    lacking = jsonl(tmp_path / "d.jsonl", [{"text": "a b", "from": None}])
    with pytest.raises(UserError, match="no domain in from: give one"):
        data.resolve_text(corpus(path=lacking, domain_field="from"))


def test_known_texts_come_from_the_hub_by_their_short_names(tmp_path, monkeypatch):
    # The hub's layout in a folder of that name, which `datasets` reads as it would the hub's.
    monkeypatch.chdir(tmp_path)
    for hub, subset, rows in (
        ("Salesforce/wikitext", "wikitext-103-raw-v1", ["", " = Title = \n", " A line . \n"]),
        ("EleutherAI/lambada_openai", "default", ["hello there how are you"]),
    ):
        folder = tmp_path / hub
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": rows}), folder / "test.parquet")
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: test\n"
            "    path: test.parquet\n---\n"
        )
    assert data.resolve_text(corpus(builtin="wikitext-103")) == [" = Title = \n", " A line . \n"]
    lambada = corpus(builtin="lambada")
    assert data.resolve_text(lambada) == ["hello there how are you"]
    (sample,) = data.retention_samples("lambada", lambada, TOKENIZER)
    assert TOKENIZER.decode(sample.input_ids[sample.label_mask]) == " you"


def test_known_texts_without_a_network_say_what_to_do():
    with pytest.raises(UserError) as caught:
        data.resolve_text(corpus(builtin="lambada"), "retention.last")
    line = str(caught.value)
    assert line.startswith("retention.last.builtin=lambada: EleutherAI/lambada_openai: ")
    assert line.endswith(
        ": run `moored prepare` with this recipe where the hub can be reached, or give a local "
        "copy as path instead of builtin"
    )
    assert "\n" not in line


def test_known_texts_are_measured_as_is_common_unless_the_recipe_says():
    wikitext, lambada = corpus(builtin="wikitext-103"), corpus(builtin="lambada")
    assert (wikitext.target, wikitext.max_tokens, wikitext.window_tokens) == ("all", 100_000, 1024)
    assert (lambada.target, lambada.max_tokens, lambada.window_tokens) == (
        "last_word",
        100_000,
        512,
    )
    short = corpus(builtin="wikitext-103", max_tokens=300)
    assert (short.max_tokens, short.window_tokens) == (300, 300)
    own = corpus(builtin="lambada", target="all", window_tokens=64)
    assert (own.target, own.window_tokens) == ("all", 64)
    assert corpus(builtin="python-reference").max_tokens == 5000
