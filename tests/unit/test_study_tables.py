"""The study's tables: how well a divergence foretells what is forgotten."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.fixture
def tables(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDY))
    yield importlib.import_module("study_tables")
    for name in ("study_tables", "common"):
        sys.modules.pop(name, None)


def test_what_is_left_out_is_foretold_by_the_others(tables):
    rng = np.random.default_rng(0)
    rows = [
        tables.Pair((f"set{i % 3}", f"label{i % 7}"), x, 4 * x + rng.normal(0, 1) - 2)
        for i, x in enumerate(rng.uniform(0, 10, 30))
    ]
    fit = tables.foretold(rows, lambda row: row.setting[0])
    off, blind = [], []
    for data in ("set0", "set1", "set2"):
        others = [row for row in rows if row.setting[0] != data]
        x = np.array([row.divergence for row in others])
        y = np.array([row.lost for row in others])
        slope = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
        for row in rows:
            if row.setting[0] == data:
                off.append(row.lost - y.mean() - slope * (row.divergence - x.mean()))
                blind.append(row.lost - y.mean())
    assert fit.num == 30
    assert fit.error == pytest.approx(np.sqrt(np.mean(np.square(off))))
    assert fit.blind == pytest.approx(np.sqrt(np.mean(np.square(blind))))
    assert fit.error < 1.5 < fit.blind
    assert fit.order > 0.95
    # All runs of one setting are left out together: seeds would tell each other.
    assert tables.foretold(rows[:1] * 20, lambda row: row.setting) is None


def test_the_page_has_the_divergence_of_every_run(tables):
    every = tables.settings()
    runs = sum(len(one.runs) for one in every.values())
    lines = list(tables.foretelling(every))
    assert f"| held-out answers | all | mean of the texts | setting | {runs} |" in "\n".join(lines)
    for arm in next(iter(every.values())).arms:
        assert tables.held_out_divergence(arm) > 0
    kept = [label for _, label in every if tables.AT_ANSWERS.fullmatch(label)]
    assert "tmkl-0.3-every-4" in kept
    assert not {"dora-none", "under-3-l2", "tmkl-0.1-prompt"} & set(kept)
