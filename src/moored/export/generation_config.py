"""Where what is exported stops: at the tokens that end learned turns, and where its base does.

A model that was measured with these ends would go on past them in `generate`, which asks
`generation_config.json`; and whoever trains or serves it further asks its tokenizer.
"""

# transformers is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from moored.config import Config
from moored.data import load_samples, turn_ends
from moored.export.card.facts import End, Stops
from moored.models.base_files import BaseFiles
from moored.tracking.run_directory import RunDirectory
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
FILE = transformers.utils.GENERATION_CONFIG_NAME


def stops_of(run: RunDirectory | None, config: Config, located: BaseFiles) -> Stops:
    """The ends that a run wrote down; or, where it did not, those of the recipe's data.

    Args:
        run: None for an adapter from elsewhere.
        config: the recipe.
        located: the base.
    """
    tokenizer: Any = located.tokenizer
    state = {} if run is None else run.state()
    learned = [End(**end) for end in state.get("turn_ends") or ()]
    base = [(i, str(tokenizer.convert_ids_to_tokens(i))) for i in _ends_of_base(located)]
    return Stops(
        learned=tuple(learned or _ends_of_data(config, located)),
        base=tuple(End(id=i, token=token) for i, token in base),
    )


def _ends_of_data(config: Config, located: BaseFiles) -> list[End]:
    """The ends of turns in the recipe's data, of the first section that is still there."""
    data = config.data
    for section, sources in (("data.train", data.train), ("data.eval", data.eval)):
        try:
            samples = load_samples(
                sources, located.tokenizer, data, located.vocab_size, section=section
            )
        except UserError as error:
            log.warning("%s cannot be read any more (%s)", section, str(error).splitlines()[0])
        else:
            ends = turn_ends(samples, located.tokenizer, data.max_length)
            return [End(id=end.id, token=end.token, count=end.count) for end in ends]
    return []


def _ends_of_base(located: BaseFiles) -> list[int]:
    """The tokens at which stock `generate` stops the base."""
    path = located.source.path
    for name in (FILE, "config.json"):
        if (path / name).is_file():
            eos = json.loads((path / name).read_text()).get("eos_token_id")
            if eos is not None:
                return list(eos) if isinstance(eos, Sequence) else [eos]
    tokenizer: Any = located.tokenizer
    return [tokenizer.eos_token_id]


def write_generation_config(folder: Path, located: BaseFiles, stops: Stops) -> None:
    """Write the base's `generation_config.json`, which stops at the learned ends, too.

    Args:
        folder: of the export.
        located: the base.
        stops: where it stops.
    """
    source = located.source.path
    values: dict[str, Any] = {"transformers_version": transformers.__version__}
    if (source / FILE).is_file():
        values = json.loads((source / FILE).read_text())
    elif located.tokenizer.pad_token_id is not None:
        values["pad_token_id"] = located.tokenizer.pad_token_id
    ids = stops.ids
    values["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    (folder / FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def tokenizer_of(config: Config, located: BaseFiles, stops: Stops) -> Any:
    """The base's tokenizer, with the recipe's chat template, and the end of a turn as its end.

    Instruction-tuned models have it so. The end stays the base's where turns end with that, too,
    or where the template writes it.

    Raises:
        UserError: the template cannot be read.
    """
    tokenizer: Any = located.tokenizer
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = config.data.chat_template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.chat_template={config.data.chat_template} cannot be read ({error}): put it "
                "back, the model was trained with it"
            ) from error
    ends = [end.id for end in stops.learned]
    is_written = "eos_token" in str(tokenizer.chat_template)
    if ends and tokenizer.eos_token_id not in ends and not is_written:
        tokenizer.eos_token = stops.learned[0].token
    return tokenizer


def in_words(stops: Stops) -> str:
    """What `moored export` says of where generation stops."""
    if not stops.learned:
        return "no token of its own ends what was learned: it stops where its base does"
    learned, base = (
        ", ".join(f"{end.token!r} ({end.id})" for end in ends)
        for ends in (stops.learned, stops.base)
    )
    if stops.are_the_base_s:
        return f"turns end with {learned}, as the base's do"
    return (
        f"turns end with {learned}, and the base alone stops at {base}: generation_config.json "
        f"names both, else pass eos_token_id={stops.ids} to generate"
    )
