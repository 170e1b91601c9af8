"""The report as a table for a terminal of 80 columns, and as plain text elsewhere.

Files are not written here.
"""

from __future__ import annotations

import io
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moored.evaluation.report import words
from moored.evaluation.report.budgets import budgets
from moored.evaluation.report.comparing import increase_interval
from moored.evaluation.report.headline import headline
from moored.evaluation.report.results import ArmResult, Report, badness

# More corpora than this (instructions count as one) do not fit beside each other: the worst one
# stands for all.
MOST_COLUMNS = 2
NATS = "KL: base to adapted, nats per token, worst corpus"


def table(report: Report) -> Table:
    """Headline, base and arms; 80 columns are enough for two corpora with short names.

    A corpus's column holds the perplexity and its rise over the base's; with more than two corpora
    the worst one stands for all.
    """
    corpora = report.corpora
    matched = any(arm.adaptation_exact_match is not None for arm in report.arms.values())
    followed = any(arm.instruction_following is not None for arm in report.arms.values())
    each = len(corpora) <= MOST_COLUMNS - followed
    what = "Corpora: perplexity" if each else "Worst: the greatest rise of a corpus's perplexity"
    over = " and its rise over the base's" if each else " over the base's"
    if any(increase_interval(a, c) for a in report.arms.values() for c in corpora):
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
    result.add_column("adaptation\nperplexity", justify="right")
    if matched:
        result.add_column("exact\nmatch", justify="right")
    if followed:
        result.add_column("instruc-\ntions", justify="right")
    for corpus in corpora if each else []:
        result.add_column(Text(words.clean(corpus, 16)), justify="right", overflow="fold")
    if not each:
        result.add_column(f"worst of\n{len(corpora)} corpora", justify="right", overflow="fold")
    result.add_column("KL\nnats", justify="right")
    result.add_column("tok/s", justify="right")
    base = report.base
    row = [Text("base"), Text(words.ppl(base.adaptation_ppl))]
    row += [Text(_narrow(words.fraction(base.adaptation_exact_match)))] if matched else []
    row += [Text(_narrow(words.fraction(base.instruction_following)))] if followed else []
    row += [Text(words.ppl(base.retention_ppl[corpus])) for corpus in corpora] if each else []
    result.add_row(*row)
    for name, arm in report.arms.items():
        row = [Text(words.clean(name, 48), style="bold"), Text(words.ppl(arm.adaptation_ppl))]
        row += [Text(_narrow(words.fraction(arm.adaptation_exact_match)))] if matched else []
        row += [Text(_narrow(words.fraction(arm.instruction_following)))] if followed else []
        row += [_retention(arm, corpus) for corpus in corpora] if each else [_worst(arm)]
        drift = [value for value in arm.drift_nats_per_token.values() if value is not None]
        row.append(Text(words.nats(max(drift, key=badness, default=None))))
        result.add_row(*row, Text(words.count(arm.tokens_per_second)))
    return result


def harness_table(report: Report) -> Table:
    """What the evaluation harness measured, before and after; one row per task, metric and arm."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "arm"):
        result.add_column(name, overflow="fold")
    for name in ("base", "after"):
        result.add_column(name, justify="right")
    for task, figures in report.base.lm_eval.items():
        for metric in figures:
            if "_stderr" in metric:
                continue
            for name, arm in report.arms.items():
                after = words.with_error(arm.lm_eval.get(task, {}), metric)
                cells = [words.clean(text, 28) for text in (task, metric, name)]
                shown = [
                    " ".join(pair).rstrip() for pair in (words.with_error(figures, metric), after)
                ]
                result.add_row(*map(Text, [*cells, *shown]))
    return result


def _narrow(text: str) -> str:
    return text.replace(words.NBSP, "")


def _rise(pct: float | None) -> Text:
    # The sign says it; colour only repeats it.
    style = "" if not pct else "yellow" if pct > 0 else "green"
    return Text(_narrow(words.percent(pct)), style=style)


def _ends(arm: ArmResult, corpus: str) -> list[str | tuple[str, str]]:
    """The interval of a rise on a line of its own: beside it there is no room."""
    found = increase_interval(arm, corpus)
    return [("\n" + _narrow(words.bounds(found.low, found.high)), "dim")] if found else []


def _retention(arm: ArmResult, corpus: str) -> Text:
    ppl = Text(words.ppl(arm.retention_ppl.get(corpus)))
    pct = arm.retention_increase_pct.get(corpus)
    return ppl if pct is None else Text.assemble(ppl, " ", _rise(pct), *_ends(arm, corpus))


def _worst(arm: ArmResult) -> Text:
    worst = arm.worst()
    if worst is None:
        return Text(words.MISSING)
    name = words.clean(worst[0], 20)
    return Text.assemble(_rise(worst[1]), *_ends(arm, worst[0]), "\n", name)


def show(report: Report, stream: TextIO) -> None:
    """Print the table: styled on a terminal, else plain text."""
    if stream.isatty():
        console = Console(file=stream)
        console.print(table(report))
        if report.base.lm_eval:
            console.print(harness_table(report))
    else:
        # A log in another encoding than UTF-8 must not end the run.
        encoding = stream.encoding or "utf-8"
        stream.write(plain(report).encode(encoding, "replace").decode(encoding))


def plain(report: Report, width: int = 100) -> str:
    """The table without colours and box characters, whatever the terminal."""
    buffer = io.StringIO()
    # Colours off whatever FORCE_COLOR says.
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False)
    for drawn in [table(report), *([harness_table(report)] if report.base.lm_eval else [])]:
        drawn.box = box.ASCII2
        console.print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
