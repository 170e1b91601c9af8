"""A site profile: how jobs are asked for on one cluster, and what its nodes need.

Training options are the recipe's. Profiles lie in `slurm/sites`, and what is made of one is
`script.py`'s. The reference of profiles is written from here:

    python -m moored.slurm.site > docs/site.md
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from moored.config.recipe import read_recipe, shorten, suggest
from moored.config.section import (
    Ignored,
    Key,
    Positive,
    Problem,
    Relation,
    Section,
    about,
    dotted_key,
)
from moored.config.validation import validate
from moored.utils.errors import UserError

TEMPLATE = "train.sbatch.j2"
REFERENCE_HEAD = """# Site profiles: every key

Written from the schema by `python -m moored.slurm.site > docs/site.md`; a test holds it true. A
profile says how jobs are asked for on one cluster and what its nodes need; how it is trained is the
recipe's. Examples, one per kind of site, are in `slurm/sites`; `--site` takes a name there or a
path, and `--set slurm.partition=long` changes a key for one submission. Profiles are strict, as
recipes are. [slurm.md](slurm.md) is the guide.
"""


def slurm_folder() -> Path:
    """The folder of the templates and of `sites/`: in a checkout, else where it was installed.

    Raises:
        UserError: the installation lacks it.
    """
    checkout = Path(__file__).resolve().parents[3] / "slurm"
    installed = Path(sysconfig.get_path("data")) / "share" / "moored" / "slurm"
    for folder in (checkout, installed):
        if (folder / TEMPLATE).is_file():
            return folder
    raise UserError(f"{installed} is missing: install moored again (pip install --force-reinstall)")


def _shaped(pattern: str, words: str) -> BeforeValidator:
    """Text of a shape, or an error that says which."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: object) -> object:
        if isinstance(value, str) and not compiled.fullmatch(value):
            message = f"{shorten(value)}: expected {words}"
            raise PydanticCustomError("recipe", "{message}", {"message": message})
        return value

    return BeforeValidator(check)


def _seconds(limit: str) -> int:
    """A limit as SLURM reads it: `30` and `30:00` are minutes, `2-00` is days and hours."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds, *_ = [*parts, 0, 0]
    else:
        hours, minutes, seconds, *_ = [0, *parts, 0]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


# What stands in an #SBATCH line is read by SLURM, up to the end of the line.
Word = Annotated[
    str,
    _shaped(
        r"[A-Za-z0-9][A-Za-z0-9_.,:@&|*()\[\]/+=-]{0,200}",
        "a name of SLURM's, without blanks and quotes",
    ),
]
Limit = Annotated[
    str, _shaped(r"(\d+-)?\d{1,4}(:\d{2}){0,2}", 'a time such as "24:00:00" or "2-00:00:00"')
]
Memory = Annotated[str, _shaped(r"\d+[KMGT]?", "an amount such as 480G")]
Variable = Annotated[str, _shaped(r"[A-Za-z_][A-Za-z0-9_]{0,100}", "the name of a variable")]
OneLine = Annotated[str, _shaped(r"[^\x00-\x1f\x7f]+", "one line of text")]
Option = Annotated[
    str,
    _shaped(
        r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:@%/+=-]+)?", "an option of sbatch such as --mail-type=END"
    ),
]
# A path that may name variables of the job.
JobPath = Annotated[
    str,
    _shaped(r"(/|\$)[A-Za-z0-9_./${}+@=,-]*", "an absolute path such as /scratch/$USER/moored"),
]
EARLY = 60  # seconds that SLURM may warn before `--signal`'s time
SECRETS = (
    "HF_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIALS?)$", re.I)


class Slurm(Section):
    """What is asked of SLURM for a training job."""

    partition: Annotated[Word | None, about("where the job runs; null: the default one")] = None
    account: Annotated[Word | None, about("who pays")] = None
    qos: Annotated[Word | None, about("quality of service")] = None
    constraint: Annotated[Word | None, about("features that nodes must have")] = None
    reservation: Annotated[Word | None, about("whose nodes are used")] = None
    exclude: Annotated[Word | None, about("nodes that are never used")] = None
    time: Annotated[Limit | None, about("limit of one start, such as 24:00:00 or 2-00:00:00")] = (
        None
    )
    gpus_per_node: Annotated[int, Field(ge=0, description="0: train on the CPU")] = 0
    gpu_type: Annotated[Word | None, about("such as h100, where a node may have others")] = None
    gpu_syntax: Annotated[Literal["gres", "gpus"], about("--gres=gpu:N or --gpus-per-node=N")] = (
        "gres"
    )
    ranks_per_node: Annotated[
        Positive | None, about("processes per node; null: one per GPU, one on a CPU node")
    ] = None
    cpus_per_rank: Annotated[Positive | None, about("cores of each process")] = None
    memory_per_node: Annotated[Memory | None, about("such as 480G; 0: all of it")] = None
    exclusive: Annotated[bool, about("whole nodes")] = False
    options: Annotated[list[Option], about("more options of sbatch, such as --mail-type=END")] = (
        Field(default_factory=list[str])
    )
    warn_seconds: Annotated[
        int, Field(ge=30, le=3600, description="between the warning and the time limit, to save in")
    ] = 180
    requeue: Annotated[
        bool, about("the job may start again under its id; false: it submits a successor")
    ] = True
    max_idle_attempts: Annotated[
        Positive, about("starts in a row that save no new step, after which the job gives up")
    ] = 3
    preflight: Annotated[bool, about("check every node before the model loads")] = True

    @property
    def ranks(self) -> int:
        """Processes per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def problems(self) -> Iterator[Problem]:
        """A start must be longer than the time that it is given to save.

        A warning that comes before the script listens for it is lost, and SLURM, which looks at
        its jobs every half a minute, warns up to `EARLY` seconds too early.
        """
        limit = _seconds(self.time) if self.time is not None else 0
        if 0 < limit <= self.warn_seconds + EARLY:
            yield Problem(
                "time",
                f"{self.time} is {limit} s, and SLURM would warn at once (warn_seconds is "
                f"{self.warn_seconds}, and it comes up to {EARLY} s early): give more time, or "
                "lower slurm.warn_seconds",
                ("warn_seconds",),
            )

    def ignored(self) -> Iterator[Ignored]:
        """Without GPUs they have no type."""
        if self.gpus_per_node == 0:
            for name in ("gpu_type", "gpu_syntax"):
                yield Ignored(name, ("gpus_per_node",), "gpus_per_node is 0")


