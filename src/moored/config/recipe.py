"""A recipe file, what the command line lays over it, and where the relative paths in it lead.

How YAML is read is `document.py`'s; what the keys mean is the sections' and `config.py`'s.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moored.config.document import Document
from moored.config.section import Key, dotted_key
from moored.utils.errors import UserError, UserErrors

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Plain values with the place each came from.

    `lines` has the line of every key and list entry of the file; `overridden` the keys that the
    command line set; `problems` what was wrong with the text itself, one line each.
    """

    file: str
    folder: Path
    data: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=lambda: {})
    overridden: frozenset[Key] = frozenset()
    problems: tuple[str, ...] = ()

    def is_overridden(self, key: Key) -> bool:
        """Whether the command line set this key, or something that holds it."""
        return any(key[: len(k)] == k for k in self.overridden)

    def is_new(self, key: Key) -> bool:
        """Whether the command line set this key, or a part of it that the file does not have."""
        holds_one = any(k[: len(key)] == key for k in self.overridden)
        return self.is_overridden(key) or (holds_one and key not in self.lines)

    def where(self, key: Key) -> str:
        """`recipe.yaml:12`, the nearest line known for the key, or `command line`."""
        if self.is_new(key):
            return "command line"
        for end in range(len(key), 0, -1):
            if key[:end] in self.lines:
                return f"{self.file}:{self.lines[key[:end]]}"
        return f"{self.file}:1"

    def line(self, key: Key, message: str) -> str:
        """One problem as one line."""
        dotted = dotted_key(key)
        return f"{self.where(key)}: {dotted}: {message}" if dotted else f"{self.file}: {message}"


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, else an empty string."""
    by_lower = {k.lower().replace("-", "_"): k for k in known}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def shorten(value: object, limit: int = 60) -> str:
    """A value as it is shown in a message: one line, not long."""
    text = repr(value)
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def read_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    empty: str = "the recipe is empty: give at least model, data and train",
) -> Recipe:
    """Reads a recipe file and lays the overrides over it; `empty` is said of one without content.

    Raises:
        UserError: the file cannot be read as one YAML mapping, with the line and the fix.
    """
    path = Path(path)
    text = _read_text(path)
    builder = Document(str(path))
    data = builder.parse(text)
    if data is None:
        raise UserError(f"{path}: {empty}")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"the value {shorten(data)}"
        raise UserError(
            f"{path}:{builder.top_line}: a recipe is a mapping (key: value) at the top, got {kind}"
        )
    recipe = Recipe(
        file=str(path),
        folder=Path(os.path.abspath(path)).parent,
        data=data,
        lines=builder.lines,
        problems=tuple(builder.problems),
    )
    return _override(recipe, overrides)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_neighbour(path)}") from None
    except IsADirectoryError:
        inside = [p for p in sorted(path.iterdir()) if p.suffix in (".yaml", ".yml")]
        names = " or ".join(str(p) for p in inside[:3])
        hint = f"; did you mean {names}?" if inside else ", and no recipe is in it"
        raise UserError(f"{path}: a recipe is a file, this is a folder{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: the recipe cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB: this is not a recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}): save it as UTF-8"
        ) from None


def _neighbour(path: Path) -> str:
    """Names the recipe that was probably meant: same folder, near name."""
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist"
    stems = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".yml")}
    wanted = path.stem if path.suffix in (".yaml", ".yml") else path.name
    near = difflib.get_close_matches(wanted, stems, n=1, cutoff=0.6)
    return f"; did you mean {stems[near[0]]}?" if near else ""


# Setting one of these on the command line takes the place of its file's alternative.
_ALTERNATIVES = (
    frozenset({"steps", "epochs"}),
    frozenset({"global_batch_sequences", "global_batch_tokens"}),
    frozenset({"path", "hub", "builtin"}),
)


def _override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    problems = list(recipe.problems)
    done: dict[Key, str] = {}
    for text in overrides:
        try:
            key = _apply(recipe, text, done)
        except UserError as error:
            problems.extend(str(error).splitlines())
            continue
        done[key] = text
    return Recipe(
        file=recipe.file,
        folder=recipe.folder,
        data=recipe.data,
        lines=recipe.lines,
        overridden=frozenset(done),
        problems=tuple(problems),
    )


def _apply(recipe: Recipe, text: str, done: Mapping[Key, str]) -> Key:
    dotted, equals, value_text = text.partition("=")
    dotted = dotted.strip()
    if not equals:
        raise UserError(
            f"command line: {shorten(text)} is not an override: write key=value, "
            "for example optim.learning_rate=1e-4"
        )
    if not dotted or not all(dotted.split(".")):
        raise UserError(
            f"command line: {shorten(text)}: an override is key=value with a dotted key"
        )
    builder = Document("command line")
    try:
        value = builder.parse(value_text)
    except UserError as error:
        reason = re.sub(r"^command line(:\d+)?: ", "", str(error))
        raise UserError(f"command line: {dotted}: {reason}") from None
    if builder.problems:
        reasons = [re.sub(r"^command line:\d+: ", "", p) for p in builder.problems]
        raise UserErrors([f"command line: {dotted}: {reason}" for reason in reasons])

    key: Key = ()
    at: Any = recipe.data
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step = _step(at, part, dotted_key(key))
        key = (*key, step)
        if not last:
            if isinstance(at, dict) and at.get(step) is None:
                at[step] = {}
            at = at[step]
            continue
        if key in done:
            raise UserError(f"command line: {dotted}: given twice ({done[key]}, {text}): keep one")
        lost = next((other for k, other in done.items() if k[: len(key)] == key), None)
        if lost is not None:
            raise UserError(f"command line: {dotted}: replaces {lost}: write it first, or keep one")
        at[step] = value
        if isinstance(at, dict) and value is not None:
            _drop_alternatives(at, str(step), key[:-1], done)
    return key


def _step(at: Any, part: str, parent: str) -> str | int:
    if isinstance(at, list):
        count = len(at)  # pyright: ignore[reportUnknownArgumentType]
        if not part.isdecimal():
            raise UserError(
                f"command line: {parent} is a list: {part!r} is not an index; "
                f"write {parent}.0 to {parent}.{max(count - 1, 0)}"
            )
        if int(part) >= count:
            raise UserError(
                f"command line: {parent} has {count} entries, so {parent}.{part} does not exist: "
                f"indices start at 0, or set the whole list with {parent}='[...]'"
            )
        return int(part)
    if isinstance(at, dict):
        return part
    raise UserError(f"command line: {parent} is {shorten(at)}, so it has no key {part!r}")


def _drop_alternatives(at: dict[str, Any], name: str, parent: Key, done: Mapping[Key, str]) -> None:
    for group in _ALTERNATIVES:
        if name in group:
            for other in group - {name}:
                if (*parent, other) not in done:
                    at.pop(other, None)


# ---------------------------------------------------------------- paths

# The options that are paths: the file's lead from its folder, overrides from the current one.
_PATHS: tuple[Key, ...] = (
    ("model", "name_or_path"),
    ("data", "chat_template"),
    ("data", "train", "*", "path"),
    ("data", "eval", "*", "path"),
    ("retention", "*", "path"),
    ("regularizer", "replay", "*", "path"),
    ("regularizer", "budget", "probe", "path"),
    ("regularizer", "anchors", "path"),
    ("compare", "*", "replay", "*", "path"),
    ("compare", "*", "budget", "probe", "path"),
    ("compare", "*", "anchors", "path"),
    ("output", "dir"),
)
# A folder of `Dataset.save_to_disk` is given where a name of the hub may stand.
_HUBS: tuple[Key, ...] = tuple((*key[:-1], "hub") for key in _PATHS if key[-1] == "path")


def resolve_paths(recipe: Recipe) -> None:
    """Make the paths of a recipe, and of its overrides, absolute; in place."""
    data = recipe.data
    output = data.setdefault("output", {})
    if isinstance(output, dict) and "dir" not in output:
        output["dir"] = os.path.abspath("runs")
    for pattern in (*_PATHS, *_HUBS):
        for holder, last, key in matches(data, pattern):
            value = holder[last]
            if not isinstance(value, str) or not value:
                continue
            folder = Path.cwd() if recipe.is_overridden(key) else recipe.folder
            full = os.path.abspath(folder / os.path.expanduser(value))
            if last == "hub":
                is_path = _is_marked(value) or _is_saved(full)
            else:
                is_path = key != ("model", "name_or_path") or _is_local(value, full)
            if is_path:
                holder[last] = full


def _is_local(name: str, full: str) -> bool:
    """Whether a model is a path rather than a hub name."""
    return _is_marked(name) or name.endswith(".gguf") or os.path.exists(full)


def _is_marked(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _is_saved(folder: str) -> bool:
    files = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


def matches(at: Any, pattern: Key, key: Key = ()) -> Iterator[tuple[Any, Any, Key]]:
    """What stands at the places of a pattern, in which `*` is any name: holder, name, whole key."""
    part, rest = pattern[0], pattern[1:]
    if part == "*":
        if isinstance(at, list):
            names: list[Any] = list(range(len(at)))  # pyright: ignore[reportUnknownArgumentType]
        else:
            names = list(at) if isinstance(at, dict) else []  # pyright: ignore[reportUnknownArgumentType]
    else:
        names = [part] if isinstance(at, dict) and part in at else []
    for name in names:
        if rest:
            yield from matches(at[name], rest, (*key, name))
        else:
            yield at, name, (*key, name)
