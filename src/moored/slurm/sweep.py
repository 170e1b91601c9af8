"""`moored sweep`: one recipe over a grid of options, as a job array with one report at its end.

The sweep's directory is laid out like a comparison's: `arms/NAME/` are ordinary runs, `report/` is
over all of them. How one job is written and submitted is `script.py`'s and `jobs.py`'s.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moored.config import Config, load_config
from moored.data import check_data, what_is_checked
from moored.slurm import jobs
from moored.slurm.script import Job, render
from moored.slurm.site import Site
from moored.slurm.snapshot import keep_code, keep_expectations, keep_recipe
from moored.tracking import Tracker
from moored.tracking.journal import JOURNAL_NAME, first_start
from moored.tracking.run_directory import (
    RunDirectory,
    locked,
    open_run,
    path_of,
    require_kind,
)
from moored.utils import scheduler
from moored.utils.atomic_dir import write_atomically, write_json
from moored.utils.errors import UserError

MAX_ARMS = 1000  # SLURM's own bound on arrays is 1001 unless a site raised it


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One point of the grid.

    Attributes:
        name: of its folder and in the report.
        overrides: of the recipe.
        config: the recipe with them.
    """

    name: str
    overrides: tuple[str, ...]
    config: Config


def split_values(text: str) -> list[str]:
    """`a,[b,c],"d,e"` -> `a`, `[b,c]`, `"d,e"`: no cut inside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def arms_of(recipe: Path, texts: Sequence[str]) -> list[Arm]:
    """Every combination of the values, in the order of the last key first; equal ones once.

    An arm of kind `none` has no other options of the regulariser.

    Args:
        recipe: the file.
        texts: `key=value` for all arms, `key=value,value` for the grid.

    Raises:
        UserError: there is no grid, or too much of it.
        UserErrors: what is wrong with the recipe of an arm.
    """
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, _, value = text.partition("=")
        values = split_values(value)
        if len(values) == 1:
            fixed.append(text)
        elif key in grid or any(not each.strip() for each in values):
            raise UserError(f"{text}: give each key once, and a value between commas")
        elif key == "name" or key.startswith(("output.", "track.", "compare")):
            raise UserError(f"{text}: is the same for all arms of a sweep: give one value")
        else:
            grid[key] = values
    if not grid:
        raise UserError(
            "nothing is swept: give a key several values, such as regularizer.weight=0.1,0.3,1"
        )
    arms: dict[str, Arm] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        if point.get("regularizer.kind") == "none":
            point = {
                key: value
                for key, value in point.items()
                if key == "regularizer.kind" or not key.startswith("regularizer.")
            }
        overrides = (*fixed, *(f"{key}={value}" for key, value in point.items()))
        config = load_config(recipe, overrides)
        fingerprint = config.fingerprint()
        if fingerprint not in arms:
            name = _name(config, point, {arm.name for arm in arms.values()})
            arms[fingerprint] = Arm(name=name, overrides=overrides, config=config)
    if len(arms) > MAX_ARMS:
        raise UserError(f"{len(arms)} arms, more than {MAX_ARMS}: sweep less at once")
    return list(arms.values())


def _name(config: Config, point: dict[str, str], taken: set[str]) -> str:
    """The regulariser's kind, then what varies: `tmkl-weight0.3-seed1`."""
    name: str = config.regularizer.kind
    for key, value in point.items():
        if key == "regularizer.kind":
            continue
        label = "" if key.endswith(".direction") else key.rpartition(".")[2]
        name += f"-{label}{value}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:100].strip("._-")
    number = 1
    while name in taken:
        number += 1
        name = f"{name.removesuffix(f'-{number - 1}')}-{number}"
    return name


def array_of(
    arms: Sequence[Arm], site: Site, *, nodes: int, throttle: int, indices: Sequence[int]
) -> tuple[Job, Job]:
    """The array, and the job that reports once all of it has ended, one way or another."""
    config = jobs.for_site(arms[0].config, site)
    sweep = path_of(config)
    base = jobs.jobs_of(config, site, sweep, nodes=nodes, stages=("train", "report"))
    binds = {path for a in arms for path in jobs.binds_of(a.config, site)}
    array = replace(
        base["train"],
        title=f"{config.name}: a sweep of {len(arms)} arms",
        arms=tuple(RunDirectory(sweep).arm(arm.name).path for arm in arms),
        indices=tuple(indices),
        throttle=throttle,
        ship_later=jobs.ships_to_file(config),
        binds=tuple(sorted(binds)),
    )
    commands = [("report", str(sweep))]
    if config.track.mlflow:
        commands.append(("sync", str(sweep)))
    return array, replace(base["report"], commands=tuple(commands))


def submit_sweep(
    recipe: Path,
    texts: Sequence[str],
    site: Site,
    site_name: str,
    *,
    nodes: int = 1,
    throttle: int = 0,
    restart: bool = False,
) -> tuple[Path, list[Arm], list[jobs.Submitted]]:
    """Submit the arms that are not done yet, and a report over all.

    Returns:
        The sweep's directory, the arms that will run, and the jobs.

    Raises:
        UserError: the sweep is in the queue; an arm's directory holds another run; SLURM refuses.
    """
    arms = [replace(arm, config=jobs.for_site(arm.config, site)) for arm in arms_of(recipe, texts)]
    sweep = path_of(arms[0].config)
    directory = RunDirectory(sweep)
    folders = [directory.arm(arm.name).path for arm in arms]
    due = [
        index
        for index, folder in enumerate(folders)
        if restart or RunDirectory(folder).state().get("status") != "done"
    ]
    if directory.config.exists():
        require_kind(directory, "sweep")
    array, report = array_of(arms, site, nodes=nodes, throttle=throttle, indices=due)
    scripts = {job.script: render(job, site, site_name) for job in (array, report)}
    for config in {what_is_checked(arm.config): arm.config for arm in arms}.values():
        check_data(config)
    jobs.say_what_is_left_out()
    jobs.require_free(sweep)
    for script in scripts.values():
        scheduler.check(script)
    with locked(sweep):
        if not directory.config.exists() or directory.is_vacant():
            open_run(arms[0].config, sweep, restart=False, kind="sweep")
        _keep_arms(sweep, arms)
        for index in due:
            with locked(folders[index]):
                open_run(arms[index].config, folders[index], restart=restart)
                jobs.forget_attempts(RunDirectory(folders[index]).slurm)
                keep_recipe(arms[index].config, folders[index])
        jobs.forget_attempts(directory.slurm)
        keep_code(sweep)
        keep_expectations([arm.config for arm in arms], sweep, site)
        if first_start(sweep / JOURNAL_NAME) is None:
            names, configs = [arm.name for arm in arms], [arm.config for arm in arms]
            Tracker.declare(configs[0], sweep, names, configs)
        for path, script in scripts.items():
            write_atomically(path, script.encode())
    chain = [("report", report)] if not due else [("train", array), ("report", report)]
    submitted = jobs.submit_chain(chain, condition="afterany")
    jobs.remember(sweep, submitted, site_name=site_name, nodes=nodes, ranks=site.slurm.ranks)
    return sweep, [arms[index] for index in due], submitted


def _keep_arms(sweep: Path, arms: Sequence[Arm]) -> None:
    kept = [{"name": arm.name, "overrides": list(arm.overrides)} for arm in arms]
    write_json(RunDirectory(sweep).sweep_file, {"arms": kept})
