"""The run: resume, step, save, track, evaluate, stop.

No maths: an update is `step.py`'s, a figure is `evaluate.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from moored.config import Config
from moored.data.batch import Batch
from moored.distributed.mesh import peak_memory_bytes
from moored.evaluation.build_report import TrainedRun, to_report
from moored.evaluation.evaluate import Evaluation, Suite, evaluate, measure
from moored.evaluation.generate import Answered
from moored.evaluation.report import rise_pct, show, write
from moored.models.engine import leave
from moored.tracking import journal
from moored.tracking.run_directory import heartbeat, path_of
from moored.training import checkpoint, metric_names
from moored.training.lifecycle import (
    as_begun,
    asked_to_stop,
    ending,
    failures_named,
    is_out_of_memory,
    join_mesh,
    open_run_on_all_ranks,
    say_layout,
    signals_seen,
    start_tracking,
)
from moored.training.setup import Run, assemble
from moored.training.step import (
    StepStats,
    learning_rate_at,
    needs_kl,
    objective_of,
    train_step,
    weight_at,
)
from moored.utils.errors import (
    EvaluationFailedError,
    PeerLostError,
    PreemptedError,
    TrainingRefusedError,
    UserError,
)
from moored.utils.log import setup
from moored.utils.progress import Progress

log = logging.getLogger(__name__)
# Steps between looks whether what the ranks of a tensor-parallel group share is equal bit for bit.
REPLICA_CHECK_EVERY = 50
MOST_REFUSED = 5  # updates in a row whose gradient is not finite; then the run ends
MOST_IDLE = 10  # updates in a row of which no target is learned; likewise


def run(
    config: Config,
    *,
    restart: bool = False,
    path: Path | None = None,
    arm: str | None = None,
    parent: Path | None = None,
    base_answered: Answered | None = None,
) -> Path:
    """Train one recipe from its newest checkpoint, or from the start, to the end.

    The same call on every process. A finished run is left as it is.

    Args:
        config: the recipe.
        restart: remove what an earlier run of this recipe left.
        path: the run directory; by default `output.dir` / `name`.
        arm: the name of this run in its report; by default the regulariser's kind.
        parent: run directory of the comparison that this run belongs to.
        base_answered: by the base, where an earlier run of the same recipe had it answer.

    Returns:
        The run directory.

    Raises:
        MooredError: see its subclasses; `exit_code` says which kind.
    """
    os.umask(0o077)
    mesh = join_mesh(config)
    path = (path or path_of(config)).absolute()
    with contextlib.ExitStack() as stack:
        if parent is None:
            stack.callback(leave)
        directory, attempt = open_run_on_all_ranks(stack, config, path, mesh, restart=restart)
        config = as_begun(config, directory, mesh)
        setup(mesh.world.rank, path)
        if directory.state().get("status") == "done":
            log.info("%s is finished already: --restart starts over", path)
            return path
        tracker = start_tracking(config, path, attempt, mesh, parent)
        stack.enter_context(ending(directory, tracker, mesh))
        signals = stack.enter_context(signals_seen())
        run = assemble(config, mesh, directory, tracker)
        by_tokens = run.engine.policy.sequence_parallel
        say_layout(config, directory, mesh, by_tokens=by_tokens)
        run.prints_summary = parent is None  # a comparison prints one table for all its arms
        run.base_answered, run.signals = base_answered, signals
        stack.callback(run.engine.close)
        stack.callback(run.stream.close)
        _rehearse(run)
        _train(run)
        _export(run)
        _evaluate_and_report(run, arm or config.regularizer.kind)
        _tell_references(run)
        _require_budget(run)
    return path


def _rehearse(run: Run) -> None:
    """Try the largest micro-batch before anything is trained, so that no later one is too large."""
    config, mesh = run.config, run.mesh
    choice = config.train.rehearse
    if choice == "never" or (choice == "auto" and mesh.device.type != "cuda"):
        return
    batch = run.stream.largest(dp_size=mesh.share["dp_size"])
    rows, length = batch.input_ids.shape
    batch = batch.part(mesh.cp.rank, mesh.cp.size)
    regularizer = config.regularizer
    try:
        run.engine.rehearse(
            batch,
            objective_of(regularizer),
            with_kl=regularizer.has_divergence,
            l2_scale=float(regularizer.kind == "l2"),
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"the largest micro-batch, {rows} x {length} tokens, does not fit, and nothing was "
            f"trained ({str(error).splitlines()[0][:120]})"
        ) from error
    peak = peak_memory_bytes(mesh.device)
    run.tracker.event("rehearsal", rows=rows, length=length, peak_memory_bytes=peak)
    log.info(
        "the largest micro-batch, %d x %d tokens, fits: %.1f GiB of %s at most",
        rows,
        length,
        peak / 2**30,
        "GPU memory" if mesh.device.type == "cuda" else "memory",
    )


def _train(run: Run) -> None:
    """The training loop: update, count, save, evaluate, until done or told to stop."""
    config, mesh, engine = run.config, run.mesh, run.engine
    if mesh.is_main:
        run.directory.update_state(num_steps=run.num_steps)
    if run.step == 0 and config.evaluation.before:
        known = run.base_answered  # by an earlier arm of a comparison
        before = _measure(run, run.suite.without_prompts() if known else run.suite, base=True)
        before = replace(before, answered=known) if known else before
        run.base_answered = before.answered
        run.tracker.metrics(run.step, metric_names.of_evaluation(before))
    if _evaluates_now(run) and not _was_evaluated(run):  # it was stopped in the middle of it
        _evaluate(run)
    share = mesh.share
    with Progress(run.num_steps, run.step, enabled=mesh.is_main) as progress:
        while run.step < run.num_steps:
            batches = run.stream.next_step(**share)
            started = time.perf_counter()
            stats = train_step(
                engine,
                batches,
                mesh,
                step=run.step,
                regularizer=config.regularizer,
                learning_rate=learning_rate_at(run.step, run.num_steps, config.optim),
                seed=config.train.seed,
                weight=_weight(run),
                replayed=run.replay.next_step(**share) if run.replay else (),
                anchored=_anchored(run, share),
            )
            seconds = time.perf_counter() - started
            run.step += 1
            run.train_seconds += seconds
            run.train_tokens += stats.num_tokens
            run.last_loss = stats.loss
            _track_step(run, stats, seconds)
            progress.update(
                loss=stats.loss,
                ce=stats.ce,
                kl=stats.kl,
                tokens_per_second=run.train_tokens / run.train_seconds,
            )
            _require_finite(run, stats, batches)
            _require_learned(run, stats)
            if run.step % REPLICA_CHECK_EVERY == 0:
                engine.require_equal_replicas()
            _steer(run)
            if run.step % config.train.save_every == 0 or run.step == run.num_steps:
                _save(run)
            _stop_if_asked(run)
            if _evaluates_now(run):
                _evaluate(run)


def _anchored(run: Run, share: dict[str, int]) -> Sequence[Batch]:
    """The anchors beside the next update: where it has a divergence, else none are drawn."""
    if run.anchors is None or not needs_kl(run.step, run.config.regularizer):
        return ()
    return run.anchors.next_step(**share)


def _stop_if_asked(run: Run) -> None:
    """Where any rank got a signal, save and leave on all of them. Called every step and batch.

    Says too that the run is alive, to those who would take over its lock.
    """
    if run.mesh.is_main:
        heartbeat(run.directory)
    if not asked_to_stop(run.mesh, run.signals):
        return
    if run.saved_step < run.step:
        _save(run)
    saved = f"step {run.saved_step} is saved in" if run.saved_step else "nothing is saved yet in"
    raise PreemptedError(
        f"stopped by a signal after step {run.step} of {run.num_steps}; {saved} "
        f"{run.directory.path}: start the same command again to go on"
    )


def _weight(run: Run) -> float:
    """The regulariser's, in the next update."""
    if run.controller is not None:
        return run.controller.weight
    return weight_at(run.step, run.num_steps, run.config.regularizer)


