"""A job and a site profile -> the text of an sbatch script. Pure: no file of the run is touched.

The text itself is in the templates of the folder `slurm/`; what submits it is `jobs.py`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2

from moored.slurm.site import Site, slurm_folder
from moored.utils.errors import UserError

PREFLIGHT_SECONDS, STAGING_SECONDS = 600, 3600  # of the checks; with a model to copy to a disk
# Before Python has a handler, a warning would end it; exec keeps what a shell ignores.
WRAPPER = 'trap "" USR1; exec "$@"'
# Each node has a disk of its own, and may call it differently; so its name is made there. What
# DeepSpeed compiles is kept there, too: its locks outlive a killed job.
WRAPPER_WITH_SCRATCH = (
    'trap "" USR1; export MOORED_SCRATCH="{scratch}"; export APPTAINER_BIND="$MOORED_SCRATCH"; '
    'export TORCH_EXTENSIONS_DIR="$MOORED_SCRATCH/extensions"; '
    'mkdir -p "$MOORED_SCRATCH"; exec "$@"'
)
# What a site's cache holds, by the variables that say where.
CACHES = {"MOORED_CACHE": "moored", "HF_HOME": "huggingface", "TORCH_EXTENSIONS_DIR": "extensions"}
MADE_IN_JOBS = ("MOORED_LAUNCH", "MOORED_MEETING_SECRET")  # by the script itself
KEPT = ("HOME", "LANG", "PATH", "USER")  # of who submits, beside what the site passes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to run, on how many nodes.

    Attributes:
        title: in words, for the head of the script.
        name: of the recipe; letters, digits, `._-`.
        folder: of the run or the sweep.
        nodes: how many.
        kind: `train` is watched and started again; `gpu` and `cpu` run `commands` once.
        arms: run directories of a sweep, by index in the job array.
        indices: of the arms to run; all by default.
        throttle: elements at a time; 0: no bound.
        commands: arguments of `moored`, one list per step.
        python: the interpreter.
        caches: variables of who submits that say where models are.
        binds: folders that a container must see.
        ship_later: several runs would write to one SQLite store at once.
        file: name of the script and of its logs.
    """

    title: str
    name: str
    folder: Path
    python: str
    nodes: int = 1
    kind: Literal["train", "gpu", "cpu"] = "train"
    arms: tuple[Path, ...] = ()
    indices: tuple[int, ...] = ()
    throttle: int = 0
    commands: tuple[tuple[str, ...], ...] = ()
    caches: Mapping[str, str] = field(default_factory=dict[str, str])
    binds: tuple[Path, ...] = ()
    ship_later: bool = False
    file: str = "job"

    @property
    def script(self) -> Path:
        """Where the script is kept."""
        return self.folder / "slurm" / f"{self.file}.sbatch"

    @property
    def label(self) -> str:
        """The job's name: equal for jobs on one run directory, which SLURM then runs in turn."""
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        return f"moored-{self.name}-{digest}" + ("" if self.file == "job" else f"-{self.file}")


class _Expanded(str):
    """A word in which the job's variables are filled in; `JobPath` leaves it nothing else to do."""

    __slots__ = ()


class _Quoted(str):
    """A word of a shell that is quoted already."""

    __slots__ = ()


def _word(value: object) -> str:
    if isinstance(value, _Quoted):
        return str(value)
    return f'"{value}"' if isinstance(value, _Expanded) else shlex.quote(str(value))


def render(job: Job, site: Site, site_name: str) -> str:
    """The script of a job.

    Raises:
        UserError: a path cannot stand in a script that SLURM reads.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(slurm_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # bash, not HTML: every value goes through `sh`
    )
    environment.filters["sh"] = _word
    for path in (job.folder, *job.arms, *job.binds):
        _require_plain(path)
    plain, expanded = _variables(job, site)
    names = [*plain, *expanded, *MADE_IN_JOBS, *site.environment.pass_through]
    text = environment.get_template(
        "train.sbatch.j2" if job.kind == "train" else "task.sbatch.j2"
    ).render(
        site=site,
        site_name=site_name,
        job={
            "title": job.title,
            "options": [*_options(job, site), *site.slurm.options],
            "variables": plain,
            "expanded": expanded,
            "moored": [_python(job, site), "-P", "-m", "moored"],
            "task": _task(job, site),
            "srun": " ".join(map(_word, _srun(job, site, names))),
            "run": job.folder,
            "arms": job.arms,
            "arm_of": f" --arm-of {shlex.quote(str(job.folder))}" if job.arms else "",
            "script": job.script,
            "expected": job.folder / "slurm" / "expected.json",
            "preflight_seconds": STAGING_SECONDS if site.storage.scratch else PREFLIGHT_SECONDS,
            "handing": job.folder / "slurm" / ".handing-over",
            "commands": job.commands,
        },
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _require_plain(path: Path) -> None:
    if re.search(r"[\x00-\x1f\x7f\\]", str(path)):
        raise UserError(
            f"{str(path)!r}: SLURM cannot be given a path with line breaks, control characters or "
            "backslashes: choose another output.dir or name"
        )


def _quoted(path: Path, suffix: str) -> str:
    """A path for an #SBATCH line, whose % and quotes SLURM would take for its own."""
    return '"' + str(path).replace("%", "%%").replace('"', '\\"') + suffix + '"'


