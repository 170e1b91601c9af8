"""The suite of general tasks: which questions of the evaluation harness are asked, and how it went.

What a task is, asks and scores is the harness's (`lm_eval_model.py`); what follows from the scores
is the report's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moored.config import Config
from moored.data.chat import ChatEncoder
from moored.data.samples import Encoder
from moored.data.template import TemplateError
from moored.distributed.mesh import Mesh
from moored.evaluation.report import TaskScore
from moored.models.base_files import BaseFiles
from moored.models.engine import Engine
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
OPTION = "evaluation.suite"
# Of several metrics and filters of a task the one that says most: likelihoods per byte where
# choices are whole answers, the last number of a solution wherever it stands. Else a task's first.
PREFERRED_METRIC, PREFERRED_FILTER = "acc_norm", "flexible-extract"


def require_harness(option: str) -> None:
    """Refuse an option that needs the evaluation harness where that is not installed.

    Raises:
        UserError: how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"{option} needs the evaluation harness, an optional extra: in the clone of Moored, "
            ".venv/bin/pip install -c docker/constraints.txt -e '.[lm-eval]'"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteTask:
    """One task of the suite, or several of the harness under one name.

    Attributes:
        name: in the recipe.
        questions: task of the harness -> numbers of its questions that are asked.
        num_questions: of all that there are.
        metric: of the harness.
        filter: likewise: what is taken for the answer.
        chance: what a guess would score on average, 0 to 1.
        shots: examples before each question.
        source: where the data come from.
        digest: SHA-256 of the questions that are asked.
        num_bytes: of the same.
    """

    name: str
    questions: Mapping[str, Sequence[int]]
    num_questions: int
    metric: str
    filter: str
    chance: float
    shots: int
    source: str
    digest: str
    num_bytes: int

    @property
    def shown_metric(self) -> str:
        """The metric, and the filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    @property
    def num_asked(self) -> int:
        """Questions that are asked."""
        return sum(map(len, self.questions.values()))


class TaskSuite:
    """The suite's tasks with their data, opened before a model is loaded; see `open_task_suite`.

    Attributes:
        tasks: what is asked.
    """

    def __init__(
        self,
        tasks: Sequence[SuiteTask],
        opened: Any,
        located: BaseFiles,
        chat: ChatEncoder | None,
        rows: int,
    ):
        """As `open_task_suite` found it."""
        self.tasks = tasks
        self._opened, self._located, self._chat, self._rows = opened, located, chat, rows
        self._asked: tuple[Engine, Any] | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What a reader needs to repeat it."""
        from moored.utils.environment import version_of

        each = ", ".join(
            f"{t.name} ({t.num_asked:,} of {t.num_questions:,} questions, {t.shots}-shot)"
            for t in self.tasks
        )
        how = "as chats" if self._chat else "without a chat template"
        return {"general tasks": f"lm_eval {version_of('lm_eval')}, {how}: {each}"}

    def ask(
        self, engine: Engine, mesh: Mesh, *, base: bool, arm: str, poll: Callable[[], None]
    ) -> dict[str, TaskScore]:
        """Ask policy or base; equal on all ranks. Collective.

        Args:
            engine: both of them.
            mesh: the processes.
            base: ask with adapters off.
            arm: what the policy is called where it is said how far this is.
            poll: called before every batch, on all ranks; may raise to stop.
        """
        from moored.evaluation import lm_eval_model

        if self._asked is None or self._asked[0] is not engine:  # it remembers the base's answers
            located, rows = self._located, self._rows
            model = lm_eval_model.HarnessModel(engine, located, mesh, rows=rows, chat=self._chat)
            self._asked = engine, model
        model = self._asked[1]
        model.base, model.arm, model.poll, model.num_cut = base, arm, poll, 0
        questions = {k: v for task in self.tasks for k, v in task.questions.items()}
        rows = lm_eval_model.run_questions(model, self._opened, questions, OPTION)
        if model.num_cut and mesh.is_main:
            log.warning(
                "%s: %d questions are longer than the model's positions: their beginning was left "
                "out",
                OPTION,
                model.num_cut,
            )
        return {task.name: _score(task, rows) for task in self.tasks}