def _steer(run: Run) -> None:
    """Measure what the budget's probe has lost, every so many steps, and move the weight."""
    controller = run.controller
    if controller is None or run.suite.probe is None:
        return
    if run.step % controller.budget.every and run.step != run.num_steps:
        return
    # Not to be stopped in between: a run that goes on must not go on without this measurement.
    lost = measure(run.engine, run.suite.probe, run.mesh, references=run.probe_references)
    rise = rise_pct(lost.base_ppl, lost.policy_ppl)
    assert rise is not None
    controller.update(lost.kl if controller.budget.by_drift else rise)
    run.tracker.metrics(run.step, metric_names.of_budget(controller))
    ended = run.step == run.num_steps  # then it is exported and reported before it is refused
    if controller.is_lost and not ended and controller.budget.when_broken == "stop":
        _save(run)
        raise TrainingRefusedError(f"{controller.verdict(run.step)}; the last step is saved")


def _track_step(run: Run, stats: StepStats, seconds: float) -> None:
    if stats.kl is not None or stats.kl_anchors is not None:
        run.regularized = stats
    if run.step % run.config.train.log_every and run.step != run.num_steps:
        return
    kind, peak = run.config.regularizer.kind, peak_memory_bytes(run.mesh.device)
    spent = {"seconds": seconds, "peak_memory_bytes": peak}
    values = metric_names.of_step(stats, kind, **spent, regularized=run.regularized)
    run.tracker.metrics(run.step, values)


