"""`moored export`: a finished run as a folder for others, whole and verified, or not there at all.

What is merged and what is compared stands beside; nothing of the run is changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch

from moored import checkpoint, sealed
from moored.adapters import require_scale, write_scaled
from moored.base import Located, locate, resolve_dtype
from moored.config import Config, load_config
from moored.errors import UserError
from moored.export import merge
from moored.export.folder import publishing, require_disk, require_free_name, write_facts
from moored.export.fresh import (
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
from moored.launched import launched
from moored.mesh import Mesh, leave_mesh, start_mesh
from moored.rundir import RunDirectory

log = logging.getLogger(__name__)

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
FINISHED = ("done", "evaluation_failed")  # the latter has its adapter, and lacks figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be exported.

    Attributes:
        run: the run directory.
        config: its recipe.
        located: its base on this machine.
        mesh: this process.
        adapter: the run's, or a copy at another scale.
        probe: what is compared.
        trained: the logits of the policy that was trained, with that adapter.
    """

    run: RunDirectory
    adapter: Path
    config: Config
    located: Located
    mesh: Mesh
    probe: Probe
    trained: Outputs

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
) -> None:
    """Export the adapter of a finished run, or its base with the adapter merged into it.

    Args:
        path: the run directory.
        to: the folder to make; it must not exist, or be empty.
        merged: a whole model instead of a PEFT adapter.
        base: `w16` (the default) merges into the base's own weights, `nf4` into the dequantised
            4-bit weights that were trained on.
        scale: factor of what the adapter adds; None: as trained.

    Raises:
        UserError: the run is none or not finished, `to` is in use, the disk or the memory is too
            small, the base cannot be had, or the verification failed; then `to` is not made.
    """
    if launched().world_size > 1:
        raise UserError(
            f"moored export works in one process, not in {launched().world_size}: start it "
            "without torchrun, deepspeed or srun"
        )
    run, to = RunDirectory(path), to.absolute()
    config = _open(run)
    base = _base_of(config, base, merged=merged)
    if scale is not None:
        require_scale(scale)
    require_free_name(to, run.path)
    mesh = start_mesh()
    try:
        with publishing(to) as (folder, work):
            _make(run, config, mesh, folder, work, base, scale)
    finally:
        leave_mesh()
    print(f"{'merged model' if merged else 'adapter'} in {to}")


def _make(
    run: RunDirectory,
    config: Config,
    mesh: Mesh,
    folder: Path,
    work: Path,
    base: str | None,
    scale: float | None,
) -> None:
    located = locate(config.model, mesh)
    _warn_of_another_base(run, config, located)
    source = located.source.path
    plan = None
    if base is None:
        require_disk(folder.parent.parent, sum((run.adapter / n).stat().st_size for n in ADAPTER))
    else:
        plan = _plan(source, config, mesh, work, base)
        require_disk(folder.parent.parent, plan.num_bytes)
        merge.require_memory(plan, merge.device_for(plan, mesh.device))
    adapter = run.adapter
    if scale is not None:
        adapter = work / "scaled"
        write_scaled(run.adapter, adapter, scale)
    probe = make_probe(config, located)
    log.info("the trained policy computes %d tokens of %s", probe.num_tokens, probe.origin)
    trained = trained_outputs(config, located, mesh, adapter, probe)
    export = Export(
        run=run,
        config=config,
        located=located,
        mesh=mesh,
        adapter=adapter,
        probe=probe,
        trained=trained,
    )
    _tokenizer(config, located).save_pretrained(folder)
    made = _adapter(export, folder, work) if plan is None else _merge(export, plan, folder, work)
    write_facts(folder, made | ({} if scale is None else {"scale": scale}) | _facts(export))


def _plan(source: Path, config: Config, mesh: Mesh, work: Path, base: str) -> merge.Plan:
    with contextlib.suppress(merge.OtherNamesError):
        return merge.plan(source, config.model, base, mesh.device)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    require_disk(work.parent.parent, 2 * size)
    merge.renamed(source, config.model, work / "renamed")
    try:
        return merge.plan(work / "renamed", config.model, base, mesh.device)
    except merge.OtherNamesError as error:
        raise UserError(
            f"--merge: {config.model.name_or_path} has no {error} of its own even once "
            "transformers has converted it: export the adapter (without --merge)"
        ) from error


