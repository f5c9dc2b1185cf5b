"""Two machines on this one: each with a network, a host name and process numbers of its own.

They share the disk, as the nodes of a cluster do, and are joined by a cable that can be cut. Linux
namespaces, which only root may make. They end with this process, however that ends: the first
process of each machine waits for the end of a pipe, and takes all others along.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from shell import environment

HOSTS = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
SPACES = ("--net", "--uts", "--mount", "--pid")
BOOT = 'mount --bind "$1" /etc/hosts && hostname "$0" && ip link set lo up && echo up && exec cat'


class NoMachinesError(RuntimeError):
    """This machine cannot play several."""


class Machine:
    """One of the two. Raises NoMachinesError where it cannot be made."""

    def __init__(self, name: str, hosts: Path) -> None:
        self.name = name
        self.started: list[subprocess.Popen] = []
        boot = ["sh", "-c", BOOT, name, str(hosts)]
        try:
            self.power = subprocess.Popen(
                ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", *boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except FileNotFoundError as error:
            raise NoMachinesError(f"there is no {error.filename}") from error
        if (said := self.power.stdout.readline().strip()) != "up":
            self.power.communicate()
            raise NoMachinesError(said or "unshare failed")
        parent = self.power.pid
        self.first = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
        self.network = os.readlink(f"/proc/{self.first}/ns/net")

    def inside(self, *words: str, cwd: str | Path = "/") -> list[str]:
        """The command line that runs a command there."""
        return ["nsenter", "--target", str(self.first), *SPACES, f"--wd={cwd}", *words]

    def torchrun(self, *words: str, cwd: Path, log: Path, **more: str) -> subprocess.Popen:
        """Start torchrun there; what it says is added to a file."""
        with log.open("ab") as output:
            agent = subprocess.Popen(
                self.inside(sys.executable, "-m", "torch.distributed.run", *words, cwd=cwd),
                env=environment(cwd, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1", **more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(agent)
        return agent

    def processes(self) -> dict[int, str]:
        """What runs there: the numbers that this machine knows them by, and command lines."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (place / "cmdline").read_text().replace("\0", " ")  # empty once it is dead
                if os.readlink(place / "ns" / "net") == self.network and line:
                    found[int(place.name)] = line
        for own in (self.power.pid, self.first):
            found.pop(own, None)
        return {pid: line for pid, line in found.items() if not line.startswith("nsenter")}

    def workers(self) -> set[int]:
        """The processes that train there, without the agents that started them."""
        found = self.processes().items()
        return {p for p, line in found if "train.py" in line and "distributed.run" not in line}

    def kill(self) -> None:
        """Kill all that runs there at once, as when its power is cut."""
        while there := self.processes():
            for pid in there:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(timeout=10)
        self.started.clear()

    def close(self) -> None:
        """Switch it off."""
        self.power.communicate()  # the end of the pipe that it waits for
        for process in self.started:
            process.wait(timeout=10)


class Pair:
    """Two machines and a cable. Raises NoMachinesError where they cannot be made."""

    def __init__(self, folder: Path) -> None:
        hosts = folder / "hosts"
        lines = [f"{address} {name}\n" for name, address in HOSTS.items()]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.machines: dict[str, Machine] = {}
        try:
            for name in HOSTS:
                self.machines[name] = Machine(name, hosts)
            a, b = (str(machine.first) for machine in self.machines.values())
            run(*f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}".split())
            for name, machine in self.machines.items():
                address = ("address", "add", f"{HOSTS[name]}/24", "dev", "eth0")
                run(*machine.inside("ip", *address))
            self.mend()
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Pull the cable out: what is sent is lost, and no connection is told."""
        run(*self.machines["node-b"].inside("ip", "link", "set", "eth0", "down"))

    def mend(self) -> None:
        """Put it in."""
        for machine in self.machines.values():
            run(*machine.inside("ip", "link", "set", "eth0", "up"))

    def close(self) -> None:
        """Switch both off."""
        for machine in self.machines.values():
            machine.close()


def run(*words: str) -> None:
    """Run a command. Raises NoMachinesError with what it says where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise NoMachinesError(f"there is no {error.filename}") from error
    if done.returncode != 0:
        raise NoMachinesError(f"{' '.join(words)}: {done.stderr.strip()}")