def _require_finite(run: Run, stats: StepStats, batches: Sequence[Batch]) -> None:
    """Count refused updates; stop when too many follow each other."""
    if stats.applied:
        run.refused_in_a_row = 0
        return
    run.refused_in_a_row += 1
    run.tracker.event("update_refused", step=run.step, loss=stats.loss)
    samples = [name for batch in batches for name in batch.sample_ids]
    log.warning(
        "step %d: the gradient is not finite (loss %.4g): update refused; samples of this rank: %s",
        run.step,
        stats.loss,
        ", ".join(samples[:20]) + (f" and {len(samples) - 20} more" if samples[20:] else ""),
    )
    if run.refused_in_a_row >= MOST_REFUSED:
        raise TrainingRefusedError(
            f"{MOST_REFUSED} updates in a row had a non-finite gradient (last at step {run.step}): "
            "lower optim.learning_rate, or look at the data of these steps; the adapter is as it "
            "was before them"
        )


def _require_learned(run: Run, stats: StepStats) -> None:
    """Say where the base let no target of an update be learned; stop when it goes on so."""
    if stats.learned_fraction is None or stats.num_targets:
        run.idle_in_a_row = 0
        return
    run.idle_in_a_row += 1
    most = run.config.regularizer.max_perplexity
    why = f"no target has a perplexity under the base of at most {most:g}, so nothing is learned"
    if run.idle_in_a_row < min(MOST_IDLE, run.num_steps):
        log.warning("step %d: %s of it", run.step, why)
        return
    raise TrainingRefusedError(
        f"{run.idle_in_a_row} updates in a row (last at step {run.step}): {why}: raise "
        "regularizer.max_perplexity"
    )


def _tell_references(run: Run) -> None:
    """Say how often the cache saved this rank a forward of the base."""
    references = run.engine.references
    if references is None:
        return
    num_read, num_computed = references.num_read, references.num_computed
    run.tracker.event("reference_cache", read=num_read, computed=num_computed)
    log.info(
        "reference cache: %d of %d micro-batches read from %s",
        num_read,
        num_read + num_computed,
        references.folder,
    )


def _require_budget(run: Run) -> None:
    """Say whether the budget was held; where the recipe says so, end as refused if it was not."""
    controller = run.controller
    if controller is None:
        return
    verdict = controller.verdict(run.step)
    if controller.is_held:
        log.info(verdict)
    elif controller.budget.when_broken == "continue":
        log.warning(verdict)
    else:
        raise TrainingRefusedError(f"{verdict}; the adapter is in {run.directory.adapter}")


def _save(run: Run) -> None:
    started = time.perf_counter()
    if run.engine.references is not None:
        run.engine.references.flush()
    saved = checkpoint.Checkpoint(
        step=run.step,
        optimizer=run.engine.optimizer_tensors(wanted=run.mesh.is_main),
        state={
            "cursor": run.stream.state_dict(),
            "replay_cursor": run.replay.state_dict() if run.replay else None,
            "anchors_cursor": run.anchors.state_dict() if run.anchors else None,
            "controller": run.controller.state_dict() if run.controller else None,
            "train_seconds": run.train_seconds,
            "train_tokens": run.train_tokens,
            "refused_in_a_row": run.refused_in_a_row,
            "idle_in_a_row": run.idle_in_a_row,
            "last_loss": run.last_loss if math.isfinite(run.last_loss) else None,
            "seed": run.config.train.seed,
            "world_size": run.mesh.world.size,
        },
    )
    is_saved = True
    if run.mesh.is_main:
        folder = checkpoint.folder_of(run.directory.checkpoints, run.step)
        try:
            base, ours = run.config.model.name_or_path, run.directory.require_owned
            checkpoint.write(folder, saved, run.policy.causal_lm, base, require_owned=ours)
            checkpoint.prune(run.directory.checkpoints, run.config.train.keep_checkpoints)
            run.directory.update_state(step=run.step)
            run.tracker.event("checkpoint", step=run.step, seconds=time.perf_counter() - started)
        except OSError as error:
            # A full disk must not end the run: the previous checkpoint still stands.
            log.warning("checkpoint of step %d was not written: %s", run.step, error)
            run.tracker.event("checkpoint_failed", step=run.step, error=str(error))
            is_saved = False
    if run.mesh.world.broadcast(is_saved):
        run.saved_step = run.step


