"""The parts of a run, put together before its first step: data, model, engine, newest checkpoint.

What is done with them is `train.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moored.config import Config
from moored.config.regularizer import LEAST_WEIGHT
from moored.data import (
    BaseIdentity,
    DataReader,
    Prefetcher,
    TrainStream,
    load_samples,
    turn_ends,
)
from moored.data.batch import Batch
from moored.data.heldout import anchor_samples
from moored.data.samples import SampleSet
from moored.distributed.mesh import Mesh
from moored.evaluation.evaluate import Suite, build_suite
from moored.evaluation.generate import Answered
from moored.models.base_files import BaseFiles, resolve_base
from moored.models.engine import Engine
from moored.models.policy import PolicyModel, load_policy
from moored.models.reference import Reference
from moored.models.untrained_tokens import in_words, untrained
from moored.tracking import Tracker
from moored.tracking.run_directory import RunDirectory
from moored.training import checkpoint
from moored.training.forgetting_budget import Controller
from moored.training.lifecycle import require_same
from moored.training.step import StepStats
from moored.utils.errors import UserError

log = logging.getLogger(__name__)

FEW_MEASUREMENTS = 15  # of a budget's probe


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything the loop needs, built once before the first step."""

    config: Config
    mesh: Mesh
    directory: RunDirectory
    tracker: Tracker
    base_files: BaseFiles
    policy: PolicyModel
    engine: Engine
    stream: Prefetcher
    replay: TrainStream | None
    anchors: TrainStream | None
    suite: Suite
    controller: Controller | None
    probe_references: list[Reference] = field(default_factory=list)  # of the budget's probe
    num_steps: int
    step: int = 0
    train_seconds: float = 0.0
    train_tokens: int = 0
    refused_in_a_row: int = 0
    idle_in_a_row: int = 0  # updates of which no target was learned
    last_loss: float = float("nan")
    regularized: StepStats | None = None  # of the newest update with a divergence
    saved_step: int = 0  # of the newest checkpoint
    signals: list[int] = field(default_factory=list)
    base_answered: Answered | None = None  # by the base, once known
    prints_summary: bool = True


def assemble(config: Config, mesh: Mesh, directory: RunDirectory, tracker: Tracker) -> Run:
    """Data first (cheap to find wrong), then the model, then the newest checkpoint."""
    reader = DataReader()
    reader.check(config)
    base_files = resolve_base(config.model, mesh)
    samples = load_samples(
        config.data.train, base_files.tokenizer, config.data, base_files.vocab_size, reader=reader
    )
    stream = TrainStream(config, base_files.tokenizer, samples)
    if config.regularizer.holds_prompt:
        _require_prompts(samples)
    suite = build_suite(config, base_files, mesh, reader, learned=samples)
    num_steps = stream.total_steps()
    _require_length(config, num_steps)
    regularizer = config.regularizer
    replay = None
    if regularizer.kind == "replay":
        replay = TrainStream.of_replay(
            config, base_files.tokenizer, base_files.vocab_size, num_steps, reader
        )
    anchors = _anchors(config, base_files, num_steps, reader)
    del reader  # all is tokenised, and what it holds would stay beside the model
    controller = _controller(config, num_steps)
    require_same(
        mesh,
        config=config.fingerprint(),
        data=stream.fingerprint(),
        replay=replay.fingerprint() if replay else "",
        anchors=anchors.fingerprint() if anchors else "",
    )
    tracker.dataset(
        name=samples.name,
        digest=stream.fingerprint(),
        num_samples=samples.num_samples,
        num_tokens=samples.num_tokens,
    )
    tracker.event("sources", sources=samples.describe())
    if replay is not None:
        tracker.event("replayed_sources", sources=replay.samples.describe())
    if anchors is not None:
        tracker.event("anchors", sources=anchors.samples.describe())

    ends = turn_ends(samples, base_files.tokenizer, config.data.max_length)
    if mesh.is_main:
        directory.update_state(turn_ends=[asdict(end) for end in ends])

    policy = load_policy(base_files.source.path, config, mesh)
    for end in untrained(policy.head, ends, mesh.tp):
        line = in_words(end, base_files.tokenizer, config.model.name_or_path)
        log.log(logging.WARNING if mesh.is_main else logging.DEBUG, "%s", line)
    newest = checkpoint.newest(directory.checkpoints) if mesh.is_main else None
    name = mesh.world.broadcast(None if newest is None else str(newest))
    newest = None if name is None else Path(name)
    if newest is not None:
        checkpoint.load_adapter(newest, policy)
    engine = Engine(policy, config, mesh)
    engine.keep_references(config, base_files.source.revision, base_files.vocab_size)
    run = Run(
        config=config,
        mesh=mesh,
        directory=directory,
        tracker=tracker,
        base_files=base_files,
        policy=policy,
        engine=engine,
        stream=Prefetcher(stream, num_steps, prepare=_read_ahead(engine, config)),
        replay=replay,
        anchors=anchors,
        suite=suite,
        controller=controller,
        num_steps=num_steps,
    )
    if newest is not None:
        _resume(run, newest)
    return run