class CpuJobs(Section):
    """What is asked for the jobs that need no GPU: prepare, report, export."""

    partition: Annotated[Word | None, about("null: that of the training job")] = None
    account: Annotated[Word | None, about("null: that of the training job")] = None
    qos: Annotated[Word | None, about("quality of service")] = None
    time: Annotated[Limit | None, about("limit, such as 02:00:00")] = None
    cpus: Annotated[Positive | None, about("cores")] = None
    memory: Annotated[Memory | None, about("such as 64G")] = None


class Environment(Section):
    """What a job loads and exports before it starts anything."""

    modules: list[Word] = Field(default_factory=list[str], description="for `module load`")
    setup: list[OneLine] = Field(
        default_factory=list[str], description="lines of bash, run as given"
    )
    variables: dict[Variable, OneLine] = Field(
        default_factory=dict, description="exported, such as NCCL_SOCKET_IFNAME: ib0"
    )
    pass_through: list[Variable] = Field(
        default_factory=lambda: list(SECRETS),
        description="names that the job gets from who submits, by SLURM and not by the script",
    )
    python: Annotated[
        OneLine | None, about("interpreter on the nodes; null: the one that submits")
    ] = None

    def problems(self) -> Iterator[Problem]:
        """A profile and a script are no place for secrets."""
        for name in self.variables:
            if _SECRET_NAME.search(name):
                yield Problem(
                    f"variables.{name}",
                    "looks like a secret, and scripts can be read by others: add its name to "
                    "environment.pass_through and export it where you submit",
                )


class Container(Section):
    """The image in which the ranks run, if they do."""

    runtime: Annotated[Literal["none", "apptainer", "pyxis"], about("what starts it")] = "none"
    image: Annotated[
        OneLine | None, about(".sif file, or .sqsh file or registry name for pyxis")
    ] = None
    mounts: list[OneLine] = Field(
        default_factory=list[str], description="more folders that it sees, such as /data:/data"
    )
    options: list[OneLine] = Field(
        default_factory=list[str], description="more options of its start"
    )
    python: Annotated[OneLine, about("interpreter in the image")] = "python3"

    def problems(self) -> Iterator[Problem]:
        """A runtime needs an image."""
        if self.runtime != "none" and self.image is None:
            yield Problem("image", f"is missing: runtime is {self.runtime}", ("runtime",))

    def ignored(self) -> Iterator[Ignored]:
        """Without a runtime there is no container."""
        if self.runtime == "none":
            for name in ("image", "mounts", "options", "python"):
                yield Ignored(name, ("runtime",), "runtime is none")