def _export(run: Run) -> None:
    """The final adapter, written and read back before anything else can fail."""
    tensors = run.engine.adapter_tensors(wanted=run.mesh.is_main)
    error: BaseException | None = None
    if run.mesh.is_main:
        try:
            base, ours = run.config.model.name_or_path, run.directory.require_owned
            folder, model = run.directory.adapter, run.policy.causal_lm
            checkpoint.replace_adapter(folder, tensors, model, base, require_owned=ours)
        except OSError as caught:
            error = UserError(
                f"{run.directory.adapter}: the adapter could not be written: {caught}: make room "
                "and start the same command again"
            )
    run.mesh.raise_on_all_ranks(error)
    run.tracker.artifact(run.directory.adapter, "adapter")
    run.tracker.register("adapter")
    log.info("adapter written to %s", run.directory.adapter)


def _measure(run: Run, suite: Suite, *, base: bool = False, pinpoint: bool = False) -> Evaluation:
    return evaluate(
        run.engine,
        suite,
        run.mesh,
        tokenizer=run.base_files.tokenizer,
        config=run.config.evaluation,
        base=base,
        pinpoint=pinpoint,
        poll=partial(_stop_if_asked, run),
    )


def _evaluates_now(run: Run) -> bool:
    every = run.config.evaluation.every
    return bool(every) and run.step % every == 0 and 0 < run.step < run.num_steps


def _was_evaluated(run: Run) -> bool:
    """Whether an earlier start has measured the adapter of this step. Collective."""
    curves = journal.metrics(run.directory.path) if run.mesh.is_main else {}
    known = [curves[name] for name in curves if name.startswith(("eval/", "retention/"))]
    is_known = any(step == run.step for points in known for step, _ in points)
    return run.mesh.world.broadcast(is_known)


def _evaluate(run: Run) -> None:
    """An evaluation on the way: without what has to be generated."""
    evaluation = _measure(run, run.suite.without_prompts())
    run.tracker.metrics(run.step, metric_names.of_evaluation(evaluation))


def _evaluate_and_report(run: Run, name: str) -> None:
    """Measure the adapter that was exported; a failure here must not cost it."""
    log.info("evaluating the adapter against its base")
    training = TrainedRun(
        num_steps=run.step,
        seconds=run.train_seconds,
        tokens=run.train_tokens,
        final_loss=run.last_loss if math.isfinite(run.last_loss) else None,
        peak_memory_bytes=peak_memory_bytes(run.mesh.device),
        **({} if run.controller is None else run.controller.outcome()),
    )
    if run.mesh.is_main:
        run.directory.update_state(training=asdict(training))
    try:
        with failures_named(run.mesh):
            training = replace(training, **_divergence(run))
            if run.mesh.is_main:
                run.directory.update_state(training=asdict(training))
            after = _measure(run, run.suite, pinpoint=True)
            if run.suite.asks and run.base_answered is None:
                base = _measure(run, run.suite.only_prompts(), base=True)
                run.base_answered = base.answered
            run.tracker.metrics(run.step, metric_names.of_evaluation(after))
            error: BaseException | None = None
            if run.mesh.is_main:
                try:
                    _report(run, name, after, training)
                except Exception as caught:
                    error = caught
            run.mesh.raise_on_all_ranks(error)
    except (PreemptedError, PeerLostError):
        raise
    except Exception as error:
        raise EvaluationFailedError(
            f"the adapter is in {run.directory.adapter}, but its evaluation failed: {error}: "
            f"mend it and run `moored evaluate {run.directory.path}`"
        ) from error


def _divergence(run: Run) -> dict[str, float | int]:
    """How far the policy went from its base on what it learned: fields of `TrainedRun`."""
    assert run.suite.training is not None
    what, poll = "measuring the divergence on the training data", partial(_stop_if_asked, run)
    # In micro-batches of its own, which would fill a cache of the training's.
    with run.engine.uncached():
        found = measure(run.engine, run.suite.training, run.mesh, poll=poll, what=what)
    run.tracker.metrics(run.step, metric_names.of_learned(found))
    return {
        "train_kl": found.kl,
        "train_tmkl": found.tmkl,
        "num_train_targets": found.num_tokens,
    }


def _report(run: Run, name: str, after: Evaluation, training: TrainedRun) -> None:
    report = to_report(
        run.config,
        run.base_files.source,
        name,
        after,
        training,
        base_answered=run.base_answered,
        num_prompts=len(run.suite.prompts),
        trained_by=run.config,
        settings=run.suite.settings,
    )
    run.tracker.metrics(run.step, metric_names.of_suite_change(report))
    write(report, run.directory.report, curves={name: journal.metrics(run.directory.path)})
    run.tracker.artifact(run.directory.report, "report")
    if run.prints_summary:
        show(report, sys.stdout)
