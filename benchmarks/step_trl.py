"""One QLoRA run by TRL's SFTTrainer, as `step.py` has it trained: seconds per step and memory.

With --kl as one would add it by hand: a second forward with the adapters off, and the KL of both
models' whole logits (of all tokens, the target not removed).

    pip install trl; called by step.py, not by hand
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, and print the figures as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--micro-batch-size", type=int, required=True)
    parser.add_argument("--checkpointing", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kl", action="store_true")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=quantization,
        dtype=dtype,
        device_map={"": 0 if on_gpu else "cpu"},
    )
    recomputes = args.checkpointing != "none"
    reentrant = {"use_reentrant": args.checkpointing == "reentrant"}
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recomputes, gradient_checkpointing_kwargs=reentrant
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_length=args.tokens,
            max_steps=args.steps,
            per_device_train_batch_size=args.micro_batch_size,
            gradient_accumulation_steps=args.sequences // args.micro_batch_size,
            gradient_checkpointing=recomputes,
            gradient_checkpointing_kwargs=reentrant,
            learning_rate=1e-4,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
        )
        trainer = (WithKL if args.kl else SFTTrainer)(
            model=model,
            args=config,
            train_dataset=load_dataset("json", data_files=args.data, split="train"),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": clock.seconds, "peak_gib": peak / 2**30}))


class WithKL(SFTTrainer):
    """Cross-entropy and the KL to the model without its adapters, from all logits."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The mean over the trained tokens of both."""
        plain = {key: x for key, x in inputs.items() if key != "labels"} | {"use_cache": False}
        labels = inputs["labels"][:, 1:]
        valid, policy = labels != -100, model(**plain).logits[:, :-1].float()
        with torch.no_grad(), model.disable_adapter():
            base = model(**plain).logits[:, :-1].float()
        loss = functional.cross_entropy(policy.flatten(0, 1), labels.flatten())
        return loss + self._kl(policy, base)[valid].mean()

    @staticmethod
    def _kl(policy: Tensor, base: Tensor) -> Tensor:
        log_p, log_q = policy.log_softmax(-1), base.log_softmax(-1)
        return functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first micro-batch comes."""
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has moved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


if __name__ == "__main__":
    main()
