"""`moored export`: a finished run as a folder for others, whole and verified, or not there at all.

What is opened, merged, compared and measured of the weights stands beside; nothing of the run is
changed. Modes of what is written are those of the umask, since others are to read it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

from moored.config import Config
from moored.distributed.mesh import Mesh, leave_mesh, start_mesh
from moored.export import generation_config, merge
from moored.export.adapter_changes import adapter_deltas, deltas_summary
from moored.export.card import gather, markdown
from moored.export.card.facts import Card, Deltas, Merged, Provenance, Stops
from moored.export.card.gather import utc
from moored.export.resolve_target import (
    ADAPTER,
    ExportInput,
    base_of,
    open_input,
    warn_of_another_base,
)
from moored.export.verification import (
    Agreement,
    Outputs,
    Probe,
    compare,
    dtype_name,
    kl_per_token,
    make_probe,
    needed_import,
    stock_outputs,
    tolerance_of,
    trained_outputs,
)
from moored.models.adapters import require_scale, write_scaled
from moored.models.base_files import BaseFiles, resolve_base, resolve_dtype
from moored.utils import atomic_dir
from moored.utils.atomic_dir import write_json
from moored.utils.environment import rank_info, versions_of
from moored.utils.errors import UserError

FACTS = "export.json"
EXPORT_VERSIONS = ("moored", "torch", "transformers", "peft", "bitsandbytes")
SPARE_BYTES = 64 * 2**20  # tokenizer, probe, small files


def require_free_name(to: Path, run: Path) -> None:
    """Refuse a place that holds something, or lies in the run directory.

    Raises:
        UserError: see above.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise UserError(f"{to} exists and is not a folder: choose another --to")
    if to.is_dir() and any(to.iterdir()):
        raise UserError(f"{to} is not empty: choose another --to, or remove it")
    if to.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{to} lies in the run directory, which is Moored's: choose another --to")


