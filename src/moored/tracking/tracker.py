"""Tracking of a run: `Tracker` writes the journal, a process beside it ships that to MLflow.

MLflow itself is not loaded by a trainer: that is for the process, and for `sync.py`, which does
the same for a run that has ended. The journal's format is `journal.py`'s.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moored.config import Config
from moored.tracking import provenance
from moored.tracking.journal import JOURNAL_NAME, Journal, first_start
from moored.tracking.start_sidecar import SamplerProcess, ShipperProcess
from moored.tracking.system_metrics import host_in_names
from moored.utils.errors import UserError

logger = logging.getLogger(__name__)

FINISH_SECONDS = 60.0
KILLED_FINISH_SECONDS = 5.0  # somebody wants the machine back


def ships_later() -> bool:
    """Whether the environment says that runs write their journal only, to be sent later.

    `MOORED_SHIP=later` is for many runs at once that share a store which takes one writer.

    Raises:
        UserError: it says something else.
    """
    value = os.environ.get("MOORED_SHIP", "")
    if value not in ("", "later"):
        raise UserError(
            f"MOORED_SHIP={value!r} is not known: set it to later (the run writes its journal, and "
            "`moored sync` sends it), or unset it (the run is sent while it trains)"
        )
    return value == "later"


class Tracker:
    """What a trainer says about its run; no call waits for more than an append to a file.

    Made by `start`; on ranks other than the main one every method does nothing, but that one rank
    on each other machine samples it until `finish`.

    Attributes:
        where: how to look at the run in MLflow, one line; empty if it is not tracked there.
    """

    def __init__(self, run_dir: Path, journal: Journal | None, attempt: int):
        self.run_dir = run_dir
        self.where = ""
        self._journal, self._attempt = journal, attempt
        self._uri = ""
        self._model: str | None = None
        self._shipper: ShipperProcess | None = None
        self._sampler: SamplerProcess | None = None

    @classmethod
    def start(
        cls,
        config: Config,
        run_dir: Path,
        *,
        attempt: int,
        is_main: bool = True,
        parent: Path | str | None = None,
        machine: str | None = None,
    ) -> Tracker:
        """Open the journal, write the start event, and start the process beside the trainer.

        Args:
            config: the recipe; `config.track` says where to.
            run_dir: the run directory; made if it is not there.
            attempt: 1, 2, ...: a resumed attempt goes on in the same MLflow run.
            is_main: whether this is the rank that tracks.
            parent: run directory of a comparison, whose MLflow run becomes this one's parent.
            machine: in a run over several machines, the host name of the one that this rank
                samples: the main rank its own, and one rank on each other machine.

        Raises:
            UserError: see `ships_later`.
        """
        later = ships_later()
        host = None if machine is None else host_in_names(machine)
        sampled = config.track.mlflow and config.track.system_metrics
        if not is_main:
            tracker = cls(run_dir, None, attempt)
            if sampled and host is not None:
                tracker._sampler = SamplerProcess(run_dir, attempt, host, is_main=False)
            return tracker
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        uri = provenance.tracking_uri(config)
        fields = provenance.start_fields(config, run_dir, uri, Path(parent) if parent else None)
        tracker = cls(run_dir, Journal(run_dir / JOURNAL_NAME), attempt)
        tracker._uri, tracker._model = uri, config.track.register_model
        tracker.event("start", **fields)
        if not config.track.mlflow:
            return tracker
        if not later:
            tracker.where = _where(uri)
            tracker._shipper = ShipperProcess(
                run_dir, uri, attempt, system_metrics=sampled, host=host
            )
            return tracker
        logger.info(
            "MOORED_SHIP=later: the run writes its journal only; `moored sync %s` sends it to %s",
            run_dir,
            provenance.address(uri),
        )
        if sampled:
            tracker._sampler = SamplerProcess(run_dir, attempt, host, is_main=True)
        return tracker

    @staticmethod
    def declare(
        config: Config, run_dir: Path, arms: Sequence[str], configs: Sequence[Config] = ()
    ) -> None:
        """Write the start of a run that is all arms, which others will start; nothing stays.

        The arms' shippers, or `moored sync`, bring it to the store. It goes on while arms do, or
        are still to come; it ends with them, or with a `finish` that somebody writes.

        Args:
            config: the recipe.
            run_dir: the run directory; made if it is not there.
            arms: their names, below `run_dir`/arms.
            configs: their recipes; what differs among them is no parameter of this run.
        """
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        uri = provenance.tracking_uri(config)
        fields = provenance.start_fields(config, run_dir, uri, None, configs)
        fields |= {"pid": None, "pid_began": None, "arms": list(arms)}
        tracker = Tracker(run_dir, Journal(run_dir / JOURNAL_NAME), 1)
        tracker._uri = uri
        tracker.event("start", **fields)
        assert tracker._journal is not None
        tracker._journal.close()

    @staticmethod
    def hand_over(run_dir: Path, path: Path, folder: str) -> None:
        """Add an artifact to a run that `declare` made, for the next `moored sync` to bring."""
        first = first_start(run_dir / JOURNAL_NAME)
        if first is None or "arms" not in first["fields"]:
            return
        tracker = Tracker(run_dir, Journal(run_dir / JOURNAL_NAME), first["attempt"])
        tracker.artifact(path, folder)
        assert tracker._journal is not None
        tracker._journal.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step; names carry their units: `train/ce_nats_per_token`."""
        if self._journal is None or not values:
            return
        self._journal.write(
            {
                "time": time.time(),
                "kind": "metrics",
                "step": int(step),
                "attempt": self._attempt,
                "values": {name: float(value) for name, value in values.items()},
            }
        )

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append something that happened; `kind` names it, `fields` are JSON values."""
        if self._journal is None:
            return
        record = {"time": time.time(), "kind": "event", "event": kind, "attempt": self._attempt}
        self._journal.write(record | {"fields": _scrubbed(fields, self._uri)})
        if kind in ("start", "finish"):
            self._journal.flush()
        for process in (self._shipper, self._sampler):
            if process is not None:
                process.keep()

    def dataset(
        self,
        name: str,
        digest: str,
        num_samples: int,
        num_tokens: int,
        context: str = "training",
    ) -> None:
        """Say what data the run reads; it becomes a dataset input of the MLflow run."""
        self.event(
            "dataset",
            name=name,
            digest=digest,
            num_samples=int(num_samples),
            num_tokens=int(num_tokens),
            context=context,
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        """Hand over a file or directory inside the run directory; it is read later, so keep it.

        Args:
            path: what to upload; a directory's content goes into `folder`.
            folder: the place among the run's artifacts, "" for the top.
        """
        absolute, root = Path(path).absolute(), self.run_dir.absolute()
        inside = absolute.is_relative_to(root)
        shown = absolute.relative_to(root) if inside else absolute
        self.event("artifact", path=str(shown), folder=folder)

    def register(self, folder: str) -> None:
        """Make the artifacts in `folder` a version of the recipe's registered model, if any."""
        if self._model is not None:
            self.event("register", name=self._model, folder=folder)

    def finish(self, status: str, timeout: float | None = None) -> None:
        """Write how the run ended, and give the shipper a bounded time to deliver the rest.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout: seconds to wait; by default 60, and 5 for a run that was killed.
        """
        if self._journal is not None:
            self.event("finish", status=status)
            self._journal.close()
            self._journal = None
        if self._sampler is not None:
            self._sampler.stop()
        if timeout is None:
            timeout = KILLED_FINISH_SECONDS if status == "KILLED" else FINISH_SECONDS
        if self._shipper is not None and not self._shipper.wait(timeout):
            logger.warning(
                "MLflow does not have everything: %s. Nothing is lost: `moored sync %s` sends the "
                "rest",
                self._shipper,
                self.run_dir,
            )


def _scrubbed(value: Any, uri: str) -> Any:
    if isinstance(value, str):
        return provenance.scrub(value, uri)
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(item, uri) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(item, uri) for item in value]
    return value


def _where(uri: str) -> str:
    clean = provenance.address(uri)
    if urlsplit(uri).scheme in ("http", "https"):
        return clean
    return f"mlflow ui --backend-store-uri {clean}"
