"""The evaluation harness (lm_eval) asks our model: its tasks and metrics, our policy and base.

The only importer of lm_eval, which is an optional extra: who imports this file has looked whether
it is installed. What a task asks and how it is scored is the harness's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moored.data import eval_batches, pad_token_id
from moored.data.batch import Sample
from moored.data.chat import ChatEncoder
from moored.data.template import TemplateError
from moored.distributed.mesh import Mesh
from moored.evaluation.evaluate import SUMS, sample_sums
from moored.evaluation.generate import continuations
from moored.models.base_files import BaseFiles
from moored.models.engine import Engine
from moored.utils.environment import version_of
from moored.utils.errors import UserError
from moored.utils.progress import Phase

log = logging.getLogger(__name__)
FEWSHOT_SEED = 1234  # the harness's own default
BOOTSTRAP_DRAWS = 1000  # for metrics without a closed form, such as perplexity
POSITIONS = 2048  # of a model that states no limit
ROWS_AT_ONCE = 4096  # collated on the host

Figures = dict[str, float | None]


def _go_on() -> None:
    pass


class Asking(NamedTuple):
    """Who asks for tasks, in the words of errors: an option, that of its folder, a remedy."""

    option: str = "--lm-eval"
    include: str = "--lm-eval-include"
    fetch: str = "fetch its data once where the hub can be reached"


def open_tasks(
    names: Sequence[str], include: Path | None, mesh: Mesh, asking: Asking | None = None
) -> Any:
    """Find tasks of the harness and load their data, before a model is loaded.

    Args:
        names: of tasks, groups or tags, or paths of a task's YAML file.
        include: a folder with further tasks.
        mesh: the processes; the first one fetches. Collective.
        asking: who asks; None: the command line.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    return merged([part for _, part in opened(names, include, mesh, asking or Asking())])


def opened(
    names: Sequence[str], include: Path | None, mesh: Mesh, asking: Asking
) -> list[tuple[str, Any]]:
    """What each name stands for, as the harness has it; see `open_tasks`."""
    option = asking.option
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = _manager(names, include)
    except Exception as error:  # whatever a task's file brings about
        raise UserError(f"{asking.include} {include}: {_line(error)}: mend its files") from error
    unknown = [n for n in names if n not in manager.all_tasks and not Path(n).is_file()]
    if unknown:
        raise UserError(
            f"{option} {unknown[0]}: lm_eval {version_of('lm_eval')} has no such task: `lm_eval "
            f"ls tasks` lists them, {asking.include} adds a folder of your own"
        )
    found: list[tuple[str, Any]] = []
    with mesh.main_first("fetch the data of the harness's tasks"):
        for name in names:
            try:
                found.append((name, manager.load([name])))
            except Exception as error:  # of `datasets`, or of a task's own code
                raise UserError(
                    f"{option} {name}: {_line(error)}: {asking.fetch}, or leave the task out"
                ) from error
    owners: dict[str, str] = {}
    for name, part in found:
        for leaf, task in part["tasks"].items():
            if owners.setdefault(leaf, name) != name:
                raise UserError(
                    f"{option}: {leaf} is in {owners[leaf]} and in {name}: leave one of them out"
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"{option} {task.task_name}: it runs code that the model writes, which is "
                    "never done here: leave it out"
                )
    return found


def merged(parts: Sequence[Any]) -> Any:
    """Several answers of the harness to what a name stands for, as one."""
    kinds = ("tasks", "groups", "group_map")
    return {kind: {k: v for part in parts for k, v in part[kind].items()} for kind in kinds}


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """The tasks of the folder alone where it has all of them: the harness's thousands take time."""
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def run_tasks(
    model: HarnessModel, tasks: Any, *, base: bool, arm: str = "adapted"
) -> dict[str, Figures]:
    """Task (or group) -> metric -> value of policy or base. Collective.

    Args:
        model: ours.
        tasks: as `open_tasks` gave them.
        base: measure with adapters off.
        arm: what the policy is called where it is said how far this is.

    Returns:
        Equal on all ranks; `METRIC_stderr` is the harness's standard error of METRIC, None where it
        has none. A metric behind another filter than `none` has that in brackets.
    """
    model.base, model.arm = base, arm
    results = _evaluated(model, tasks, "--lm-eval", log_samples=False)
    return {name: _figures(values) for name, values in results["results"].items()}


