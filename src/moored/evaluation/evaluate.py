"""What a policy learned, forgot and drifted: perplexities and KL to the base, text by text.

Never trains, and draws nothing: figures go into the dataclasses of `moored.evaluation.report`. What
has to be generated for it is in `generate.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from moored.config import PROBE, Config, Corpus, EvaluationConfig
from moored.data import (
    BaseIdentity,
    DataReader,
    Prompt,
    SampleSet,
    by_domain,
    eval_batches,
    eval_samples,
    load_samples,
    pad_token_id,
    prompts,
    retention_samples,
)
from moored.data.batch import Batch, Sample
from moored.distributed.mesh import Mesh
from moored.evaluation.drift_examples import DriftCollector
from moored.evaluation.generate import Answered, answer_all
from moored.evaluation.instructions.tasks import instruction_prompts
from moored.evaluation.report import (
    Blocks,
    Tally,
    Where,
)
from moored.evaluation.task_suite import TaskSuite, open_task_suite
from moored.loss.drift import DriftSums
from moored.models.base_files import BaseFiles, require_positions
from moored.models.engine import Engine
from moored.models.reference import Reference
from moored.utils.progress import Phase

# Of what is learned: enough for two digits of a divergence, and next to nothing beside a run.
LEARNED_SAMPLES = 64


def _go_on() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """Policy and base on one text, over its scored tokens.

    Attributes:
        num_tokens: scored tokens.
        policy_ppl: exp of the policy's mean cross-entropy.
        base_ppl: the same of the base.
        kl: mean KL(base || policy) over the whole vocabulary, nats per token.
        tmkl: the same with the true token removed from both, nats per token.
        top1_agreement: share of positions at which both prefer the same token.
        alternatives: the part of `kl` that is among the alternatives to the true token.
        last_word: samples whose targets all are the policy's first choice; of text of which only
            last words are scored.
        base_last_word: the same of the base.
        blocks: sums over blocks of samples.
    """

    num_tokens: int
    policy_ppl: float
    base_ppl: float
    kl: float
    tmkl: float
    top1_agreement: float
    alternatives: float
    last_word: Tally | None
    base_last_word: Tally | None
    blocks: Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalText:
    """One text as this rank's batches of it, with the order of its samples.

    Attributes:
        batches: one sample a row.
        sample_ids: of the whole text, in its order.
        last_words: whether only the last word of each sample is scored.
    """

    batches: Sequence[Batch]
    sample_ids: Sequence[str]
    last_words: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is evaluated, tokenised before the model loads; the same on every rank.

    Attributes:
        adaptation: the new task's held-out data; None without data.eval.
        retention: the corpora by name.
        prompts: all prompts of the exact-match task, empty without one.
        instructions: all prompts of the instructions, empty without them.
        probe: the text of the forgetting budget; None without one.
        tasks: the suite of general tasks; None without one.
        training: some of the samples that are learned; None where nobody trains.
    """

    adaptation: EvalText | None
    retention: Mapping[str, EvalText]
    prompts: Sequence[Prompt]
    instructions: Sequence[Prompt]
    probe: EvalText | None = None
    tasks: TaskSuite | None = None
    training: EvalText | None = None

    @property
    def asks(self) -> bool:
        """Whether something is asked of each model, which says nothing of the base by itself."""
        return bool(self.prompts or self.instructions or self.tasks)

    @property
    def settings(self) -> dict[str, str]:
        """What a reader needs to repeat it, beside the recipe."""
        return self.tasks.settings if self.tasks else {}

    def without_prompts(self) -> Suite:
        """The same without what is asked, which is slow."""
        return replace(self, prompts=(), instructions=(), tasks=None)

    def only_prompts(self) -> Suite:
        """Nothing but what is asked."""
        return replace(self, adaptation=None, retention={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All figures of one policy (or, with adapters off, of the base)."""

    adaptation: TextFigures | None
    retention: Mapping[str, TextFigures]
    where: Mapping[str, Where]
    answered: Answered


def build_suite(
    config: Config,
    located: BaseFiles,
    mesh: Mesh,
    reader: DataReader | None = None,
    held_out: SampleSet | None = None,
    learned: SampleSet | None = None,
) -> Suite:
    """Read and tokenise everything that will be evaluated.

    Args:
        config: the recipe.
        located: the base.
        mesh: the processes.
        reader: has read the recipe's data, if somebody has.
        held_out: all of data.eval, if somebody has tokenised it.
        learned: data.train, where the divergence on it is to be measured.

    Raises:
        UserError: a file is missing, broken or too short, by name.
    """
    tokenizer, vocab_size = located.tokenizer, located.vocab_size
    reader = reader or DataReader()
    windows = {f"{place}.window_tokens": c.window_tokens for place, c in config.corpora().items()}
    require_positions(located, {"data.max_length": config.data.max_length, **windows})
    deal = {
        "micro_batch_size": config.evaluation.micro_batch_size,
        "dp_rank": mesh.dp.rank,
        "dp_size": mesh.dp.size,
        "pad_token_id": pad_token_id(tokenizer),
        "vocab_size": vocab_size,
    }

    def text(samples: Sequence[Sample], *, last_words: bool = False) -> EvalText:
        ids = [sample.sample_id for sample in samples]
        batches = eval_batches(samples, **deal)
        return EvalText(batches=batches, sample_ids=ids, last_words=last_words)

    base = BaseIdentity(model=config.model, revision=located.source.revision)
    adaptation = None
    if config.data.eval:
        if held_out is None:
            held_out = load_samples(
                config.data.eval,
                tokenizer,
                config.data,
                vocab_size,
                section="data.eval",
                reader=reader,
            )
        adaptation = text(eval_samples(config, tokenizer, loaded=held_out))
    corpora: dict[str, Corpus] = {}
    for name, corpus in config.retention.items():
        corpora |= by_domain(name, corpus, reader.corpus)
    retention = {
        name: text(
            retention_samples(name, corpus, tokenizer, base=base, reader=reader),
            last_words=corpus.target == "last_word",
        )
        for name, corpus in corpora.items()
    }
    probe = None
    if config.regularizer.budget is not None:
        corpus = config.regularizer.budget.probe
        probe = text(
            retention_samples("probe", corpus, tokenizer, place=PROBE, base=base, reader=reader)
        )
    asked = config.evaluation
    return Suite(
        adaptation=adaptation,
        retention=retention,
        prompts=prompts(config, tokenizer, reader) if asked.exact_match else [],
        instructions=instruction_prompts(config, tokenizer) if asked.instructions else [],
        probe=probe,
        tasks=open_task_suite(config, located, mesh),
        training=text(_some(learned)) if learned is not None else None,
    )


def _some(samples: SampleSet) -> list[Sample]:
    """At most `LEARNED_SAMPLES`, spread evenly over all sources; of what is streamed the start.

    None is more than twice as long as half of them: one that training meets alone, if at all, must
    not be what the memory has no room for when all is learned.
    """
    parts = samples.at_hand()
    total = sum(map(len, parts))
    count = min(total, LEARNED_SAMPLES)
    wanted = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    found: list[Sample] = []
    first = 0
    for part in parts:
        found += [part[n - first] for n in wanted if 0 <= n - first < len(part)]
        first += len(part)
    longest = 2 * statistics.median_low([len(sample) for sample in found]) if found else 0
    return [sample for sample in found if len(sample) <= longest]


def evaluate(
    engine: Engine,
    suite: Suite,
    mesh: Mesh,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    base: bool = False,
    pinpoint: bool = False,
    poll: Callable[[], None] = _go_on,
    arm: str = "adapted",
) -> Evaluation:
    """Measure the engine's policy against its base on every text. Collective.

    Args:
        engine: policy and base.
        suite: what to measure.
        mesh: the processes.
        tokenizer: of the model.
        config: lengths and batch sizes of the generated answers.
        base: generate the answers with adapters off.
        pinpoint: also find out where the policy drifts, for a report.
        poll: called before every batch, on all ranks; may raise to stop.
        arm: what the policy is called where it is said how far this is.
    """
    of = partial(measure, engine, mesh=mesh, poll=poll)
    both, asked = f"{arm} and base", "base" if base else arm
    adaptation = None
    if suite.adaptation is not None:
        adaptation = of(suite.adaptation, what=f"measuring data.eval ({both})")
    retention: dict[str, TextFigures] = {}
    where: dict[str, Where] = {}
    for name, text in suite.retention.items():
        collector = DriftCollector() if pinpoint else None
        what = f"measuring retention.{name} ({both})"
        retention[name] = of(text, collector=collector, what=what)
        if collector is not None:
            where[name] = collector.where(mesh, tokenizer)
    answered = answer_all(
        engine,
        mesh,
        prompts=suite.prompts,
        instructions=suite.instructions,
        tokenizer=tokenizer,
        config=config,
        base=base,
        poll=poll,
        arm=asked,
    )
    if suite.tasks is not None:
        scores = suite.tasks.ask(engine, mesh, base=base, arm=asked, poll=poll)
        answered = replace(answered, suite=scores)
    return Evaluation(adaptation=adaptation, retention=retention, where=where, answered=answered)


def measure(
    engine: Engine,
    text: EvalText,
    mesh: Mesh,
    poll: Callable[[], None] = _go_on,
    references: list[Reference] | None = None,
    collector: DriftCollector | None = None,
    what: str = "measuring the budget's probe",
) -> TextFigures:
    """Policy and base on one text, of which each rank has its batches. Collective.

    Args:
        engine: policy and base.
        text: what to measure.
        mesh: the processes.
        poll: called before every batch, on all ranks; may raise to stop.
        references: for a text that is measured again and again: a list, empty at first, that keeps
            the base's hidden states ([N, D] per batch), which never change.
        collector: learns where the policy drifts.
        what: is done, in words.
    """
    with Phase(what, len(text.batches), "batches") as phase:
        batches = phase.over(text.batches)
        found = sample_sums(engine, batches, mesh, poll, references, collector)
    ordered = [found[name] for name in text.sample_ids]
    sums = {name: [row[i] for row in ordered] for i, name in enumerate(SUMS)}
    total = {name: math.fsum(values) for name, values in sums.items()}
    count = max(1.0, total["num_tokens"])
    return TextFigures(
        num_tokens=int(total["num_tokens"]),
        policy_ppl=_exp(total["ce"] / count),
        base_ppl=_exp(total["ce_base"] / count),
        kl=total["kl"] / count,
        tmkl=total["tmkl"] / count,
        top1_agreement=total["agree"] / count,
        alternatives=total["alternatives"] / count,
        last_word=_all_hit(sums["hits"], sums["num_tokens"]) if text.last_words else None,
        base_last_word=_all_hit(sums["base_hits"], sums["num_tokens"]) if text.last_words else None,
        blocks=Blocks.of(sums),
    )


def sample_sums(
    engine: Engine,
    batches: Iterable[Batch],
    mesh: Mesh,
    poll: Callable[[], None] = _go_on,
    references: list[Reference] | None = None,
    collector: DriftCollector | None = None,
) -> dict[str, list[float]]:
    """`SUMS` over the targets of each sample, of all ranks' batches (see `measure`). Collective."""
    mine: dict[str, list[float]] = {}
    for index, host_batch in enumerate(batches):
        poll()
        batch = host_batch.to(mesh.device)
        if references is None or index == len(references):
            reference = engine.reference(host_batch)
            if references is not None:
                references.append(reference)
        else:
            reference = references[index]
        rows = engine.drift(batch, reference, collector.num_spots if collector else 0)
        if collector is not None:
            collector.add(batch, rows)
        sums = _by_sample(rows, batch).tolist()
        mine |= dict(zip(batch.sample_ids, sums, strict=True))
    return {name: sums for part in mesh.dp.gather(mine) for name, sums in part.items()}


# What is summed over each sample.
SUMS = (
    "num_tokens", "ce", "ce_base", "kl", "tmkl", "alternatives", "agree", "hits", "base_hits",
)  # fmt: skip


def _by_sample(rows: DriftSums, batch: Batch) -> torch.Tensor:
    """The sums over each sample of a batch [samples, `SUMS`], in fp64."""
    # KL = KL of the target's mass + (1 - q_y) * masked KL: the chain rule, q_y the base's.
    alternatives = -torch.expm1(-rows.ce_reference) * rows.tmkl
    columns = (
        torch.ones_like(rows.kl), rows.ce_policy, rows.ce_reference, rows.kl, rows.tmkl,
        alternatives, rows.top1_agree, rows.top1_correct, rows.top1_correct_reference,
    )  # fmt: skip
    values = torch.stack([column.double() for column in columns], dim=1)
    sums = values.new_zeros((len(batch.sample_ids), len(columns)))
    return sums.index_add_(0, batch.target_index // batch.input_ids.shape[1], values)


def _all_hit(hits: Sequence[float], num_tokens: Sequence[float]) -> Tally:
    pairs = zip(hits, num_tokens, strict=True)
    return Tally.of([(1, int(hit == count)) for hit, count in pairs])


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
