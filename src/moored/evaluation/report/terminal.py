"""The report as a table for a terminal of 80 columns, and as plain text elsewhere.

Files are not written here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moored.evaluation.report import words
from moored.evaluation.report.comparing import increase_interval
from moored.evaluation.report.headline import budgets, headline
from moored.evaluation.report.results import ArmResult, Report, badness
from moored.evaluation.report.tables import harness

# More corpora than this (instructions count as one) do not fit beside each other: the worst one
# stands for all.
MOST_COLUMNS = 2
Column = tuple[str, str, Callable[[ArmResult], Text | str]]  # header, the base's cell, an arm's
NATS = "KL: base to adapted, nats per token, worst corpus"


def table(report: Report) -> Table:
    """Headline, base and arms; 80 columns are enough for two corpora with short names.

    A corpus's column holds the perplexity and its rise over the base's; with more than two corpora
    the worst one stands for all.
    """
    base, arms, corpora = report.base, report.arms, report.corpora

    def column(header: str, show: Callable[[float | None], str], name: str) -> Column:
        return header, show(getattr(base, name)), lambda arm: show(getattr(arm, name))

    columns = [column("adaptation\nperplexity", words.ppl, "adaptation_ppl")]
    if any(arm.adaptation_exact_match is not None for arm in arms.values()):
        columns.append(column("exact\nmatch", words.fraction, "adaptation_exact_match"))
    followed = any(arm.instruction_following is not None for arm in arms.values())
    if followed:
        columns.append(column("instruc-\ntions", words.fraction, "instruction_following"))
    suite = any(arm.suite_mean is not None for arm in arms.values())
    if suite:
        columns.append(column("general\ntasks", words.fraction, "suite_mean"))
    each = len(corpora) <= MOST_COLUMNS - followed - suite
    for corpus in corpora if each else []:
        before = words.ppl(base.retention_ppl[corpus])
        columns.append((words.clean(corpus, 16), before, partial(_retention, corpus=corpus)))
    if not each:
        columns.append((f"worst of\n{len(corpora)} corpora", "", _worst))
    columns.append(("KL\nnats", "", _drift))
    columns.append(("tok/s", "", lambda arm: words.count(arm.tokens_per_second)))
    what = "Corpora: perplexity" if each else "Worst: the greatest rise of a corpus's perplexity"
    over = " and its rise over the base's" if each else " over the base's"
    if any(increase_interval(arm, corpus) for arm in arms.values() for corpus in corpora):
        over += " with its 95 % interval"
    result = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(_narrow(headline(report).title)),
        title_justify="left",
        title_style="bold",
        caption=Text(" ".join([f"{what}{over}. {NATS}.", *budgets(report)])),
        caption_justify="left",
    )
    result.add_column("arm", overflow="fold", max_width=24)
    for header, _, _ in columns:
        result.add_column(Text(header), justify="right", overflow="fold")
    result.add_row("base", *(Text(_narrow(before)) for _, before, _ in columns))
    for name, arm in arms.items():
        cells = [cell(arm) for _, _, cell in columns]
        shown = [Text(_narrow(cell)) if isinstance(cell, str) else cell for cell in cells]
        result.add_row(Text(words.clean(name, 48), style="bold"), *shown)
    return result


def _narrow(text: str) -> str:
    return text.replace(words.NBSP, "")


def _rise(arm: ArmResult, corpus: str) -> Text:
    """A rise and its interval, on a line of its own: beside it there is no room."""
    pct = arm.retention_increase_pct.get(corpus)
    # The sign says it; colour only repeats it.
    style = "" if not pct else "yellow" if pct > 0 else "green"
    ends = increase_interval(arm, corpus)
    interval = "\n" + _narrow(words.bounds(ends.low, ends.high)) if ends else ""
    return Text.assemble((_narrow(words.percent(pct)), style), (interval, "dim"))


def _retention(arm: ArmResult, corpus: str) -> Text:
    ppl = words.ppl(arm.retention_ppl.get(corpus))
    known = arm.retention_increase_pct.get(corpus) is not None
    return Text.assemble(ppl, " ", _rise(arm, corpus)) if known else Text(ppl)


def _worst(arm: ArmResult) -> Text:
    worst = arm.worst()
    if worst is None:
        return Text(words.MISSING)
    return Text.assemble(_rise(arm, worst[0]), "\n", words.clean(worst[0], 20))


def _drift(arm: ArmResult) -> str:
    known = [value for value in arm.drift_nats_per_token.values() if value is not None]
    return words.nats(max(known, key=badness, default=None))


def harness_table(report: Report) -> Table:
    """What the evaluation harness measured, before and after; one row per task, metric and arm."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "arm"):
        result.add_column(name, overflow="fold")
    for name in ("base", "after"):
        result.add_column(name, justify="right")
    for row in harness(report):
        for name, after in zip(report.arms, row["arms"], strict=True):
            cells = [words.clean(text, 28) for text in (row["task"], row["metric"], name)]
            shown = [" ".join(pair).rstrip() for pair in (row["base"], after)]
            result.add_row(*map(Text, [*cells, *shown]))
    return result


def show(report: Report, stream: TextIO) -> None:
    """Print the table: styled on a terminal, else plain text."""
    if stream.isatty():
        Console(file=stream).print(*_tables(report))
    else:
        # A log in another encoding than UTF-8 must not end the run.
        encoding = stream.encoding or "utf-8"
        stream.write(plain(report).encode(encoding, "replace").decode(encoding))


def plain(report: Report, width: int = 100) -> str:
    """The table without colours and box characters, whatever the terminal."""
    buffer = io.StringIO()
    # Colours off whatever FORCE_COLOR says.
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False)
    for drawn in _tables(report):
        drawn.box = box.ASCII2
        console.print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _tables(report: Report) -> list[Table]:
    return [table(report), *([harness_table(report)] if report.base.lm_eval else [])]
