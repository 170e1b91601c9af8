"""The callback in the Hugging Face `Trainer`: its gradient, its logs, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import moored.plugin
from moored.plugin import TMKL, Options
from pluginkit import Gradients, adapted, batch, dense, gradients, rows, trainer

ROWS = 8


class Reported(transformers.TrainerCallback):
    """What reporters see, MLflow's for one, which stand before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        """Keep it."""
        self.logs.append(dict(logs))


@pytest.mark.parametrize(
    "options",
    [Options(0.7), Options(0.7, positions="all", prompt_weight=0.4)],
    ids=["targets", "all"],
)
@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_update_is_that_of_the_global_batch(
    tmp_path: Path, options: Options, accumulated: int
) -> None:
    """Micro-batches of unequal numbers of targets count as one batch."""
    model, given = adapted(), batch(rows=ROWS, length=24)
    size = 2 * accumulated
    seen = {name: x[:size] for name, x in given.items()}
    expected = dense(model, seen, options)
    expected["loss"].backward()
    wanted = gradients(model)
    watch, reported = Gradients(), Reported()
    found = trainer(
        tmp_path,
        model,
        rows(given),
        reported,
        watch,
        TMKL(**asdict(options)),
        gradient_accumulation_steps=accumulated,
    )
    found.train()
    torch.testing.assert_close(watch.found[0], wanted, rtol=1e-7, atol=1e-11)
    (logs,) = [logs for logs in reported.logs if "loss" in logs]
    # Older versions of transformers log four decimals.
    assert logs["loss"] == pytest.approx(expected["loss"].item(), rel=1e-6, abs=5e-5)
    assert logs["ce"] == pytest.approx(expected["ce"].item())
    assert logs["tmkl"] == pytest.approx(expected["kl"].item())
    assert found.state.log_history[0]["tmkl"] == logs["tmkl"]
    if options.positions == "all":
        assert logs["kl_prompt"] == pytest.approx(expected["prompt"].item())
    assert "forward" not in vars(model.get_base_model())
    assert "get_batch_samples" not in vars(found)


def test_evaluation_is_the_plain_cross_entropy(tmp_path: Path) -> None:
    model, given = adapted(), batch(rows=ROWS, length=24)
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(given)}
    found = trainer(tmp_path, model, rows(given), TMKL(0.7), **evaluating)
    found.train()
    (evaluated,) = [logs for logs in found.state.log_history if "eval_loss" in logs]
    detached = found.evaluate()
    assert evaluated["eval_loss"] == detached["eval_loss"]
    assert "tmkl" not in evaluated


def test_steps_are_told(tmp_path: Path) -> None:
    model, given = adapted(), batch(rows=ROWS, length=24)
    reported = Reported()
    found = trainer(tmp_path, model, rows(given), reported, TMKL(0.7, every=2), max_steps=4)
    found.train()
    assert ["tmkl" in logs for logs in reported.logs if "loss" in logs] == [False, True] * 2


def _with_loss(outputs: Any, labels: Any, **_: Any) -> Tensor:
    return outputs.logits.sum()


class TakesLabels(transformers.Trainer):
    """As ms-swift's does for a loss scale."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """A loss of its own."""
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_trainer_that_takes_the_labels_away_is_found_out(tmp_path: Path) -> None:
    model, given = adapted(), batch(rows=ROWS, length=24)
    plain = trainer(tmp_path, model, rows(given))
    found = TakesLabels(
        model=model, args=plain.args, train_dataset=rows(given), callbacks=[TMKL(0.7)]
    )
    with pytest.raises(ValueError, match="took the labels away"):
        found.train()


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"compute_loss_func": _with_loss}, "compute_loss_func"),
    ],
)
def test_losses_of_its_own_are_refused(
    tmp_path: Path, arguments: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    model, given = adapted(), batch(rows=ROWS, length=24)
    found = trainer(tmp_path, model, rows(given), TMKL(0.7), **arguments)
    for name, value in more.items():
        setattr(found, name, value)
    with pytest.raises(ValueError, match=message):
        found.train()


def test_names_of_the_package_are_not_those_of_its_files() -> None:
    """Importing a file puts its name into the package, over what was there."""
    files = {path.stem for path in Path(moored.plugin.__file__).parent.glob("*.py")}
    assert not files & set(moored.plugin.__all__)