def run_questions(
    model: HarnessModel, tasks: Any, questions: Mapping[str, Sequence[int]], option: str
) -> dict[str, list[dict[str, Any]]]:
    """What is scored of single questions of tasks; as chats where the model has them. Collective.

    Args:
        model: ours, by its `base` policy or base.
        tasks: as `open_tasks` gave them.
        questions: task -> numbers of its questions, in their order.
        option: what asked for them, in errors.

    Returns:
        Task -> one entry per question and filter, in their order: `filter`, and metric -> value.
    """
    picked = {name: list(numbers) for name, numbers in questions.items()}
    some = {"tasks": {name: tasks["tasks"][name] for name in picked}, "groups": {}, "group_map": {}}
    as_chat = model.chat is not None
    results = _evaluated(
        model,
        some,
        option,
        samples=picked,
        log_samples=True,
        apply_chat_template=as_chat,
        fewshot_as_multiturn=as_chat,
    )
    return results["samples"]


def _evaluated(model: HarnessModel, tasks: Any, option: str, **options: Any) -> Any:
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork this process
    torch.manual_seed(FEWSHOT_SEED)  # should a task sample: the same on every rank
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        return evaluate(lm=model, task_dict=tasks, bootstrap_iters=BOOTSTRAP_DRAWS, **options)
    except TemplateError as error:
        raise UserError(f"{option}: {error}, or leave the task out") from error
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{option}: a task cannot be run: {_line(error)}: leave it out") from error


def settings_of(tasks: Any) -> dict[str, str]:
    """What a reader needs to repeat it."""
    shots = {name: task.get_config("num_fewshot") for name, task in tasks["tasks"].items()}
    named = sorted({f"{count}-shot" for count in shots.values()})
    return {"evaluation harness": f"lm_eval {version_of('lm_eval')}, {', '.join(named)}"}


