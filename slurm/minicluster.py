#!/usr/bin/env python3
"""A real SLURM of several virtual nodes on one machine, without systemd: for tests, and to try out.

    sudo slurm/minicluster.py install            the Debian packages
    sudo slurm/minicluster.py start [--nodes 3]  and it prints which SLURM_CONF to export
    sudo slurm/minicluster.py crash node2        as if its power failed
    sudo slurm/minicluster.py revive node2
    sudo slurm/minicluster.py stop

munged, slurmctld and one slurmd per node, each node with a host name, an /etc/hosts and a /dev/shm
of its own. Everything lives under --root; only processes whose pid and program it knows are ended.
Needs root and Linux; python's standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "scontrol")
SUBNET = "127.0.88"  # of the nodes; all of it is loopback
START_SECONDS = 120.0  # for a daemon, and for nodes to come up

CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A credential's life is also how long a job that was requeued waits, 120 s unless told otherwise.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
# cgroups would need systemd, or a tree that is ours
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PriorityType=priority/multifactor
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobRequeue=1
# Short clocks: what takes a cluster minutes shows in seconds.
SlurmdTimeout=5
SlurmctldTimeout=10
KillWait=30
UnkillableStepTimeout=20
OverTimeLimit=0
MinJobAge=3600
MaxArraySize=1001
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=train Default=YES DefaultTime=30 PriorityTier=10
PartitionName=urgent PriorityTier=100 PreemptMode=OFF
PartitionName=spare PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster by its folder.

    Attributes:
        root: where everything of it lies.
        num_nodes: how many, called node1, node2, ...
        cpus, memory_mb, gpus: what each says that it has; it need not be there.
        port: of slurmctld; those of the nodes follow.
        plugin: a SPANK plugin that srun and the nodes load; None for none.
    """

    root: Path
    num_nodes: int = 3
    cpus: int = 4
    memory_mb: int = 8000
    gpus: int = 2
    port: int = 26817
    plugin: Path | None = None

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must name."""
        return self.root / "etc" / "slurm.conf"

    @property
    def nodes(self) -> list[str]:
        """Their names."""
        return [f"node{i + 1}" for i in range(self.num_nodes)]

    def start(self) -> None:
        """Bring up what does not run yet, and wait until every node is there."""
        if os.geteuid() != 0:
            raise SystemExit("minicluster: must be root, for name spaces and munge")
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise SystemExit(f"minicluster: {', '.join(missing)} missing: run it with install")
        self._write()
        munge = self.root / "run" / "munge.sock"
        if self._pid("munged") is None:
            for stale in munge.parent.glob("munge.sock*"):
                stale.unlink()
            self._run(
                "munged",
                f"--key-file={self.root}/etc/munge.key",
                f"--socket={munge}",
                f"--pid-file={self.root}/run/munged.pid",
                f"--log-file={self.root}/log/munged.log",
                f"--seed-file={self.root}/state/munge.seed",
            )
        if self._pid("slurmctld") is None:
            self._run("slurmctld")
        for node in self.nodes:
            self.revive(node)
        self.wait_until_up(self.nodes)

    def revive(self, node: str) -> None:
        """Start the slurmd of a node, in name spaces of its own."""
        if self._pid("slurmd", node) is not None:
            return
        inside = (
            'hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && '
            'mount -t tmpfs tmpfs /dev/shm && exec slurmd -N "$1"'
        )
        self._run("unshare", "--mount", "--uts", "sh", "-c", inside, "node", node, str(self.root))

    def crash(self, node: str) -> int:
        """Kill all of a node at once: slurmd, steps, tasks; how many processes there were."""
        pids = self._family(node)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.root / "run" / f"slurmd.{node}.pid").unlink(missing_ok=True)
        # A node that was powered off has lost its job folders; left there they hold the job.
        shutil.rmtree(self.root / "spool" / node, ignore_errors=True)
        return len(pids)

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        if self._pid("slurmctld") is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._ask("scancel", "--quiet", "--state=RUNNING")
                self._ask("scancel", "--quiet", "--state=PENDING")
                deadline = time.monotonic() + 10
                while self._ask("squeue", "--noheader", "--states=R,CG") and (
                    time.monotonic() < deadline
                ):
                    time.sleep(0.1)
        self.stop_controller()  # before its nodes, for which it would wait
        for node in self.nodes:
            self.crash(node)
        self._end("munged")

    def stop_controller(self) -> None:
        """End slurmctld alone, as when it is started anew; jobs go on."""
        self._end("slurmctld")

    def _end(self, name: str) -> None:
        pid = self._pid(name)
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if pid is None or self._pid(name) != pid:
                return
            os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while self._pid(name) == pid and time.monotonic() < deadline:
                time.sleep(0.05)

    def wait_until_up(self, nodes: list[str]) -> None:
        """Wait until SLURM would give these nodes to jobs."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            lines = self._ask("sinfo", "-hN", "-p", "train", "-o", "%N %t").splitlines()
            up = {line.split()[0] for line in lines if line.split()[1] in ("idle", "mix", "alloc")}
            if up.issuperset(nodes):
                return
            time.sleep(0.1)
        raise SystemExit(f"minicluster: not all nodes came up; see {self.root}/log")

    def _write(self) -> None:
        for folder in ("etc", "run", "log", "state", "spool", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            (self.root / folder).chmod(0o755)
        self.root.chmod(0o755)
        key = self.root / "etc" / "munge.key"
        if not key.exists():
            key.write_bytes(secrets.token_bytes(1024))
            key.chmod(0o600)
        lines, hosts = [], ["127.0.0.1 localhost", f"127.0.0.1 {socket.gethostname()}"]
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        for i, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={SUBNET}.{i} Port={self.port + i} "
                f"CPUs={self.cpus} RealMemory={self.memory_mb}{gres} State=UNKNOWN"
            )
            hosts.append(f"{SUBNET}.{i} {node}")
        (self.root / "etc" / "hosts").write_text("\n".join(hosts) + "\n")
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(host=host, port=self.port, root=self.root, nodes="\n".join(lines))
        self.conf.write_text(text)
        fakes = []
        for i in range(self.gpus):
            device = self.root / "dev" / f"gpu{i}"
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
            fakes.append(f"Name=gpu File={device}")
        (self.root / "etc" / "gres.conf").write_text("\n".join(["AutoDetect=off", *fakes]) + "\n")
        plugins = f"required {self.plugin}\n" if self.plugin else ""
        (self.root / "etc" / "plugstack.conf").write_text(plugins)
        (self.root / "etc" / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
        )

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def _run(self, *command: str) -> None:
        with open(self.root / "log" / "daemons.out", "a") as log:
            done = subprocess.run(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
                timeout=START_SECONDS,
            )
        if done.returncode:
            raise SystemExit(f"minicluster: {command[0]} failed: {self.root}/log says why")

    def _ask(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        return done.stdout.strip()

    def _pid(self, name: str, node: str | None = None) -> int | None:
        """The pid in a pid file, if that process is still the daemon."""
        file = self.root / "run" / (f"{name}.{node}.pid" if node else f"{name}.pid")
        try:
            pid = int(file.read_text())
            program = os.readlink(f"/proc/{pid}/exe")
        except (OSError, ValueError):
            return None
        return pid if Path(program).name.removesuffix("-wlm").startswith(name) else None

    def _family(self, node: str) -> list[int]:
        """The slurmd of a node and all that descends from what it started.

        A slurmstepd is a child of init; it lives in its node's mount name space, as all do that it
        starts, and nobody else.
        """
        pid = self._pid("slurmd", node)
        space = self._space(pid) if pid is not None else None
        if space is None:
            return []
        return [other for other in _processes() if self._space(other) == space]

    @staticmethod
    def _space(pid: int) -> str | None:
        try:
            return os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            return None


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def install() -> None:
    """The Debian packages, where they are missing."""
    if all(shutil.which(name) for name in PROGRAMS):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"minicluster: install needs root and Debian, for {', '.join(PACKAGES)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        subprocess.run(command, env=environment, check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("install", "start", "stop", "crash", "revive"))
    parser.add_argument("node", nargs="?")
    parser.add_argument("--root", type=Path, default=Path("/tmp/moored-minicluster"))
    parser.add_argument("--nodes", type=int, default=3)
    options = parser.parse_args()
    cluster = Cluster(options.root.absolute(), num_nodes=options.nodes)
    if options.action == "install":
        install()
    elif options.action == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.conf}")
    elif options.action == "stop":
        cluster.stop()
    elif options.node not in cluster.nodes:
        sys.exit(f"minicluster: name one of {', '.join(cluster.nodes)}")
    elif options.action == "crash":
        print(f"{options.node}: {cluster.crash(options.node)} processes killed")
    else:
        cluster.revive(options.node)


if __name__ == "__main__":
    main()
