"""The callback in TRL's SFTTrainer, which reads per-token fields of a fused head, not a loss."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from torch import Tensor

from moored.plugin import TMKL, Options
from pluginkit import Gradients, adapted, dense, gradients, held_positions
from tiny import tiny_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


def data() -> datasets.Dataset:
    """Prompts and completions of unequal length."""
    lines = [
        {"prompt": f"count {WORDS[i % 7]} ", "completion": " ".join(WORDS[: 1 + (3 * i) % 7])}
        for i in range(16)
    ]
    return datasets.Dataset.from_list(lines)


def sft(folder: Path, model: Any, *callbacks: Any, **options: Any) -> trl.SFTTrainer:
    """TRL's trainer of one update."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings | options),
        train_dataset=data(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def model_for_tokenizer() -> Any:
    return adapted(vocab_size=len(tiny_tokenizer()), attn_implementation="sdpa")


def global_batch(found: trl.SFTTrainer, num: int) -> list[dict[str, Tensor]]:
    """The first micro-batches of the trainer's own loader."""
    torch.manual_seed(found.args.seed)
    loader = iter(found.get_train_dataloader())
    return [next(loader) for _ in range(num)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize(
    "options",
    [Options(0.7), Options(0.7, positions="all", prompt_weight=0.4)],
    ids=["targets", "all"],
)
def test_the_update_is_that_of_the_global_batch(
    tmp_path: Path, options: Options, accumulated: int, packed: bool
) -> None:
    shape = {
        "gradient_accumulation_steps": accumulated,
        "train_sampling_strategy": "sequential",
        "packing": packed,
        "per_device_train_batch_size": 1 if packed else 2,
    }
    model, watch = model_for_tokenizer(), Gradients()
    found = sft(tmp_path, model, watch, TMKL(**asdict(options)), **shape)
    batches = global_batch(found, accumulated)
    if packed:  # rows of several samples, which their positions keep apart
        assert all(int((b["position_ids"] == 0).sum()) > 1 for b in batches)
    num = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    held = sum(int(held_positions(b).sum()) for b in batches)
    expected = sum(dense(model, b, options, num_items=num, num_held=held)["loss"] for b in batches)
    assert isinstance(expected, Tensor)
    expected.backward()
    wanted = gradients(model)
    found.train()
    torch.testing.assert_close(watch.found[0], wanted, rtol=1e-6, atol=1e-10)
    (logs,) = [logs for logs in found.state.log_history if "loss" in logs]
    assert logs["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert "tmkl" in logs


def test_entropy_and_accuracy_are_trls_own(tmp_path: Path) -> None:
    """Of the model alone, though its `log_probs` hold the divergence, too."""
    plain = sft(tmp_path, model_for_tokenizer())
    plain.train()
    held = sft(tmp_path, model_for_tokenizer(), TMKL(0.7))
    held.train()
    before, after = (t.state.log_history[0] for t in (plain, held))
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert after[name] == pytest.approx(before[name], rel=1e-5), name
    assert after["ce"] == pytest.approx(before["loss"], rel=1e-5)
    assert after["loss"] == pytest.approx(after["ce"] + 0.7 * after["tmkl"], rel=1e-5)


def test_evaluation_is_trls_own(tmp_path: Path) -> None:
    model = model_for_tokenizer()
    held = sft(tmp_path, model, TMKL(0.7), eval_strategy="no")
    held.train()
    before = held.evaluate(held.train_dataset)
    attached = sft(tmp_path, model, TMKL(0.7), learning_rate=0.0)
    attached.eval_dataset = attached.train_dataset
    attached.args.eval_strategy, attached.args.eval_steps = "steps", 1
    attached.train()
    (during,) = [logs for logs in attached.state.log_history if "eval_loss" in logs]
    assert during["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)


def test_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_type='dft'"):
        sft(tmp_path, model_for_tokenizer(), TMKL(0.7), loss_type="dft").train()


def test_preferences_are_refused(tmp_path: Path) -> None:
    arguments = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1)
    rows = [{"prompt": "count ", "chosen": "one", "rejected": "two"}] * 4
    found = trl.DPOTrainer(
        model=model_for_tokenizer(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[TMKL(0.7)],
    )
    with pytest.raises(ValueError, match="DPOConfig is not of supervised fine-tuning"):
        found.train()