class HarnessModel(TemplateLM):
    """Our engine in the harness's words.

    Every rank is given all requests; they are dealt here. Log-likelihoods come from the same head
    as every other figure, in fp32 at least: the sum over a continuation's tokens, in nats. One pass
    gives policy and base, so that the second of two runs needs none.

    Attributes:
        base: answer with adapters off.
        arm: what the policy is called where it is said how far this is.
        chat: lays out what is asked; None: asked as the tasks have it.
        poll: called before every batch, on all ranks; may raise to stop.
        num_cut: contexts that were cut at their start, since the model has too few positions.
    """

    def __init__(
        self,
        engine: Engine,
        located: BaseFiles,
        mesh: Mesh,
        *,
        rows: int,
        chat: ChatEncoder | None = None,
    ):
        """As what the harness asks.

        Args:
            engine: policy and base.
            located: its tokenizer and limits.
            mesh: the processes.
            rows: sequences per rank and forward.
            chat: lays out what is asked.
        """
        super().__init__()
        self.base, self.arm = False, "adapted"
        self.chat, self.poll, self.num_cut = chat, _go_on, 0
        self.tokenizer: Any = located.tokenizer
        self._stops = [self.eot_token_id] if chat is None else list(chat.answer_ends())
        self._engine, self._mesh, self._rows = engine, mesh, rows
        self._max_length = located.max_positions or POSITIONS
        self._vocab_size = located.vocab_size
        self._known: dict[bytes, tuple[float, bool]] = {}  # of the base

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens; by default with the start token where the tokenizer puts one, but not twice.

        What the chat template laid out has what it is to have.
        """
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            is_plain = self.chat is None
            add_special_tokens = is_plain and not (start and string.startswith(start))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """What is asked as the model is to be asked: a conversation that its answer follows.

        Args:
            chat_history: turns with `role` and `content`.
            add_generation_prompt: False: the last turn is the beginning of the answer.

        Raises:
            TemplateError: the template refuses it.
        """
        assert self.chat is not None
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            return self.chat.prompt_text(turns) + begun
        except TemplateError:
            if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
                raise
        # A template that knows no system turn: its text begins the first question.
        first = f"{turns[0]['content'].rstrip()}\n\n{turns[1]['content']}"
        return self.chat.prompt_text([{"role": "user", "content": first}, *turns[2:]]) + begun

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own cache, which is not used."""
        return str(self.tokenizer.name_or_path)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that score every token once."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        keys = [_key(context, continuation) for _, context, continuation in requests]
        answers: dict[bytes, tuple[float, bool]] = dict(self._known) if self.base else {}
        wanted = {
            key: self._sample(index, *request[1:])
            for index, (key, request) in enumerate(zip(keys, requests, strict=True))
            if key not in answers
        }
        # Rows of like length share a batch, the longest first: what does not fit fails at once.
        ordered = sorted(wanted.items(), key=lambda item: -len(item[1].input_ids))
        at_once = self._rows * self._mesh.dp.size
        with Phase(f"lm_eval ({self.arm} and base)", len(ordered), "requests") as phase:
            for start in range(0, len(ordered), ROWS_AT_ONCE):
                part = ordered[start : start + ROWS_AT_ONCE]
                batches = eval_batches(
                    [sample for _, sample in part],
                    micro_batch_size=self._rows,
                    dp_rank=self._mesh.dp.rank,
                    dp_size=self._mesh.dp.size,
                    pad_token_id=pad_token_id(self.tokenizer),
                    vocab_size=self._vocab_size,
                )
                steps = phase.over(batches, at_once)
                sums = sample_sums(self._engine, steps, self._mesh, self.poll)
                for key, sample in part:
                    found = dict(zip(SUMS, sums[sample.sample_id], strict=True))
                    hit = found["base_hits"] == found["num_tokens"]
                    self._known[key] = (-found["ce_base"], hit)
                    policy = (-found["ce"], found["hits"] == found["num_tokens"])
                    answers[key] = self._known[key] if self.base else policy
        return [answers[key] for key in keys]

    def _sample(self, index: int, context: Sequence[int], continuation: Sequence[int]) -> Sample:
        if len(continuation) >= self._max_length:
            raise UserError(
                f"lm_eval: a task asks for {len(continuation)} tokens at once, but the model has "
                f"{self._max_length} positions: leave it out"
            )
        self.num_cut += len(context) + len(continuation) > self._max_length
        ids = np.array([*context, *continuation], dtype=np.int32)[-self._max_length :]
        mask = np.arange(len(ids)) >= len(ids) - len(continuation)
        return Sample(sample_id=str(index), input_ids=ids, label_mask=mask)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts that follow, up to a task's stop sequence or the end of text."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers: dict[int, str] = {}
        for options, members in groups.items():
            given = json.loads(options)
            prompts = {index: self.tok_encode(requests[index].args[0]) for index in members}
            mine = [[index, text] for index, text in self._continue(prompts, given).items()]
            for part in self._mesh.dp.gather(mine):
                answers |= {index: text for index, text in part}
        return [answers[index] for index in range(len(requests))]

    def _continue(self, prompts: dict[int, list[int]], given: dict[str, Any]) -> dict[int, str]:
        """This rank's share of the answers; every rank makes as many calls as the others."""
        until = given.pop("until", None) or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((n for n in [given.pop(name, None) for name in limits] if n is not None), 256)
        if not given.get("do_sample", bool(given.get("temperature", 0.0))):
            given = {}
        dp, room = self._mesh.dp, max(1, self._max_length - most)
        self.num_cut += sum(len(ids) > room for ids in prompts.values())
        ordered = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
        found: dict[int, str] = {}
        starts = range(0, len(ordered), self._rows * dp.size)
        who = "base" if self.base else self.arm
        with Phase(f"lm_eval answers ({who})", len(starts), "batches") as phase:
            for start in phase.over(starts):
                self.poll()
                block = ordered[start : start + starts.step]
                mine = block[dp.rank :: dp.size]
                new = continuations(
                    self._engine,
                    self._mesh,
                    [prompts[index][-room:] for index in mine or block[:1]],
                    pad=pad_token_id(self.tokenizer),
                    stop_token_ids=self._stops,
                    max_new_tokens=most,
                    base=self.base,
                    phase=phase,
                    **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
                    **given,
                )
                texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                for index, text in zip(mine, texts, strict=False):
                    for stop in stops:
                        text = text.split(stop)[0]
                    found[index] = text
        return found


def _key(context: Sequence[int], continuation: Sequence[int]) -> bytes:
    """The hash of one request; the tokens themselves would fill the memory."""
    text = np.array([len(context), *context, *continuation], dtype=np.int64).tobytes()
    return hashlib.blake2b(text, digest_size=16).digest()


def _figures(values: dict[str, Any]) -> Figures:
    figures: Figures = {}
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if not comma:  # not a metric: an alias, a count
            continue
        shown = metric if name == "none" else f"{metric} ({name})"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        figures[shown] = float(value) if is_number else None
    return figures


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": .")
