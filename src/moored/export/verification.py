"""What an export must equal: probe rows, the trained policy's logits, and two models compared.

The models to compare come from a fresh process (`stock_peft.py`); nothing is exported here.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moored import sinelora
from moored.adapted import adapters_off, dropout_off
from moored.config import Config
from moored.data import BaseIdentity, eval_samples, load_samples, retention_samples
from moored.distributed.mesh import Mesh
from moored.models.base_files import BaseFiles, resolve_dtype
from moored.models.experts import experts_of, matrices_of, routers_of
from moored.models.loading import require_architecture
from moored.models.open_adapters import read_settings
from moored.models.policy import load_policy
from moored.utils.errors import UserError
from moored.utils.progress import watch

log = logging.getLogger(__name__)

MAX_TOKENS, ROW_TOKENS = 256, 64  # of the probe: logits of 256 tokens over 150k words are 150 MB
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TEXT = "The answer is 42.\n\n  def f(x):\treturn x  # naïve, 中文, ẞ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What two models are compared on.

    Attributes:
        rows: lists of token ids, each a sequence of its own; 256 tokens in all at most.
        origin: where they come from, in words.
    """

    rows: list[list[int]]
    origin: str

    @property
    def num_tokens(self) -> int:
        """How many there are in all, and rows of logits."""
        return sum(map(len, self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """A model's logits on a probe, fp32 [tokens, V], on the CPU.

    Attributes:
        on: with the adapter, or of a merged model.
        off: of the base; None for a merged model.
    """

    on: torch.Tensor
    off: torch.Tensor | None = None


def make_probe(config: Config, located: BaseFiles) -> Probe:
    """A little of the run's held-out data, else of a retention text, else of its training data."""
    for origin, read in _sources(config, located):
        try:
            samples = read()
        except (UserError, IndexError) as error:
            log.warning("%s cannot be read any more (%s)", origin, str(error).splitlines()[0])
            continue
        if rows := _first_rows(samples):
            return Probe(rows=rows, origin=origin)
    ids = (torch.arange(ROW_TOKENS) * 7919 + 3) % located.vocab_size
    return Probe(rows=[ids.tolist()], origin="arbitrary tokens")


def _sources(
    config: Config, located: BaseFiles
) -> Iterator[tuple[str, Callable[[], Iterable[Any]]]]:
    """What a probe may come from: its place in the recipe, and how it is read."""
    tokenizer, size = located.tokenizer, located.vocab_size
    if config.data.eval:
        yield "data.eval", partial(eval_samples, config, tokenizer, vocab_size=size)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    for name, corpus in config.retention.items():
        read = partial(retention_samples, name, corpus, tokenizer, base=base)
        yield f"retention.{name}", read
    train = config.data.train
    yield "data.train", lambda: load_samples(train, tokenizer, config.data, size).held[0]


def _first_rows(samples: Iterable[Any]) -> list[list[int]]:
    rows: list[list[int]] = []
    left = MAX_TOKENS
    for sample in samples:
        row = sample.input_ids[: min(ROW_TOKENS, left)].tolist()
        rows += [row] if row else []
        left -= len(row)
        if not left:
            break
    return rows


def trained_outputs(
    config: Config, located: BaseFiles, mesh: Mesh, adapter: Path, probe: Probe
) -> Outputs:
    """The logits of Moored's own policy as it was trained: its base's bits, its adapter, its dtype.

    The policy is gone from memory when this returns.
    """
    policy = load_policy(located.source.path, config, mesh, adapter=adapter, to_measure=False)
    bf16 = torch.autocast(
        mesh.device.type, torch.bfloat16, enabled=policy.compute_dtype == torch.bfloat16
    )

    with torch.no_grad(), dropout_off(policy), bf16:
        on = _logits(policy.causal_lm, probe, mesh.device)
    with adapters_off(policy), bf16:
        off = _logits(policy.causal_lm, probe, mesh.device)
    del policy
    gc.collect()
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    return Outputs(on=on, off=off)


def needed_import(adapter: Path) -> str | None:
    """The module without which PEFT does not know a saved adapter; None where it knows it."""
    kind = read_settings(adapter).get("peft_type")
    return sinelora.__name__ if kind == sinelora.PEFT_TYPE else None


def _failed(why: str) -> UserError:
    return UserError(f"verification failed, nothing was exported: {why}")


def _logits(causal_lm: Any, probe: Probe, device: torch.device) -> torch.Tensor:
    rows = (torch.tensor([row], device=device) for row in probe.rows)
    # As in `stock_peft.py`: a prompt that was learned comes before the row.
    outs = (causal_lm(input_ids=r, use_cache=False).logits[0, -r.shape[1] :] for r in rows)
    return torch.cat([out.float().cpu() for out in outs])


def stock_outputs(
    config: Config,
    probe: Probe,
    *,
    device: torch.device,
    model: Path,
    adapter: Path | None = None,
    double: bool | None = None,
    tokenizer: Any = None,
    tokenizer_folder: Path | None = None,
    work: Path,
) -> Outputs:
    """The logits of a model that stock transformers and PEFT load in a fresh process.

    Args:
        config: the recipe, for dtype and attention.
        probe: the tokens.
        device: where it is loaded.
        model: its folder.
        adapter: a PEFT folder; None for a model without one.
        double: quantise to NF4 while loading, with or without double quantisation; None: do not.
        tokenizer: what `tokenizer_folder` must equal, in token ids and chat template.
        tokenizer_folder: loaded beside the model.
        work: an existing folder for the result.

    Raises:
        UserError: it does not load, tensors are not exact, or the tokenizer is another.
    """
    what = "the merged model" if adapter is None else "the adapter"
    dtype, plain = resolve_dtype(config.model, device), None
    if double is not None:
        causal_lm = require_architecture(model, config.model)
        plain, device = _plain(causal_lm), _device_for(causal_lm, dtype, device)
    out = work / "logits.safetensors"
    task = {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "tokenizer": None if tokenizer_folder is None else str(tokenizer_folder),
        "text": TEXT,
        "rows": probe.rows,
        "dtype": dtype_name(dtype),
        "device": str(device),
        "attention": None if config.model.attention == "auto" else config.model.attention,
        "double": double,
        "plain": plain,
        "trust_remote_code": config.model.trust_remote_code,
        "imports": None if adapter is None else needed_import(adapter),
        "out": str(out),
    }
    _run_stock(task, what)
    with safe_open(out, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        loaded = file.metadata() or {}
    out.unlink()
    if tokenizer_folder is not None:
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        template = tokenizer.chat_template or ""
        if json.loads(loaded["ids"]) != ids or loaded["template"] != template:
            raise _failed(
                "the tokenizer that was saved is another once it is loaded (token ids or chat "
                "template)"
            )
    return Outputs(on=tensors["on"], off=tensors.get("off"))


def _plain(causal_lm: Any) -> list[str] | None:
    """Linear layers that the run has unquantised beside experts, and the head, as a list for it."""
    routers = routers_of(causal_lm)
    if not routers:
        return None
    head = causal_lm.get_output_embeddings()
    return [*routers, *(path for path, module in causal_lm.named_modules() if module is head)]


def experts_bytes(causal_lm: Any, dtype: torch.dtype) -> int:
    """Size of all experts of a model as stock transformers holds them beside 4-bit layers."""
    stacks = (getattr(m, kind) for m in experts_of(causal_lm).values() for kind in matrices_of(m))
    return dtype.itemsize * sum(stack.numel() for stack in stacks)


def _device_for(causal_lm: Any, dtype: torch.dtype, device: torch.device) -> torch.device:
    """Where stock transformers can hold experts that the run had in 4 bits."""
    if device.type != "cuda":
        return device
    size, total = experts_bytes(causal_lm, dtype), torch.cuda.get_device_properties(device)
    if size < 0.6 * total.total_memory:
        return device
    log.warning(
        "stock transformers has experts in 16 bits, %.0f GB: verifying on the CPU", size / 1e9
    )
    return torch.device("cpu")


def _run_stock(task: dict[str, Any], what: str) -> None:
    """Have a fresh process do it, without a network and as no rank of anything."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    beside = "" if task["adapter"] is None else " on its base"
    # -P: the script's folder is no place to import from.
    done = watch(
        [sys.executable, "-P", str(Path(__file__).with_name("stock_peft.py"))],
        f"a fresh process loads {what}{beside} and computes its logits",
        given=json.dumps(task),
        env=environment | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )
    if done.returncode != 0:
        log.debug("stock_peft.py: %s", done.stderr)
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        why = f"signal {-done.returncode}: out of memory?" if done.returncode < 0 else last.strip()
        raise _failed(f"stock PEFT and transformers do not load {what} ({why[:300]})")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as others name it: bfloat16."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a model's logits are from those they should be.

    Attributes:
        difference: root mean square of the difference, relative to that of the logits about their
            mean over the vocabulary (a shift of all logits is no difference).
        tolerance: what rounding alone explains, see `tolerance_of`.
        adapter_effect: how far the adapter moves the logits, by the same measure.
        share: of that effect found in the model, by least squares: 1 when it is all there, 0 when
            the adapter is missing; None where it has no effect that could be told from rounding.
    """

    difference: float
    tolerance: float
    adapter_effect: float
    share: float | None

    def require(self, what: str) -> None:
        """Refuse a model that is not the one it should be.

        Raises:
            UserError: it differs by more than rounding, or lacks the adapter's effect.
        """
        is_there = self.share is None or 0.5 < self.share < 1.5
        if not self.difference <= self.tolerance or not is_there:
            share = "" if is_there else f", and has {self.share:.2f} of the adapter's effect"
            raise _failed(
                f"{what} differ by {self.difference:.2g} of their size, where rounding explains "
                f"{self.tolerance:.2g}{share}"
            )


def compare(model: torch.Tensor, expected: Outputs, tolerance: float) -> Agreement:
    """A model's logits [tokens, V] against those of a policy and its base."""
    assert expected.off is not None
    if model.shape != expected.on.shape:
        shape = list(expected.on.shape)
        raise _failed(f"logits of shape {list(model.shape)}, expected {shape}")
    dots = torch.zeros(4, dtype=torch.float64)
    rows = zip(model, expected.on, expected.off, strict=True)
    for got, on, off in rows:  # one at a time: fp64 of all would be several times their memory
        got, on, off = (row.double() - row.double().mean() for row in (got, on, off))
        pairs = ((got - on, got - on), (on, on), (on - off, on - off), (on - off, got - off))
        dots += torch.stack([(a * b).sum() for a, b in pairs])
    wrong, size, moved, along = dots.tolist()
    effect = math.sqrt(moved / size)
    return Agreement(
        difference=math.sqrt(wrong / size),
        tolerance=tolerance,
        adapter_effect=effect,
        share=along / moved if effect > tolerance / 10 else None,
    )


def tolerance_of(num_layers: int, width: int, *dtypes: torch.dtype) -> float:
    """What rounding alone explains of `Agreement.difference`.

    A layer rounds some 16 times, to a dtype whose unit is eps; such an error is eps / sqrt(12) at
    most and on average half of that, and the errors of all roundings are independent: together
    eps / sqrt(48) * sqrt(16 * layers), in each of the two models, so times sqrt(2); three times
    that covers what layers amplify. Products are summed in fp32, of which `width` terms in another
    order differ by eps(fp32) * sqrt(width).

    Args:
        num_layers: of the model.
        width: terms of the longest sum, the larger of hidden and intermediate size.
        dtypes: of activations and of weights that were rounded anew; the coarsest counts.
    """
    fp32 = torch.finfo(torch.float32).eps
    eps = max(torch.finfo(dtype).eps for dtype in dtypes) + fp32 * math.sqrt(width)
    return 3 * math.sqrt(2) * eps / math.sqrt(48) * math.sqrt(16 * num_layers)


def kl_per_token(reference: torch.Tensor, model: torch.Tensor) -> float:
    """Mean KL(reference || model) in nats per token; both are logits [tokens, V]."""
    total = 0.0
    for p, q in zip(reference, model, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
    return max(0.0, total / len(reference))
