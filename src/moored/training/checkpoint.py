"""Checkpoints: atomic, verified, the same whatever the mesh and the ZeRO stage were.

A checkpoint holds whole tensors: the adapter as PEFT writes it, Adam's moments and step per
parameter, the data cursor. Nothing pickled is written or read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moored.models.adapters import frozen_tensors, load_frozen
from moored.models.policy import PolicyModel
from moored.utils import atomic_dir
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
FORMAT = 1
FILES = {"state.json", "optimizer.safetensors", "adapter/adapter_model.safetensors"}
WHOLE = "whole tensors"
PREFIX = "causal_lm."  # of the PEFT model's parameters inside PolicyModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is needed to go on as if nothing had happened.

    Attributes:
        step: updates applied or refused so far.
        optimizer: `Engine.optimizer_tensors`, the adapter's fp32 masters among them; on ranks that
            do not write it there are none.
        state: JSON-able rest: the data cursor, counters, seed.
    """

    step: int
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return checkpoints / f"step-{step:08d}"


def save_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], model: PeftModel, base_name: str
) -> None:
    """Write an adapter that stock PEFT loads into `folder`, which is made if it is not there.

    Args:
        folder: the adapter's folder.
        tensors: whole tensors by the policy's parameter names.
        model: the PEFT model, for its configuration.
        base_name: what the adapter's card names as its base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _adapter_state(tensors, model)
    if not state or any(tensor.numel() == 0 for tensor in state.values()):
        raise RuntimeError("the adapter to save has no or empty tensors")
    _save_tensors(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
    )
    config = model.peft_config["default"]
    before = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base_name
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = before


def _adapter_state(tensors: dict[str, torch.Tensor], model: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter as its file holds it: what was trained, and what it needs beside."""
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    state = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    return state | frozen_tensors(model)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, too
        raise OSError(errno.EIO, str(error), str(path)) from error


def replace_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    model: PeftModel,
    base_name: str,
    *,
    require_owned: Callable[[], None],
) -> None:
    """Write an adapter beside `folder`, read it back bit for bit, and put it in its place.

    Args:
        folder: the adapter's folder.
        tensors: whole tensors by the policy's parameter names.
        model: the PEFT model, for its configuration.
        base_name: what the adapter's card names as its base.
        require_owned: called before the rename: raises where the run is another process's by now.

    Raises:
        OSError: it could not be written.
        RuntimeError: what was read back is not what was written.
    """
    with atomic_dir.replacing(folder, before_rename=require_owned) as new:
        save_adapter(new, tensors, model, base_name)
        expected = _adapter_state(tensors, model)
        written = load_file(new / "adapter_model.safetensors")
        if written.keys() != expected.keys() or any(
            not torch.equal(written[name], expected[name]) for name in written
        ):
            raise RuntimeError(f"{new}: the adapter read back is not the one written")


def load_adapter(folder: Path, policy: PolicyModel) -> None:
    """Put a checkpoint's adapter into the policy, before an engine is built around it.

    Raises:
        UserError: it does not fit the recipe's adapter.
    """
    load_masters(read_optimizer(folder), policy)
    load_frozen(policy.causal_lm, folder / "adapter")


def load_masters(optimizer: dict[str, torch.Tensor], policy: PolicyModel) -> None:
    """Put a checkpoint's fp32 masters into the policy, before an engine is built around it.

    Raises:
        UserError: they do not fit the recipe's adapter.
    """
    masters = masters_of(optimizer)
    own = policy.trainable()
    if policy.sharding is not None:
        try:
            masters = {
                n: policy.sharding.local(n, m) if n in own else m for n, m in masters.items()
            }
        except ValueError as error:
            raise UserError(f"checkpoint: {error}: resume with the recipe that wrote it") from error
    wrong = sorted(
        name
        for name in own.keys() | masters.keys()
        if name not in own or name not in masters or own[name].shape != masters[name].shape
    )
    if wrong:
        raise UserError(
            f"checkpoint: {len(wrong)} tensors do not fit the recipe's adapter (first: "
            f"{wrong[0]}): resume with the recipe that wrote it"
        )
    for name, parameter in own.items():
        parameter.data.copy_(masters[name])


def masters_of(optimizer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter in fp32 by the policy's parameter names, from the optimizer's tensors."""
    return {
        name.removesuffix(".master"): tensor
        for name, tensor in optimizer.items()
        if name.endswith(".master")
    }


def write(
    folder: Path,
    checkpoint: Checkpoint,
    model: PeftModel,
    base_name: str,
    *,
    require_owned: Callable[[], None],
) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old ones or the new one, whole.

    Every file is flushed, then the manifest with sizes and SHA-256 sums, then the folder gets its
    name.

    Args:
        folder: the checkpoint's.
        checkpoint: what is kept.
        model: the PEFT model, for the adapter's configuration.
        base_name: what the adapter's card names as its base.
        require_owned: called before the rename: raises where the run is another process's by now.
    """
    with atomic_dir.replacing(folder, before_rename=require_owned) as new:
        save_adapter(new / "adapter", masters_of(checkpoint.optimizer), model, base_name)
        _save_tensors(checkpoint.optimizer, new / "optimizer.safetensors")
        state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
        (new / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        atomic_dir.seal(new)


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted; None when every byte is as it was written."""
    fault = atomic_dir.verify(folder)
    if fault is not None:
        return fault
    missing = FILES - atomic_dir.read_manifest(folder)["files"].keys()
    return f"{sorted(missing)[0]} is not in the manifest" if missing else None


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint (by step) that verifies; broken ones are set aside, loudly."""
    if not checkpoints.is_dir():
        return None
    for half in checkpoints.glob(".step-*.tmp"):  # of a writer that was killed
        shutil.rmtree(half, ignore_errors=True)
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        fault = verify(folder)
        if fault is None:
            return folder
        aside = folder.with_name(f"broken-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        log.warning("checkpoint %s is broken (%s): set aside as %s", folder, fault, aside.name)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        UserError: it is of another format, or was trained on another base than this version makes.
    """
    state = json.loads((folder / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise UserError(
            f"{folder}: checkpoint format {state.get('format')}, this version reads {FORMAT}: "
            "resume with the version that wrote it"
        )
    scales = state.get("scales", WHOLE)  # older versions could quantise those of slices
    if scales != WHOLE:
        raise UserError(
            f"{folder} was trained on a base with the NF4 scales of {scales}, not of {WHOLE}: "
            "resume with the version that wrote it, or start over with --restart"
        )
    return state


def read_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a checkpoint."""
    return load_file(folder / "optimizer.safetensors")


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the newest one is verified first."""
    folders = sorted(checkpoints.glob("step-*"), reverse=True)
    if len(folders) > keep and verify(folders[0]) is None:
        for folder in folders[keep:]:
            shutil.rmtree(folder, ignore_errors=True)
