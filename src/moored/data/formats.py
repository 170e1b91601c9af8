"""Decoding one local file: jsonl, json, parquet, txt or md to numbered rows.

Which files belong to a source is `files.py`'s matter, what the rows mean `records.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moored.data.layouts import MEDIA, UNREAD, as_written, is_list, kind_of, may_hold_text

STRUCTURED = (".jsonl", ".json", ".parquet")
PLAIN = (".txt", ".md")
MAX_LINE_BYTES = 64 * 2**20  # one sample; a longer line is a file of another format
_MAGIC = {
    b"\x1f\x8b": "is gzip-compressed: decompress it first (gunzip)",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed: decompress it first (unzstd)",
    b"PAR1": "is a parquet file: rename it to .parquet",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}

Numbered = Iterator[tuple[int, dict[str, Any] | str]]  # (line or row, value or problem)


def read_file(path: Path, columns: tuple[str, ...], beside: tuple[str, ...] = ()) -> Numbered:
    """The rows of a file, read on demand (a .json file at once).

    Args:
        path: a regular file with a suffix of STRUCTURED or PLAIN.
        columns: the only ones wanted; saves reading the others of a parquet file, which are UNREAD
            there where they may hold text, else None.
        beside: read as well, whatever they hold.

    Yields:
        Line or row number from 1, and the row, or in its place what is wrong, in words.

    Raises:
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, columns, beside)
    return {".jsonl": _jsonl, ".json": _json}.get(suffix, _plain)(path)


def count_rows(path: Path) -> int | None:
    """How many rows a file has, without decoding them; None where only decoding tells.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if suffix != ".jsonl":
        return 1 if suffix in PLAIN else None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _binary(head: bytes) -> str | None:
    for magic, problem in _MAGIC.items():
        if head.startswith(magic):
            return problem
    return "is not a text file (it holds NUL bytes)" if b"\0" in head else None


def _jsonl(path: Path) -> Numbered:
    with path.open("rb") as file:
        head = file.read(8192)
        if problem := _binary(head):
            yield 1, problem
            return
        if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield (
                1,
                "starts with '[', so it is one JSON list, not one object a line: rename to .json",
            )
            return
        file.seek(0)
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, f"longer than {MAX_LINE_BYTES >> 20} MiB: write one sample a line"
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _object(line.rstrip(b"\r\n"))


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}): convert it"
    except json.JSONDecodeError as error:
        return f"broken JSON at column {error.colno} ({error.msg}): write one JSON object a line"
    except (ValueError, RecursionError) as error:
        return f"unusable JSON ({str(error)[:80]}): write one flat JSON object a line"
    if not isinstance(value, dict):
        return f'holds {kind_of(value)}, not an object: write {{"field": "value"}}'
    return value


def _json(path: Path) -> Numbered:
    content = path.read_bytes()
    if problem := _binary(content[:8192]):
        yield 1, problem
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield line, f"not UTF-8 (byte 0x{content[error.start]:02x}): convert the file"
        return
    start = len(text) - len(text.lstrip())
    if not text[start:]:
        return
    if text[start] == "[":
        yield from _json_list(text, start + 1)
    elif text[start] == "{" and _is_one_object(text):
        yield (
            1,
            "holds one object, not a list: write [{...}, ...], or .jsonl with one object a line",
        )
    else:
        yield from _jsonl(path)  # one object a line under the name .json is common


def _is_one_object(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.lstrip().split("\n", 1)[0].strip() == "{"  # spread over lines, and broken
    return text.strip().count("\n") > 0  # a single line is also a .jsonl of one sample


def _json_list(text: str, position: int) -> Numbered:
    """Items one by one, so that each has the line it starts in."""
    decoder = json.JSONDecoder()
    counted, line = 0, 1

    def space(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position = space(position)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield error.lineno, f"broken JSON at column {error.colno} ({error.msg}): mend it here"
            return
        except (ValueError, RecursionError) as error:
            yield line, f"unusable JSON ({str(error)[:80]}): write flat objects"
            return
        if isinstance(value, dict):
            yield line, value
        else:
            yield line, f'holds {kind_of(value)}, not an object: write {{"field": "value"}}'
        position = space(end)
        if text[position : position + 1] == ",":
            position = space(position + 1)
        elif text[position : position + 1] != "]":
            break
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        yield line, "broken JSON (the list does not end with ']' here): mend it here"


def _parquet(path: Path, columns: tuple[str, ...], beside: tuple[str, ...]) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        return
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = [name for name in schema.names if name in columns]
            if not wanted:
                yield 1, dict.fromkeys(schema.names)  # the message then names what there is
                return
            for name in wanted:
                if wanted.count(name) > 1:
                    yield 1, f"has two columns {name!r}: rename one"
                    return
                problem = _column_problem(name, schema.field(name).type)
                if problem and name not in beside:
                    yield 1, problem
                    return
            wanted += [n for n in schema.names if n in beside and n not in wanted]
            kinds = {name: schema.field(name).type for name in wanted}
            others = unread({n: schema.field(n).type for n in schema.names if n not in wanted})
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, {n: as_written(row[n], kinds[n]) for n in row} | others
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        reason = str(error).splitlines()[0][:120]
        yield number + 1, f"not a readable parquet file ({reason}): write it again"


def unread(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for columns that are not read, by their Arrow types: UNREAD, or None.

    Pictures and sounds are never read, and always a part of their sample.
    """
    return {
        name: UNREAD if kind is None or name in MEDIA or may_hold_text(kind) else None
        for name, kind in kinds.items()
    }


def _column_problem(name: str, kind: Any) -> str | None:
    import pyarrow.types as types

    if may_hold_text(kind) or is_list(kind) or types.is_null(kind) or types.is_struct(kind):
        return None  # judged row by row
    return f"column {name!r} holds {kind}, not text: convert the column"


def _plain(path: Path) -> Numbered:
    content = path.read_bytes()
    if problem := _binary(content[:8192]):
        yield 1, problem
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield line, f"not UTF-8 (byte 0x{content[error.start]:02x}): convert the file"
        return
    if text.strip():
        yield 1, {"text": text.replace("\r\n", "\n")}