class Storage(Section):
    """Where models and data are kept."""

    cache: Annotated[
        JobPath | None, about("shared folder of models and datasets; null: the user's caches")
    ] = None
    scratch: Annotated[
        JobPath | None, about("folder on each node's own disk; the model is staged there")
    ] = None
    min_free_gib: Annotated[float, Field(ge=0, description="GiB of disk a run must find")] = 5.0


class Network(Section):
    """What the nodes can reach."""

    offline: Annotated[bool, about("nodes have no internet: never ask the hub")] = False
    min_bandwidth_gbit: Annotated[
        float, Field(ge=0, description="Gbit/s of an all-reduce; a slower node is excluded")
    ] = 0.0
    max_clock_skew_seconds: Annotated[
        float, Field(gt=0, description="seconds that clocks of nodes may differ")
    ] = 30.0


class Mlflow(Section):
    """The tracking server of the site."""

    uri: Annotated[
        OneLine | None, about("address; null: the recipe's, else mlflow.db by the runs")
    ] = None

    def problems(self) -> Iterator[Problem]:
        """Credentials go through the environment."""
        if self.uri is not None and "@" in urlsplit(self.uri).netloc:
            yield Problem(
                "uri",
                "holds a user or password: export MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD where you submit",
            )


class Site(Section):
    """A whole profile."""

    description: Annotated[OneLine, about("for which cluster, in words")] = ""
    slurm: Slurm = Slurm()
    cpu_jobs: CpuJobs = CpuJobs()
    environment: Environment = Environment()
    container: Container = Container()
    storage: Storage = Storage()
    network: Network = Network()
    mlflow: Mlflow = Mlflow()

    @model_validator(mode="after")
    def _check_relations(self) -> Site:
        broken = list(self._relations())
        if broken:
            text = "\n".join(f"{dotted_key(r.key)}: {r.message}" for r in broken)
            raise PydanticCustomError("relations", "{text}", {"text": text, "broken": broken})
        return self

    def _relations(self) -> Iterator[Relation]:
        for name in type(self).model_fields:
            section = getattr(self, name)
            if not isinstance(section, Section):
                continue
            for field, switches, why in section.ignored():
                if field in section.model_fields_set:
                    message = f"would be ignored, since {why}: remove it"
                    yield Relation(
                        (name, field), message, switches=tuple((name, s) for s in switches)
                    )
            for field, message, names in section.problems():
                where = (name, *field.split(".", 1))
                yield Relation(where, message, (where, *((name, n) for n in names)))


_NO_PLACEHOLDERS: Mapping[Key, Any] = {}


def _known() -> list[str]:
    """The profiles that come with Moored."""
    return sorted(path.stem for path in (slurm_folder() / "sites").glob("*.yaml"))


def load_site(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[str, Site]:
    """A profile by its name in `slurm/sites`, or by its path.

    Args:
        name_or_path: such as `cpu`, or `my/cluster.yaml`.
        overrides: `slurm.time=02:00:00` and the like.

    Returns:
        Its name, and what it says.

    Raises:
        UserError: there is no such profile.
        UserErrors: everything that is wrong in it, each in one line with its place and its fix.
    """
    path = profile_path(name_or_path)
    empty = f"the profile is empty: copy one from {slurm_folder() / 'sites'}"
    recipe = read_recipe(path, overrides, empty)
    if recipe.lines.keys() & {("model",), ("data",), ("train",)}:
        raise UserError(
            f"--site {path}: this is a recipe, and a site profile is needed: name one of "
            f"{', '.join(_known())}, or a copy of one in {slurm_folder() / 'sites'}"
        )
    return path.stem, validate(Site, recipe, _NO_PLACEHOLDERS, extra=lambda _site: ())


def profile_path(name_or_path: str) -> Path:
    """The file of a profile, by its name in `slurm/sites` or by its path.

    Raises:
        UserError: there is no such profile.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        folder, known = slurm_folder() / "sites", _known()
        if name_or_path not in known:
            near = suggest(name_or_path, known)
            if path.is_file():
                raise UserError(f"--site {path}: a profile's name ends in .yaml: rename it")
            raise UserError(
                f"--site {name_or_path}: no such profile{near}: there are {', '.join(known)} (in "
                f"{folder}); copy the one that is most like your cluster and give its path"
            )
        path = folder / f"{name_or_path}.yaml"
    return path


if __name__ == "__main__":
    from moored.config.recipe_docs import reference

    print(reference(Site, REFERENCE_HEAD), end="")
