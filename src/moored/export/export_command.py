"""`moored export`: a finished run as a folder for others, whole and verified, or not there at all.

What is opened, merged, compared and measured of the weights stands beside; nothing of the run is
changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch

from moored.config import Config
from moored.distributed.mesh import Mesh, leave_mesh, start_mesh
from moored.export import deltas, generation_config, merge
from moored.export.adapter_folder import (
    EXPORT_VERSIONS,
    publishing,
    require_disk,
    require_free_name,
    write_facts,
)
from moored.export.card import gather, markdown
from moored.export.card.facts import Card, Deltas, Merged, Provenance, Stops
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
    kl_per_token,
    make_probe,
    needed_import,
    stock_outputs,
    tolerance_of,
    trained_outputs,
)
from moored.models.adapters import require_scale, write_scaled
from moored.models.base import BaseFiles, resolve_base, resolve_dtype
from moored.utils.environment import rank_info
from moored.utils.errors import UserError
from moored.utils.versions import versions_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be exported.

    Attributes:
        given: the run or the adapter, as it is.
        config: its recipe.
        located: its base on this machine.
        mesh: this process.
        adapter: the run's, or a copy at another scale.
        scale: factor of what was trained, 1 as trained.
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
            _make(given, mesh, folder, work, base, scale)
    finally:
        leave_mesh()
    print(f"{'merged model' if merged else 'adapter'} in {to}")


def _make(
    given: ExportInput,
    mesh: Mesh,
    folder: Path,
    work: Path,
    base: str | None,
    scale: float | None,
) -> None:
    config, adapter = given.config, given.adapter
    located = resolve_base(config.model, mesh)
    warn_of_another_base(given.run, config, located)
    source = located.source.path
    plan = None
    if scale is not None:
        adapter = work / "scaled"
        write_scaled(given.adapter, adapter, scale)
    if base is None:
        require_disk(folder.parent.parent, sum((adapter / n).stat().st_size for n in ADAPTER))
    else:
        plan = _plan(source, config, adapter, mesh, work, base)
        require_disk(folder.parent.parent, plan.num_bytes)
        merge.require_memory(plan, merge.device_for(plan, mesh.device))
    probe = make_probe(config, located)
    log.info("the trained policy computes %d tokens of %s", probe.num_tokens, probe.origin)
    trained = trained_outputs(config, located, mesh, adapter, probe)
    ends = generation_config.stops_of(given.run, config, located)
    export = Export(
        given=given,
        config=config,
        located=located,
        mesh=mesh,
        adapter=adapter,
        scale=1.0 if scale is None else scale,
        probe=probe,
        trained=trained,
        stops=ends,
        tokenizer=generation_config.tokenizer_of(config, located, ends),
    )
    export.tokenizer.save_pretrained(folder)
    if plan is None:
        made = _adapter(export, folder, work)
        weights = _product(export)
    else:
        made, moved = _merge(export, plan, folder, work)
        weights = deltas.summary("merged", moved)
    print(generation_config.in_words(export.stops))
    readme = markdown.readme_of(given.adapter)
    markdown.write(_card(export, made, weights), folder, readme)
    write_facts(folder, made | ({} if scale is None else {"scale": scale}) | _facts(export))


def _plan(
    source: Path, config: Config, adapter: Path, mesh: Mesh, work: Path, base: str
) -> merge.Plan:
    with contextlib.suppress(merge.OtherNamesError):
        return merge.plan(source, config.model, adapter, base, mesh.device)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    require_disk(work.parent.parent, 2 * size)
    merge.renamed(source, config.model, work / "renamed")
    try:
        return merge.plan(work / "renamed", config.model, adapter, base, mesh.device)
    except merge.OtherNamesError as error:
        raise UserError(
            f"--merge: {config.model.name_or_path} has no {error} of its own even once "
            "transformers has converted it: export the adapter (without --merge)"
        ) from error


def _adapter(export: Export, folder: Path, work: Path) -> dict[str, Any]:
    for name in ADAPTER:
        copyfile(export.adapter / name, folder / name)
    generation_config.write_generation_config(folder, export.located, export.stops)
    log.info("stock PEFT loads it in a fresh process")
    stock = stock_outputs(
        export.config,
        export.probe,
        device=export.mesh.device,
        model=export.located.source.path,
        adapter=folder,
        double=export.double,
        tokenizer=export.tokenizer,
        tokenizer_folder=folder,
        work=work,
    )
    hf_config = json.loads((export.located.source.path / "config.json").read_text())
    text = hf_config.get("text_config", hf_config)
    found = compare(
        stock.on,
        export.trained,
        tolerance_of(
            text.get("num_hidden_layers") or text["n_layer"],
            max(v for k in ("hidden_size", "intermediate_size", "n_embd") if (v := text.get(k))),
            resolve_dtype(export.config.model, export.mesh.device),
        ),
    )
    found.require("its logits in stock PEFT and in Moored")
    facts = {"kind": "adapter", "verified": _verified(export, found, against="trained policy")}
    module = needed_import(folder)
    if module is None:
        _say(export, found, "stock PEFT and the trained policy")
        return facts
    _say(export, found, f"PEFT with {module} and the trained policy")
    print(
        f"PEFT alone does not know {export.config.adapter.family}: `import {module}` before it "
        "loads this adapter, or export with --merge, which needs nothing"
    )
    return facts | {"import_first": module}


def _merge(
    export: Export, plan: merge.Plan, folder: Path, work: Path
) -> tuple[dict[str, Any], Sequence[deltas.Moved]]:
    source, config = export.located.source.path, export.config
    log.info("merging into the %s weights: %.2f GB", plan.base, plan.num_bytes / 1e9)
    moved = merge.write(plan, folder, export.mesh.device)
    generation_config.write_generation_config(folder, export.located, export.stops)
    device = merge.device_for(plan, export.mesh.device)
    log.info("stock transformers and PEFT load it, and what it must equal, in fresh processes")
    merged = stock_outputs(
        config,
        export.probe,
        device=device,
        model=folder,
        tokenizer=export.tokenizer,
        tokenizer_folder=folder,
        work=work,
    )
    expected = stock_outputs(
        config,
        export.probe,
        device=device if plan.base == "w16" else export.mesh.device,
        model=source,
        adapter=export.adapter,
        double=export.double if plan.base == "nf4" else None,
        work=work,
    )
    dtypes = (resolve_dtype(config.model, at) for at in (device, export.mesh.device))
    tolerance = tolerance_of(plan.layers, plan.width, *dtypes, plan.coarsest)
    found = compare(merged.on, expected, tolerance)
    found.require("the logits of the merged model and of base and adapter apart")
    _say(export, found, "the merged model and its base with the adapter beside it")
    kl = kl_per_token(export.trained.on, merged.on)
    effect = kl_per_token(export.trained.on, _off(export.trained))
    print(
        f"KL(trained || merged) = {kl:.3g} nats per token with --base {plan.base}; the adapter "
        f"itself makes {effect:.3g} (trained || base)"
    )
    if plan.base == "w16" and config.model.quantization == "nf4":
        print("what was trained had 4-bit weights: --base nf4 writes these, dequantised")
    against = f"stock PEFT, {plan.base} base with the adapter beside it"
    made = {
        "kind": "merged",
        "merged_into": plan.base,
        "dtype": str(plan.coarsest).removeprefix("torch."),
        "kl_trained_merged_nats_per_token": kl,
        "kl_trained_base_nats_per_token": effect,
        "verified": _verified(export, found, against=against),
    }
    return made, moved


def _off(outputs: Outputs) -> torch.Tensor:
    assert outputs.off is not None
    return outputs.off


# ---------------------------------------------------------------- what is written


def _say(export: Export, found: Agreement, what: str) -> None:
    share = "" if found.share is None else f", {100 * found.share:.1f} % of the adapter's effect"
    print(
        f"verified on {export.probe.num_tokens} tokens: {what} differ by {found.difference:.2g} "
        f"(rounding explains {found.tolerance:.2g}; the adapter moves {found.adapter_effect:.2g})"
        f"{share}"
    )


def _verified(export: Export, found: Agreement, *, against: str) -> dict[str, Any]:
    return {
        "against": against,
        "num_tokens": export.probe.num_tokens,
        "text": export.probe.origin,
        "compute_dtype": str(resolve_dtype(export.config.model, export.mesh.device)).split(".")[-1],
        "device": export.mesh.device.type,
        "relative_rms_of_logits": asdict(found),
        "keys_and_values_exact": True,
        "tokenizer_equal": True,
    }


def _facts(export: Export) -> dict[str, Any]:
    model, run = export.config.model, export.given.run
    state = {} if run is None else run.state()
    of_run = (
        {}
        if run is None
        else {
            "run": {
                "name": export.config.name,
                "folder": run.path.resolve().name,
                "status": state.get("status"),
                "steps": state.get("step"),
                "recipe": export.config.fingerprint(),
            }
        }
    )
    ends = [end.model_dump() for end in export.stops.learned]
    return of_run | {
        "stops": {"learned": ends, "eos_token_id": export.stops.ids},
        "base": {
            "name": model.name_or_path,
            "revision": export.located.source.revision,
            "quantization": model.quantization,
            "double_quantization": model.double_quantization,
        },
    }


# ---------------------------------------------------------------- the forgetting card


def _product(export: Export) -> Deltas:
    source = export.located.source.path
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return deltas.of_adapter(export.adapter, source, read_base=size <= gather.HASHED_BYTES)


def _card(export: Export, made: dict[str, Any], weights: Deltas) -> Card:
    given, config = export.given, export.config
    training, data, provenance = None, None, Provenance()
    if given.run is not None:
        training, data, provenance = gather.of_run(given.run, config)
    named = "RUN" if given.run is not None else "ADAPTER --recipe RECIPE.yaml"
    is_merged = made["kind"] == "merged"
    return Card(
        kind=made["kind"],
        name=gather.public(given.name),
        created=gather.utc(time.time()),
        scale=export.scale,
        figures=gather.figures_for(
            named, given.report_file(export.scale), export.scale, config.retention, given.name
        ),
        base=gather.base_of(config.model, export.located.source, hash_all=is_merged),
        adapter=gather.adapter_of(export.adapter),
        training=training,
        data=data,
        deltas=weights,
        merged=Merged(
            into=made["merged_into"],
            dtype=made["dtype"],
            kl_trained_merged_nats_per_token=made["kl_trained_merged_nats_per_token"],
            kl_trained_base_nats_per_token=made["kl_trained_base_nats_per_token"],
        )
        if is_merged
        else None,
        stops=export.stops,
        verified=made["verified"],
        provenance=provenance.model_copy(update={"export_versions": versions_of(EXPORT_VERSIONS)}),
    )
