"""What the model answers: prompts in, greedy text out, and how right it is.

Perplexities and divergences, which need no generation, are `evaluate.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from moored.config import EvaluationConfig
from moored.data import Prompt, pad_token_id
from moored.data.batch import left_padded
from moored.distributed.mesh import Mesh
from moored.evaluation.instructions import TASKS, Task
from moored.evaluation.report import BaseResult, Tally, TaskScore
from moored.models.engine import Engine
from moored.utils.progress import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """How instructions were followed that can be checked without a judge, read strictly.

    Attributes:
        constraints: that were met, per prompt.
        prompts: of which all constraints were met.
    """

    constraints: Tally
    prompts: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What one model's answers amount to. None: not asked.

    Attributes:
        exact_match: data.eval's prompts that were answered as the reference has it.
        followed: of the instructions.
        suite: of the suite's tasks, by name.
    """

    exact_match: Tally | None = None
    followed: Followed | None = None
    suite: Mapping[str, TaskScore] | None = None


def answered_in(base: BaseResult) -> Answered | None:
    """What the base's answers amounted to, as a report has it; None where it was not asked."""
    followed = None
    if base.instruction_tally is not None and base.instruction_prompts_followed is not None:
        num = base.num_instruction_prompts or 0
        full = round(base.instruction_prompts_followed * num)
        followed = Followed(
            constraints=base.instruction_tally, prompts=Tally(num=[num], hits=[full])
        )
    answered = Answered(
        exact_match=base.exact_match_tally, followed=followed, suite=base.suite or None
    )
    return None if answered == Answered() else answered


def answer_all(
    engine: Engine,
    mesh: Mesh,
    *,
    prompts: Sequence[Prompt],
    instructions: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    base: bool,
    poll: Callable[[], None],
    arm: str = "adapted",
) -> Answered:
    """Have all prompts answered, and judge the answers. Collective.

    Args:
        engine: policy and base.
        mesh: the processes.
        prompts: of the exact match.
        instructions: prompts whose `sample_id` is the name of a task.
        tokenizer: of the model.
        config: lengths and batch sizes.
        base: answer with adapters off.
        poll: called before every batch, on all ranks; may raise to stop.
        arm: who answers, where it is said how far this is.
    """
    size = config.micro_batch_size
    ask = partial(_answers, engine, mesh, tokenizer=tokenizer, size=size, base=base, poll=poll)
    exact = followed = None
    with engine.generating() if prompts or instructions else contextlib.nullcontext():
        if prompts:
            what, limit = f"answering data.eval ({arm})", config.max_new_tokens
            exact = exact_match(ask(prompts, max_new_tokens=limit, what=what), mesh)
        if instructions:
            what, limit = f"answering the instructions ({arm})", config.instruction_tokens
            followed = follow(ask(instructions, max_new_tokens=limit, what=what), mesh)
    return Answered(exact_match=exact, followed=followed)


def exact_match(answers: Iterator[tuple[Prompt, str]], mesh: Mesh) -> Tally:
    """Which answers equal the reference, white space at the ends apart. Collective."""
    found = {
        question.sample_id: (1, int(answer.strip() == question.completion.strip()))
        for question, answer in answers
    }
    return Tally.of(_of_all_ranks(found, mesh))


def follow(
    answers: Iterator[tuple[Prompt, str]], mesh: Mesh, tasks: Mapping[str, Task] = TASKS
) -> Followed:
    """Which constraints the answers to `tasks` meet. Collective."""
    found: dict[str, tuple[int, int]] = {}
    for question, answer in answers:
        met = [check.met_by(answer) for check in tasks[question.sample_id].checks]
        found[question.sample_id] = len(met), sum(met)
    rows = _of_all_ranks(found, mesh)
    full = [(1, int(num == met)) for num, met in rows]
    return Followed(constraints=Tally.of(rows), prompts=Tally.of(full))


def _of_all_ranks(found: Mapping[str, tuple[int, int]], mesh: Mesh) -> list[tuple[int, int]]:
    """(asked, right) of every rank's prompts, by their names: in the same order for all models."""
    mine = {name: list(row) for name, row in found.items()}
    every = {name: row for part in mesh.dp.gather(mine) for name, row in part.items()}
    return [(asked, right) for _, (asked, right) in sorted(every.items())]


def _answers(
    engine: Engine,
    mesh: Mesh,
    questions: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    max_new_tokens: int,
    base: bool,
    poll: Callable[[], None],
    what: str,
) -> Iterator[tuple[Prompt, str]]:
    """This rank's questions with their greedy answers; every rank must exhaust it. Collective."""
    # Prompts of like length share a batch; each rank gets as many batches as the others.
    ordered = sorted(questions, key=lambda q: (len(q.input_ids), q.sample_id))
    starts = range(0, len(ordered), size * mesh.dp.size)
    with Phase(what, len(starts), "batches") as phase:
        for start in phase.over(starts):
            poll()
            mine = ordered[start : start + starts.step][mesh.dp.rank :: mesh.dp.size]
            asked = mine or ordered[start : start + 1]  # a rank without a prompt walks along
            texts = _generated(engine, mesh, asked, tokenizer, max_new_tokens, base, phase)
            yield from zip(mine, texts, strict=False)


def _generated(
    engine: Engine,
    mesh: Mesh,
    questions: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    base: bool,
    phase: Phase,
) -> list[str]:
    new = continuations(
        engine,
        mesh,
        [q.input_ids for q in questions],
        pad=pad_token_id(tokenizer),
        stop_token_ids={i for q in questions for i in q.stop_token_ids},
        max_new_tokens=max_new_tokens,
        base=base,
        phase=phase,
    )
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def continuations(
    engine: Engine,
    mesh: Mesh,
    rows: Sequence[Sequence[int]],
    *,
    pad: int,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    base: bool,
    phase: Phase,
    **options: Any,
) -> torch.Tensor:
    """What follows each row of tokens, [rows, most new tokens] on the CPU. Collective.

    Args:
        engine: policy and base.
        mesh: the processes.
        rows: one at least, none empty.
        pad: fills the places before a shorter row, and after an end.
        stop_token_ids: that end a row.
        max_new_tokens: per row.
        base: generate with adapters off.
        phase: is told of every token that it goes on.
        **options: of Hugging Face's `generate`; by default greedy.
    """
    ids, mask = left_padded(rows, pad)
    # Said in full: a model's generation_config.json may say otherwise.
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    tokens = engine.generate(
        base=base,
        input_ids=ids.to(mesh.device),
        attention_mask=mask.to(mesh.device),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stop_token_ids),
        stopping_criteria=each_token(phase),
        **(greedy | options),
    )
    return tokens[:, ids.shape[1] :].cpu()


def each_token(phase: Phase) -> StoppingCriteriaList:
    """For Hugging Face's `generate`: tells a phase of every token, and never stops anything."""
    return StoppingCriteriaList([_EachToken(phase)])


class _EachToken(StoppingCriteria):
    def __init__(self, phase: Phase):
        self._phase = phase

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._phase.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