def _options(job: Job, site: Site) -> Iterator[str]:
    slurm = site.slurm
    yield f"--job-name={job.label}"
    log = job.folder / "slurm" / job.file
    yield f"--output={_quoted(log, '-%A_%a.log' if job.arms else '-%j.log')}"
    yield "--open-mode=append"
    if job.arms:
        indices = ",".join(map(str, job.indices or range(len(job.arms))))
        yield f"--array={indices}" + (f"%{job.throttle}" if job.throttle else "")
    yield f"--export={','.join([*KEPT, *site.environment.pass_through])}"
    if job.kind == "cpu":
        yield from _cpu_options(site)
        return
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={slurm.ranks}"
    for name, value in (
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("reservation", slurm.reservation),
        ("exclude", slurm.exclude),
        ("time", slurm.time),
        ("cpus-per-task", slurm.cpus_per_rank),
        ("mem", slurm.memory_per_node),
    ):
        if value is not None:
            yield f"--{name}={value}"
    if slurm.exclusive:
        yield "--exclusive"
    if slurm.gpus_per_node:
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        option = "--gres=gpu:" if slurm.gpu_syntax == "gres" else "--gpus-per-node="
        yield f"{option}{kind}{slurm.gpus_per_node}"
    if job.kind == "train":
        yield f"--signal=B:USR1@{slurm.warn_seconds}"
        yield "--requeue" if slurm.requeue else "--no-requeue"
        if not job.arms:  # elements of an array share their name
            yield "--dependency=singleton"
    else:
        yield "--no-requeue"


def _cpu_options(site: Site) -> Iterator[str]:
    cpu, slurm = site.cpu_jobs, site.slurm
    yield "--nodes=1"
    yield "--ntasks=1"
    for name, value in (
        ("partition", cpu.partition or slurm.partition),
        ("account", cpu.account or slurm.account),
        ("qos", cpu.qos),
        ("time", cpu.time),
        ("cpus-per-task", cpu.cpus),
        ("mem", cpu.memory),
    ):
        if value is not None:
            yield f"--{name}={value}"


def _variables(job: Job, site: Site) -> tuple[dict[str, str], dict[str, str]]:
    """What a job exports: as it is, and with variables of the job in it."""
    plain = {
        "PYTHONPATH": str(job.folder / "slurm" / "code"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(site.slurm.cpus_per_rank or 1),
    }
    if job.kind == "cpu":
        plain["OMP_NUM_THREADS"] = str(site.cpu_jobs.cpus or 1)
    if site.container.runtime == "apptainer":  # an image may empty what the host sets
        plain["APPTAINERENV_PYTHONPATH"] = plain["PYTHONPATH"]
    plain |= job.caches
    if site.network.offline:
        plain |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if job.ship_later:
        plain["MOORED_SHIP"] = "later"
    expanded: dict[str, str] = {}
    if site.storage.cache:
        expanded |= {name: f"{site.storage.cache}/{folder}" for name, folder in CACHES.items()}
    plain = {name: value for name, value in plain.items() if name not in expanded}
    return plain | site.environment.variables, expanded


def _python(job: Job, site: Site) -> str:
    if site.container.runtime != "none":
        return site.container.python
    return site.environment.python or job.python


def _task(job: Job, site: Site) -> list[str]:
    """What stands before the interpreter on a command line."""
    scratch = site.storage.scratch
    wrapper = WRAPPER_WITH_SCRATCH.format(scratch=scratch) if scratch else WRAPPER
    words = ["/bin/bash", "-c", wrapper, "task"]
    if site.container.runtime == "apptainer":
        words += ["apptainer", "exec", *(["--nv"] if site.slurm.gpus_per_node else [])]
        for mount in _mounts(job, site):
            words += ["--bind", mount]
        words += [*site.container.options, str(site.container.image)]
    return words


def _srun(job: Job, site: Site, names: Sequence[str]) -> list[str]:
    words: list[str] = []
    cpus = site.cpu_jobs.cpus if job.kind == "cpu" else site.slurm.cpus_per_rank
    if cpus:
        words.append(f"--cpus-per-task={cpus}")  # steps no longer inherit it
    if site.container.runtime == "pyxis":
        words.append(f"--container-image={site.container.image}")
        mounts = ",".join(map(_word, _mounts(job, site)))
        words.append(_Quoted(f"--container-mounts={mounts}"))
        # Without its name here, a variable of the image's wins.
        words.append(f"--container-env={','.join(dict.fromkeys(names))}")
        words += site.container.options
    return words


def _mounts(job: Job, site: Site) -> list[str]:
    """What a container sees of the machine, as `FROM:TO`."""
    folders: list[str] = []
    for folder in dict.fromkeys([job.folder, *job.binds]):
        if re.search(r"[:,]", str(folder)):
            raise UserError(
                f"{folder}: a container cannot be given a folder with ':' or ',' in its name: "
                "choose another place"
            )
        folders.append(str(folder))
    stores = [site.storage.cache] if site.storage.cache else []
    if site.storage.scratch and site.container.runtime == "pyxis":
        stores.append(site.storage.scratch)
    mounts = [f"{folder}:{folder}" for folder in folders]
    return mounts + [_Expanded(f"{store}:{store}") for store in stores] + site.container.mounts