def _adapter(export: Export, folder: Path, work: Path) -> dict[str, Any]:
    for name in ADAPTER:
        copyfile(export.adapter / name, folder / name)
    log.info("stock PEFT loads it in a fresh process")
    stock = stock_outputs(
        export.config,
        export.probe,
        device=export.mesh.device,
        model=export.located.source.path,
        adapter=folder,
        double=export.double,
        tokenizer=_tokenizer(export.config, export.located),
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


def _merge(export: Export, plan: merge.Plan, folder: Path, work: Path) -> dict[str, Any]:
    source, config = export.located.source.path, export.config
    log.info("merging into the %s weights: %.2f GB", plan.base, plan.num_bytes / 1e9)
    merge.write(plan, export.adapter, folder, export.mesh.device)
    device = merge.device_for(plan, export.mesh.device)
    log.info("stock transformers and PEFT load it, and what it must equal, in fresh processes")
    merged = stock_outputs(
        config,
        export.probe,
        device=device,
        model=folder,
        tokenizer=_tokenizer(config, export.located),
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
    moved = kl_per_token(export.trained.on, _off(export.trained))
    print(
        f"KL(trained || merged) = {kl:.3g} nats per token with --base {plan.base}; the adapter "
        f"itself makes {moved:.3g} (trained || base)"
    )
    if plan.base == "w16" and config.model.quantization == "nf4":
        print("what was trained had 4-bit weights: --base nf4 writes these, dequantised")
    against = f"stock PEFT, {plan.base} base with the adapter beside it"
    return {
        "kind": "merged",
        "merged_into": plan.base,
        "dtype": str(plan.coarsest).removeprefix("torch."),
        "kl_trained_merged_nats_per_token": kl,
        "kl_trained_base_nats_per_token": moved,
        "verified": _verified(export, found, against=against),
    }


def _off(outputs: Outputs) -> torch.Tensor:
    assert outputs.off is not None
    return outputs.off


# ---------------------------------------------------------------- what must be so


def _open(run: RunDirectory) -> Config:
    path = run.path
    if not run.config.is_file():
        hint = "name a folder that holds config.yaml and state.json, such as runs/NAME"
        if (path / ADAPTER[0]).is_file():
            hint = "it is a PEFT adapter, as other tools read it already: name the run above it"
        raise UserError(f"{path} is not a run directory: {hint}")
    if (path / "arms").is_dir():
        raise UserError(f"{path} is a comparison: name one of its arms, {path / 'arms'}/*")
    config = load_config(run.config)
    state = run.state()
    status = state.get("status", "not started")
    if status not in FINISHED:
        step = (
            f" after step {state['step']} of {state['num_steps']}" if "num_steps" in state else ""
        )
        why = f" ({' '.join(str(state['reason']).split())[:160]})" if state.get("reason") else ""
        go_on = "wait for it, or start" if status == "running" else "start"
        raise UserError(
            f"{path} is not finished, its status is {status}{step}{why}: {go_on} its `moored "
            "train` command again, which goes on from the newest checkpoint"
        )
    _require_whole(run, state)
    return config


def _require_whole(run: RunDirectory, state: dict[str, Any]) -> None:
    """The adapter is there, and is that of the last checkpoint, whose hash is known."""
    for name in ADAPTER:
        if not (run.adapter / name).is_file():
            raise UserError(
                f"{run.adapter / name} is missing: copy it from the newest checkpoint, "
                f"{run.checkpoints}/*/adapter"
            )
    last = checkpoint.folder_of(run.checkpoints, state.get("step", 0))
    with contextlib.suppress(OSError, ValueError, KeyError):  # checkpoints may have been removed
        expected = sealed.read_manifest(last)["files"][f"adapter/{ADAPTER[1]}"]["sha256"]
        if expected != sealed.sha256(run.adapter / ADAPTER[1]):
            raise UserError(
                f"{run.adapter / ADAPTER[1]} is not as it was written: copy it again from "
                f"{last / 'adapter'}"
            )


def _base_of(config: Config, base: str | None, *, merged: bool) -> str | None:
    if not merged:
        if base is not None:
            raise UserError(f"--base {base} says what is merged into: add --merge, or leave it out")
        return None
    if base == "nf4" and config.model.quantization == "none":
        raise UserError("--base nf4: the run's base is not quantised: leave --base out")
    return base or "w16"


def _warn_of_another_base(run: RunDirectory, config: Config, located: Located) -> None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        trained = json.loads((run.report / "report.json").read_text())["base"]["revision"]
        if trained != located.source.revision:
            log.warning(
                "%s was %s when the run was evaluated, and is %s now",
                config.model.name_or_path,
                trained,
                located.source.revision,
            )
    p = config.parallel
    if p.quantization_statistics == "slice" and p.tensor_parallel_degree > 1:
        log.warning(
            "the run's 4-bit scales were those of %d slices, which stock transformers does not "
            "make: the exported adapter meets a base that differs a little",
            p.tensor_parallel_degree,
        )


# ---------------------------------------------------------------- what is written


def _tokenizer(config: Config, located: Located) -> Any:
    """The base's, with the recipe's chat template if it has one."""
    tokenizer: Any = located.tokenizer
    if config.data.chat_template is not None:
        try:
            tokenizer.chat_template = config.data.chat_template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.chat_template={config.data.chat_template} cannot be read ({error}): put it "
                "back, the model was trained with it"
            ) from error
    return tokenizer


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
    state, model = export.run.state(), export.config.model
    return {
        "run": {
            "name": export.config.name,
            "folder": export.run.path.resolve().name,
            "status": state.get("status"),
            "steps": state.get("step"),
            "recipe": export.config.fingerprint(),
        },
        "base": {
            "name": model.name_or_path,
            "revision": export.located.source.revision,
            "quantization": model.quantization,
            "double_quantization": model.double_quantization,
        },
    }