def require_disk(folder: Path, num_bytes: int) -> None:
    """Refuse what will not fit, before it is made.

    Args:
        folder: an existing one on the disk in question.
        num_bytes: of the weights; what else is written is small.

    Raises:
        UserError: less is free.
    """
    need, free = num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, but the export takes "
            f"{need / 1e9:.2f} GB: free some, or choose another --to"
        )


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write `export.json`: facts, time, versions, and size and SHA-256 of each file in `folder`."""
    whole = {
        "format": 1,
        **facts,
        "versions": versions_of(EXPORT_VERSIONS),
        "created": utc(time.time()),
        "files": atomic_dir.contents(folder, "hashing what is exported"),
    }
    write_json(folder / FACTS, whole)


@contextlib.contextmanager
def publishing(to: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that gets the name `to` when the body ends well, and one for work; else neither.

    Yields:
        The folder to fill, and one beside it that goes in any case.

    Raises:
        UserError: something else took the name in the meantime.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir.temporary_beside(to) as temporary:
        new, work = temporary / "new", temporary / "work"
        new.mkdir()
        work.mkdir()
        yield new, work
        umask = os.umask(0)
        os.umask(umask)
        for path in (new, *new.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        atomic_dir.flush(new)
        try:
            os.rename(new, to)  # an empty folder may be there, and nothing else
        except OSError as error:
            raise UserError(f"{to} was filled by another process: choose another --to") from error
        atomic_dir.fsync_directory(to.parent)


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be exported.

    Attributes:
        given: the run or the adapter, as it is.
        adapter: the run's, or a copy at another scale.
        scale: factor of what was trained, 1 as trained.
        config: its recipe.
        located: its base on this machine.
        mesh: this process.
        folder: what is filled.
        work: for what is not kept.
        probe: what is compared.
        trained: the logits of the policy that was trained, with that adapter.
        stops: where generation is to stop.
        tokenizer: what is saved beside it.
    """

    given: ExportInput
    adapter: Path
    scale: float
    config: Config
    located: BaseFiles
    mesh: Mesh
    folder: Path
    work: Path
    probe: Probe
    trained: Outputs
    stops: Stops
    tokenizer: Any

    @property
    def double(self) -> bool | None:
        """How stock transformers must quantise the base to have the run's; None: not at all."""
        if self.config.model.quantization == "none" or merge.is_quantised(self.located.source.path):
            return None
        return self.config.model.double_quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What lies in the folder, and was verified.

    Attributes:
        facts: what `export.json` says of it.
        weights: how far it moves the base's.
        merged: a merged model's own facts.
    """

    facts: dict[str, Any]
    weights: Deltas
    merged: Merged | None = None


def run_command(
    path: Path,
    to: Path,
    *,
    merged: bool = False,
    base: str | None = None,
    scale: float | None = None,
    recipe: Path | None = None,
    report: Path | None = None,
) -> None:
    """Export the adapter of a finished run, or its base with the adapter merged into it.

    Args:
        path: the run directory, or an adapter from elsewhere.
        to: the folder to make; it must not exist, or be empty.
        merged: a whole model instead of a PEFT adapter.
        base: `w16` (the default) merges into the base's own weights, `nf4` into the dequantised
            4-bit weights that were trained on.
        scale: factor of what the adapter adds; None: as trained.
        recipe: of an adapter from elsewhere: its base, and data to verify it on.
        report: of an adapter from elsewhere: what `moored evaluate` wrote.

    Raises:
        UserError: the run is none or not finished, `to` is in use, the disk or the memory is too
            small, the base cannot be had, or the verification failed; then `to` is not made.
    """
    if rank_info().world_size > 1:
        raise UserError(
            f"moored export works in one process, not in {rank_info().world_size}: start it "
            "without torchrun, deepspeed or srun"
        )
    to, given = to.absolute(), open_input(path, recipe, report)
    base = base_of(given.config, base, merged=merged)
    if scale is not None:
        require_scale(scale)
    require_free_name(to, path)
    mesh = start_mesh()
    try:
        with publishing(to) as (folder, work):
            _export(given, mesh, folder, work, base=base, scale=scale)
    finally:
        leave_mesh()
    print(f"{'merged model' if merged else 'adapter'} in {to}")


def _export(
    given: ExportInput,
    mesh: Mesh,
    folder: Path,
    work: Path,
    *,
    base: str | None,
    scale: float | None,
) -> None:
    """Fill the folder; whatever can be refused is refused before the policy is loaded."""
    config, adapter, disk = given.config, given.adapter, folder.parent.parent
    located = resolve_base(config.model, mesh)
    warn_of_another_base(given.run, config, located)
    if scale is not None:
        adapter = work / "scaled"
        write_scaled(given.adapter, adapter, scale)
    plan = None
    if base is None:
        require_disk(disk, sum((adapter / name).stat().st_size for name in ADAPTER))
    else:
        plan = _plan(located.source.path, config, adapter, mesh, work, base)
        require_disk(disk, plan.num_bytes)
        merge.require_memory(plan, merge.device_for(plan, mesh.device))
    probe = make_probe(config, located)
    log.info("the trained policy computes %d tokens of %s", probe.num_tokens, probe.origin)
    trained = trained_outputs(config, located, mesh, adapter, probe)
    stops = generation_config.stops_of(given.run, config, located)
    export = Export(
        given=given,
        adapter=adapter,
        scale=1.0 if scale is None else scale,
        config=config,
        located=located,
        mesh=mesh,
        folder=folder,
        work=work,
        probe=probe,
        trained=trained,
        stops=stops,
        tokenizer=generation_config.tokenizer_of(config, located, stops),
    )
    export.tokenizer.save_pretrained(folder)
    made = _adapter(export) if plan is None else _merged(export, plan)
    print(generation_config.in_words(stops))
    markdown.write(_card(export, made), folder, markdown.readme_of(given.adapter))
    write_facts(folder, made.facts | ({} if scale is None else {"scale": scale}) | _facts(export))


def _plan(
    source: Path, config: Config, adapter: Path, mesh: Mesh, work: Path, base: str
) -> merge.Plan:
    with contextlib.suppress(merge.OtherNamesError):
        return merge.plan(source, config.model, adapter, base, mesh.device)
    require_disk(work.parent.parent, 2 * _weight_bytes(source))
    merge.renamed(source, config.model, work / "renamed")
    try:
        return merge.plan(work / "renamed", config.model, adapter, base, mesh.device)
    except merge.OtherNamesError as error:
        raise UserError(
            f"--merge: {config.model.name_or_path} has no {error} of its own even once "
            "transformers has converted it: export the adapter (without --merge)"
        ) from error


def _weight_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.glob("*.safetensors"))


# ---------------------------------------------------------------- an adapter


def _adapter(export: Export) -> Made:
    source, folder = export.located.source.path, export.folder
    for name in ADAPTER:
        copyfile(export.adapter / name, folder / name)
    generation_config.write_generation_config(folder, export.located, export.stops)
    log.info("stock PEFT loads it in a fresh process")
    stock = stock_outputs(
        export.config,
        export.probe,
        device=export.mesh.device,
        model=source,
        adapter=folder,
        double=export.double,
        tokenizer=export.tokenizer,
        tokenizer_folder=folder,
        work=export.work,
    )
    dtype = resolve_dtype(export.config.model, export.mesh.device)
    agreement = compare(stock.on, export.trained, tolerance_of(*_depth_and_width(source), dtype))
    agreement.require("its logits in stock PEFT and in Moored")
    module = needed_import(folder)
    loader = "stock PEFT" if module is None else f"PEFT with {module}"
    _say(export, agreement, f"{loader} and the trained policy")
    facts = {"kind": "adapter", "verified": _verified(export, agreement, "trained policy")}
    if module is not None:
        print(
            f"PEFT alone does not know {export.config.adapter.method}: `import {module}` before it "
            "loads this adapter, or export with --merge, which needs nothing"
        )
        facts["import_first"] = module
    read_base = _weight_bytes(source) <= gather.HASHED_BYTES
    return Made(facts=facts, weights=adapter_deltas(export.adapter, source, read_base=read_base))


def _depth_and_width(source: Path) -> tuple[int, int]:
    """Layers of a base, and the larger of its hidden and intermediate size."""
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    widths = (text.get(key) for key in ("hidden_size", "intermediate_size", "n_embd"))
    return text.get("num_hidden_layers") or text["n_layer"], max(filter(None, widths))


# ---------------------------------------------------------------- a merged model


def _merged(export: Export, plan: merge.Plan) -> Made:
    config, folder = export.config, export.folder
    log.info("merging into the %s weights: %.2f GB", plan.base, plan.num_bytes / 1e9)
    moved = merge.write(plan, folder, export.mesh.device)
    generation_config.write_generation_config(folder, export.located, export.stops)
    device = merge.device_for(plan, export.mesh.device)
    log.info("stock transformers and PEFT load it, and what it must equal, in fresh processes")
    stock = stock_outputs(
        config,
        export.probe,
        device=device,
        model=folder,
        tokenizer=export.tokenizer,
        tokenizer_folder=folder,
        work=export.work,
    )
    expected = stock_outputs(
        config,
        export.probe,
        device=device if plan.base == "w16" else export.mesh.device,
        model=export.located.source.path,
        adapter=export.adapter,
        double=export.double if plan.base == "nf4" else None,
        work=export.work,
    )
    dtypes = (resolve_dtype(config.model, at) for at in (device, export.mesh.device))
    tolerance = tolerance_of(plan.layers, plan.width, *dtypes, plan.coarsest)
    agreement = compare(stock.on, expected, tolerance)
    agreement.require("the logits of the merged model and of base and adapter apart")
    _say(export, agreement, "the merged model and its base with the adapter beside it")
    on, off = export.trained.on, export.trained.off
    assert off is not None
    merged = Merged(
        into=plan.base,
        dtype=dtype_name(plan.coarsest),
        kl_trained_merged_nats_per_token=kl_per_token(on, stock.on),
        kl_trained_base_nats_per_token=kl_per_token(on, off),
    )
    print(
        f"KL(trained || merged) = {merged.kl_trained_merged_nats_per_token:.3g} nats per token "
        f"with --base {plan.base}; the adapter itself makes "
        f"{merged.kl_trained_base_nats_per_token:.3g} (trained || base)"
    )
    if plan.base == "w16" and config.model.quantization == "nf4":
        print("what was trained had 4-bit weights: --base nf4 writes these, dequantised")
    against = f"stock PEFT, {plan.base} base with the adapter beside it"
    facts = {
        "kind": "merged",
        "merged_into": plan.base,
        **merged.model_dump(exclude={"into"}),
        "verified": _verified(export, agreement, against),
    }
    return Made(facts=facts, weights=deltas_summary("merged", moved), merged=merged)


# ---------------------------------------------------------------- what is said and written


def _say(export: Export, agreement: Agreement, what: str) -> None:
    effect = f"the adapter moves {agreement.adapter_effect:.2g}"
    share = agreement.share
    print(
        f"verified on {export.probe.num_tokens} tokens: {what} differ by "
        f"{agreement.difference:.2g} (rounding explains {agreement.tolerance:.2g}; {effect})"
        + ("" if share is None else f", {100 * share:.1f} % of the adapter's effect")
    )


def _verified(export: Export, agreement: Agreement, against: str) -> dict[str, Any]:
    return {
        "against": against,
        "num_tokens": export.probe.num_tokens,
        "text": export.probe.origin,
        "compute_dtype": dtype_name(resolve_dtype(export.config.model, export.mesh.device)),
        "device": export.mesh.device.type,
        "relative_rms_of_logits": asdict(agreement),
        "keys_and_values_exact": True,
        "tokenizer_equal": True,
    }


def _facts(export: Export) -> dict[str, Any]:
    model, run = export.config.model, export.given.run
    facts: dict[str, Any] = {
        "stops": {
            "learned": [end.model_dump() for end in export.stops.learned],
            "eos_token_id": export.stops.ids,
        },
        "base": {
            "name": model.name_or_path,
            "revision": export.located.source.revision,
            "quantization": model.quantization,
            "double_quantization": model.double_quantization,
        },
    }
    if run is None:
        return facts
    state = run.state()
    of_run = {
        "name": export.config.name,
        "folder": run.path.resolve().name,
        "status": state.get("status"),
        "steps": state.get("step"),
        "recipe": export.config.fingerprint(),
    }
    return {"run": of_run} | facts


def _card(export: Export, made: Made) -> Card:
    given, config = export.given, export.config
    training, data, provenance = None, None, Provenance()
    named = "ADAPTER --recipe RECIPE.yaml"
    if given.run is not None:
        training, data, provenance = gather.of_run(given.run, config)
        named = "RUN"
    report = given.report_file(export.scale)
    is_merged = made.merged is not None
    return Card(
        kind=made.facts["kind"],
        name=gather.public(given.name),
        created=gather.utc(time.time()),
        scale=export.scale,
        figures=gather.figures_for(named, report, export.scale, config.retention, given.name),
        base=gather.base_of(config.model, export.located.source, hash_all=is_merged),
        adapter=gather.adapter_of(export.adapter),
        training=training,
        data=data,
        deltas=made.weights,
        merged=made.merged,
        stops=export.stops,
        verified=made.facts["verified"],
        provenance=provenance.model_copy(update={"export_versions": versions_of(EXPORT_VERSIONS)}),
    )