def _score(task: SuiteTask, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> TaskScore:
    scores: list[float] = []
    for leaf in task.questions:
        for row in rows[leaf]:
            if row["filter"] != task.filter:
                continue
            value: Any = row.get(task.metric)
            try:
                score = float(value)
            except (TypeError, ValueError):
                score = math.nan
            if not 0 <= score <= 1:
                raise UserError(
                    f"{OPTION} {task.name}: its metric {task.metric} gives {value!r} for a "
                    "question, where a score from 0 to 1 is needed: leave it out"
                )
            scores.append(float(f"{score:.6g}"))
    return TaskScore(metric=task.shown_metric, chance=task.chance, scores=scores)


def open_task_suite(config: Config, located: BaseFiles, mesh: Mesh) -> TaskSuite | None:
    """Find the recipe's tasks, load their data and choose their questions. Collective.

    Args:
        config: the recipe.
        located: its base.
        mesh: the processes; the first one fetches what is not there.

    Returns:
        None where the recipe has no suite.

    Raises:
        UserError: the harness is not installed, a task is unknown, its data are not there, or it
            has no metric of which a mean can be taken; or the chat template cannot ask.
    """
    asked = config.evaluation
    if not asked.suite_tasks:
        return None
    require_harness(OPTION)
    from moored.evaluation import lm_eval_model

    chat = Encoder(located.tokenizer, config.data).chat
    if chat.templates:
        try:
            chat.answer_ends()
        except TemplateError as error:
            raise UserError(f"{OPTION}: {error}, or leave the suite out") from error
    asking = lm_eval_model.Asking(
        option=OPTION,
        include="evaluation.suite_include",
        fetch="`moored prepare` brings its data where the hub can be reached",
    )
    opened = lm_eval_model.opened(asked.suite_tasks, asked.suite_include, mesh, asking)
    tasks = [_chosen(name, part["tasks"], asked.suite_limit) for name, part in opened]
    everything = lm_eval_model.merged([part for _, part in opened])
    rows = asked.micro_batch_size
    return TaskSuite(tasks, everything, located, chat if chat.templates else None, rows)


def _chosen(name: str, leaves: Mapping[str, Any], limit: int) -> SuiteTask:
    """The questions that are asked, and by what they are judged."""
    try:
        docs = {leaf: task.eval_docs for leaf, task in leaves.items()}
        sizes = {leaf: len(of) for leaf, of in docs.items()}
        judged = {_judge(task) for task in leaves.values()}
    except Exception as error:  # a task's own code
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise UserError(f"{OPTION} {name}: cannot be read ({why}): leave it out") from error
    num_questions = sum(sizes.values())
    if len(judged) != 1 or None in judged or not num_questions:
        raise UserError(
            f"{OPTION} {name}: it has no metric that is a mean over its questions of which more is "
            "better, the same for all of it: leave it out, or name its tasks one by one"
        )
    metric, judging = judged.pop() or ("", "")
    spread = range(num_questions)
    if num_questions > limit:  # the middle of each of `limit` stretches
        spread = [(2 * i + 1) * num_questions // (2 * limit) for i in range(limit)]
    questions: dict[str, list[int]] = {}
    digest, num_bytes, guessed, first = hashlib.sha256(), 0, 0.0, 0
    for leaf, task in leaves.items():
        mine = [number - first for number in spread if 0 <= number - first < sizes[leaf]]
        first += sizes[leaf]
        if mine:
            questions[leaf] = mine
        for number in mine:
            doc = docs[leaf][number]
            text = json.dumps(doc, sort_keys=True, default=str).encode()
            digest.update(text)
            num_bytes += len(text)
            guessed += _by_chance(name, task, doc)
    sources = {_source(task) for task in leaves.values()}
    return SuiteTask(
        name=name,
        questions=questions,
        num_questions=num_questions,
        metric=metric,
        filter=judging,
        chance=guessed / sum(map(len, questions.values())),
        shots=max(int(task.get_config("num_fewshot") or 0) for task in leaves.values()),
        source=", ".join(sorted(sources)),
        digest=digest.hexdigest(),
        num_bytes=num_bytes,
    )


def _source(task: Any) -> str:
    """The data set's name on the hub, or of local ones the files."""
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    if not files:
        return str(task.get_config("dataset_path"))
    of_splits = files.values() if isinstance(files, Mapping) else [files]
    return ", ".join(str(f) for of in of_splits for f in ([of] if isinstance(of, str) else of))


def _judge(task: Any) -> tuple[str, str] | None:
    """The metric that counts and its filter; None where none is a mean of which more is better."""
    aggregated, is_better = task.aggregation(), task.higher_is_better()
    means = [
        metric
        for metric, how in aggregated.items()
        if getattr(how, "__name__", "") == "mean" and is_better.get(metric)
    ]
    filters = [item.name for item in getattr(task, "_filters", ())] or ["none"]
    if not means:
        return None
    metric = PREFERRED_METRIC if PREFERRED_METRIC in means else means[0]
    return metric, PREFERRED_FILTER if PREFERRED_FILTER in filters else filters[0]


def _by_chance(name: str, task: Any, doc: Any) -> float:
    """What a guess scores: one in the number of choices, nothing where an answer is written."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    try:
        choices = task.doc_to_choice(doc)
    except Exception as error:  # a task's own code
        raise UserError(f"{OPTION} {name}: its choices cannot be read: leave it out") from error
    if len(choices) < 2:
        raise UserError(
            f"{OPTION} {name}: a question has {len(choices)} choices, so that there is nothing to "
            "choose: mend the task, or leave it out"
        )
    return 1.0 / len(choices)