def _anchors(
    config: Config, base_files: BaseFiles, num_steps: int, reader: DataReader
) -> TrainStream | None:
    """The anchors' rows, if the recipe has any."""
    base = BaseIdentity(model=config.model, revision=base_files.source.revision)
    samples = anchor_samples(config, base_files.tokenizer, base, reader)
    if not samples:
        return None
    return TrainStream.of_anchors(config, base_files.tokenizer, samples, num_steps)


def _require_prompts(samples: SampleSet) -> None:
    """Refuse to hold what is not learned where everything is."""
    held = samples.held
    if len(held) < len(samples.sources):
        return  # streamed: not known before the end
    if sum(source.num_tokens - len(source) - source.num_targets for source in held) == 0:
        raise UserError(
            f"regularizer.positions is all, but every token of {samples.name} is learned, so there "
            "is nothing more to hold: set it to targets"
        )


def _require_length(config: Config, num_steps: int) -> None:
    """Refuse what a run of so many steps would never reach; of `train.steps` the recipe knows."""
    optim, regularizer = config.optim, config.regularizer
    for key, value, is_beyond, never in (
        (
            "optim.warmup_steps",
            optim.warmup_steps,
            optim.warmup_steps >= num_steps,
            "the learning rate would never reach its peak",
        ),
        (
            "regularizer.warmup_steps",
            regularizer.warmup_steps,
            regularizer.has_schedule and regularizer.warmup_steps >= num_steps,
            "the weight would never be reached",
        ),
        (
            "regularizer.every",
            regularizer.every,
            regularizer.has_divergence and regularizer.every > num_steps,
            "the divergence would never act",
        ),
    ):
        if is_beyond:
            raise UserError(
                f"{key}={value}, but the run has {num_steps} steps, so {never}: lower it, or train "
                "longer"
            )


def _controller(config: Config, num_steps: int) -> Controller | None:
    """The controller of the recipe's budget; says so where it will measure too seldom."""
    budget = config.regularizer.budget
    if budget is None:
        return None
    number = num_steps // budget.every
    if budget.every > 1 and number < FEW_MEASUREMENTS:
        log.warning(
            "regularizer.budget.every=%d: only %d measurements in %d steps, so the weight may not "
            "reach the budget: lower it to %d",
            budget.every,
            number,
            num_steps,
            max(1, num_steps // 20),
        )
    regularizer = config.regularizer
    controller = Controller(budget, regularizer.peak_weight)
    if controller.weight != regularizer.peak_weight:
        log.warning(
            "regularizer.%s=%g is outside the bounds of its budget (%g to max_weight=%g): it "
            "starts at %g",
            "anchors.weight" if regularizer.kind == "mol" else "weight",
            regularizer.peak_weight,
            LEAST_WEIGHT,
            budget.max_weight,
            controller.weight,
        )
    return controller


def _read_ahead(engine: Engine, config: Config) -> Callable[[Sequence[Batch]], object]:
    """What is done with the next step's batches while this one is computed."""
    if engine.references is None or not config.regularizer.compares_task:
        return len
    return engine.references.read_ahead


def _resume(run: Run, folder: Path) -> None:
    state = checkpoint.read_state(folder)
    run.engine.load_optimizer_tensors(checkpoint.read_optimizer(folder))
    run.stream.load_state_dict(state["cursor"])
    if run.replay is not None:
        run.replay.load_state_dict(state["replay_cursor"])
    if run.anchors is not None:
        run.anchors.load_state_dict(state["anchors_cursor"])
    if run.controller is not None:
        run.controller.load_state_dict(state["controller"])
    run.step = run.saved_step = state["step"]
    run.train_seconds, run.train_tokens = state["train_seconds"], state["train_tokens"]
    run.refused_in_a_row = state["refused_in_a_row"]
    run.idle_in_a_row = state.get("idle_in_a_row", 0)  # older runs never are
    run.last_loss = float("nan") if state["last_loss"] is None else state["last_loss"]
    run.tracker.event("resumed", step=run.step, checkpoint=folder.name)
    log.info("going on from step %d of %d (%s)", run.step, run.num_steps, folder)
