"""The reference of recipes, docs/recipe.md, written from the schema.

    python -m moored.config.recipe_docs > docs/recipe.md

Options are described where they are defined; nothing about a single one is known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import yaml
from pydantic.json_schema import GenerateJsonSchema, NoDefault
from pydantic_core import core_schema

from moored.config.config import Config
from moored.config.section import Section

_HEAD = """# Recipes: every option

Written from the schema by `python -m moored.config.recipe_docs > docs/recipe.md`; a test holds
it true. A recipe is strict YAML: an unknown key, or an option without effect, is an error with a
suggestion. [data.md](data.md) says what the rows of a data set look like and which of their
tokens are learned.

`moored train RECIPE.yaml optim.learning_rate=1e-4` overrides any option by its dotted key
(`data.train.0.limit=100` in a list). An override of one of `steps` and `epochs`, of
`global_batch_sequences` and `global_batch_tokens`, or of `path`, `hub` and `builtin` takes the
place of the file's other one. One that switches something off (`regularizer.kind=none`) takes the
file's options of it along. An override that has no effect itself is an error, as in the file.

Relative paths resolve against the recipe's folder, those of overrides against the current one (also
`output.dir` where it is left out).
"""


class _Schema(GenerateJsonSchema):
    """The schema, with what default factories make; of a section, what they set in it."""

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        if "default_factory" not in schema:
            return schema.get("default", NoDefault)
        return _plain(cast("Any", schema["default_factory"])())


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_unset=True)
    return [_plain(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def reference(root: type[Section] = Config, head: str = _HEAD) -> str:
    """The whole page as Markdown, of a recipe or of another file of sections."""
    schema = root.model_json_schema(schema_generator=_Schema)
    definitions: dict[str, Any] = schema["$defs"]
    lines = [head]
    for name, field in schema["properties"].items():
        section = _section_of(field, definitions)
        if section is None:
            lines += [f"## `{name}`", "", _text(field), ""]
            continue
        definition = definitions[section]
        lines += [f"## `{_title(name, field)}`", "", definition.get("description", "").strip(), ""]
        if field.get("description"):
            lines += [f"({_text(field)}{_left_out(field)})", ""]
        if section == "Regularizer" and name == "compare":
            continue
        lines += [*_table(section, definition, definitions), ""]
        for inner, value in definition["properties"].items():
            below = _section_of(value, definitions)
            if below is not None and inner == "train":  # data.train and data.eval are alike
                lines += [f"### `{name}.{inner}[]` and `{name}.eval[]`", ""]
                lines += [*_table(below, definitions[below], definitions), ""]
            elif below in ("Budget", "Anchors"):
                about = definitions[below].get("description", "").strip()
                lines += [f"### `{name}.{inner}`", "", about, ""]
                lines += [*_table(below, definitions[below], definitions), ""]
    return "\n".join(lines)


def _title(name: str, field: dict[str, Any]) -> str:
    if field.get("type") == "array":
        return f"{name}[]"
    return (
        f"{name}.NAME" if "additionalProperties" in field or "patternProperties" in field else name
    )


def _section_of(field: dict[str, Any], definitions: dict[str, Any]) -> str | None:
    """The section that a field holds: itself, in a list, or by name."""
    reference = next((value for value in _values(field) if str(value).startswith("#/$defs/")), None)
    return None if reference is None else str(reference).rpartition("/")[2]


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for key, inner in value.items():
            if key != "default":
                yield from _values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)


# Where the options of a section inside another are listed.
_SECTIONS: dict[str | None, str] = {
    "Source": "sections as `data.train[]`",
    "Corpus": "a section as `retention.NAME`",
    "Budget": "a section, see below",
    "Anchors": "a section, see below",
}


def _table(name: str, definition: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield "| option | value | default | what it is |"
    yield "|---|---|---|---|"
    required = definition.get("required", [])
    for option, field in definition["properties"].items():
        shown = "required" if option in required else _shown(field["default"])
        kind = _SECTIONS.get(_section_of(field, definitions), _kind(field))
        if name == "DataConfig" and "sections" in kind:
            kind = "sections, see below"
        yield f"| `{option}` | {kind} | {shown} | {_text(field)} |"


def _left_out(field: dict[str, Any]) -> str:
    """What a list of sections is where the recipe does not have it."""
    default = field.get("default")
    return f"; default: {_shown(default)}" if default and isinstance(default, list) else ""


def _shown(default: Any) -> str:
    """A default as a recipe would have it."""
    if default in ([], {}):
        return "empty"
    if not isinstance(default, (list, dict)):
        return f"`{json.dumps(default)}`"
    flow = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=10**6)
    return f"`{flow.strip()}`"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(choice) for choice in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = {"integer": "whole number", "number": "number", "boolean": "true or false"}.get(
        field.get("type", ""), {"array": "list", "object": "mapping"}.get(field.get("type", ""), "")
    )
    kind = kind or {"null": "null"}.get(field.get("type", ""), "text")
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in bounds.items() if key in field]
    return " ".join([kind, ", ".join(limits)]).strip()


def _text(field: dict[str, Any]) -> str:
    texts = [field.get("description", "")]
    texts += [choice.get("description", "") for choice in field.get("anyOf", [])]
    return next((text for text in texts if text), "").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
