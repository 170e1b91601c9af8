"""Tiny models with adapters, batches, and the dense reference of the plug-in's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from moored.plugin import Options

VOCABULARY = 61


def adapted(
    architecture: str = "Llama",
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> peft.PeftModel:
    """A tiny model with LoRA, both halves of which are random, so that it is not its base."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{architecture}Config")(**settings | more)
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # logits that are not all alike
        base.get_input_embeddings().weight.mul_(20)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, lora).to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    return model


def batch(*, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Right-padded rows of unequal length, of which the first tokens are a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100
        mask[row, length - 2 * row :] = 0
    labels[mask == 0] = -100
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def dense(
    model: peft.PeftModel,
    given: dict[str, Tensor],
    options: Options,
    *,
    num_items: int | None = None,
    num_held: int | None = None,
) -> dict[str, Tensor]:
    """The same from whole logits of fp64, by autograd.

    Args:
        model: in any mode.
        given: a batch.
        options: of the divergence.
        num_items: targets of the global batch; None: this batch is all of it.
        num_held: its held prompt positions; None: this batch's mean counts by its targets.
    """
    inputs = {name: x for name, x in given.items() if name != "labels"}
    labels = given["labels"][:, 1:]
    policy = model(**inputs).logits[:, :-1].double()
    with torch.no_grad(), model.disable_adapter():
        model.eval()  # the base has no dropout
        base = model(**inputs).logits[:, :-1].double()
        model.train()
    valid = labels != -100
    held = held_positions(given)
    t = options.temperature
    s, q = policy / t, base / t
    if options.kind == "tmkl":
        target = torch.nn.functional.one_hot(labels.clamp(min=0), s.shape[-1]).bool()
        hidden = target & valid[..., None]
        s_rest, q_rest = (x.masked_fill(hidden, -torch.inf) for x in (s, q))
    else:
        s_rest, q_rest = s, q
    log_p, log_q = s_rest.log_softmax(-1), q_rest.log_softmax(-1)
    if options.direction == "reverse":
        log_p, log_q = log_q, log_p
    inside = torch.where(log_q.isinf(), 0.0, log_q.exp() * (log_q - log_p).nan_to_num(0.0))
    kl = t * t * inside.sum(-1)
    ce = torch.nn.functional.cross_entropy(
        policy.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view_as(kl)
    num = int(valid.sum()) if num_items is None else num_items
    loss = (ce[valid].sum() + options.weight * kl[valid].sum()) / num
    if options.positions == "all":
        per = int(held.sum()) * num / int(valid.sum()) if num_held is None else num_held
        loss = loss + options.prompt_weight * kl[held].sum() / per
    return {"loss": loss, "ce": ce[valid].mean(), "kl": kl[valid].mean(), "prompt": kl[held].mean()}


def held_positions(given: dict[str, Tensor]) -> Tensor:
    """Where the next token is of the same sample, and is not learned, bool [B, L - 1]."""
    labels = given["labels"][:, 1:]
    held = labels == -100
    if "attention_mask" in given:
        mask = given["attention_mask"].bool()
        held &= mask[:, 1:] & mask[:, :-1]
    if "position_ids" in given:
        held &= given["position_ids"][:, 1:] == given["position_ids"][:, :-1] + 1
    return held


def gradients(model: peft.PeftModel) -> Tensor:
    """The adapter's gradient as one vector, taken away from it."""
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


class Gradients(transformers.TrainerCallback):
    """The adapter's gradient before every update."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Keep a copy."""
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.found.append(torch.cat(grads).clone())


def rows(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch as a data set of rows."""
    return [{name: x[row] for name, x in given.items()} for row in range(len(given["labels"]))]


class InOrder(transformers.Trainer):
    """Sees the rows in their order; every version of transformers lets it."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore


def trainer(
    folder: Path,
    model: Any,
    data: list[Any],
    *callbacks: Any,
    eval_dataset: list[Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer that sees the rows in their order."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(**settings | options)
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )
