"""Lets machines, engines and coordinators of runs on a Ray cluster fail, and checks what is left.

``python tests/ray/chaos.py --rounds 3`` is the soak (``make soak-ray``). The cluster is two raylets
of this machine. A run is disturbed once, at a random point; whatever happens, every output must be
there exactly once, with the text of an undisturbed run on local engines. A run that ends with an
error has to say so, and is resumed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from samullm_plugin.run.journal import read_journal  # found by the line above
from tests.ray.machines import Machines
from tests.run.chaos import check_run
from tests.run.real_app import make_files

PROGRAM = Path(__file__).parents[1] / "run" / "real_app.py"
RUN_S = 900.0
SHORT_STOP_S, LONG_STOP_S = 5.0, 60.0
"""Ray gives a silent machine up after half a minute, the executor after ``lost_timeout_s``."""


@dataclass
class Row:
    """What was done of a kind, and what came of it."""

    times: int = 0
    resumed: int = 0
    lost: int = 0
    joined: int = 0
    texts: int = 0
    seconds: list[float] = field(default_factory=list)

    def plus(self, other: Row) -> Row:
        """Return both together."""
        names = [f.name for f in fields(Row)]
        return Row(**{n: getattr(self, n) + getattr(other, n) for n in names})


class Soak:
    """Disturbed runs on a cluster that is mended after each.

    Args:
        folder: of the application; runs are in it.
        rng: chooses when something happens.
    """

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.rng = folder, rng
        self.rows: dict[str, Row] = {}
        self.reference: dict[str, list[str]] = {}
        self._runs = 0
        self._driver: subprocess.Popen[bytes] | None = None
        local = folder / "local"
        command = [sys.executable, str(PROGRAM), str(folder), str(local)]
        subprocess.run(command, check=True)
        self.reference = check_run(local)
        self.machines = Machines()

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        """Return what can happen, by name."""
        return {
            "nothing": lambda: None,
            "engine killed": lambda: self.machines.second_engine().kill(),
            "agent killed": lambda: self.machines.second_agent().kill(),
            "agent stopped": lambda: self.machines.second_agent().send_signal(signal.SIGSTOP),
            "machine killed, none joins": self.machines.kill_second,
            "machine killed, another joins": self._replace,
            "raylet killed": lambda: self.machines.kill_second(whole=False),
            "raylet stopped for 5 s": lambda: self._stop(SHORT_STOP_S),
            "raylet stopped for 60 s": lambda: self._stop(LONG_STOP_S),
            "coordinator killed": self._kill_driver,
            "head (GCS) killed": self.machines.kill_head,
        }

    def _replace(self) -> None:
        self.machines.kill_second()
        self.machines.add_second()

    def _stop(self, seconds: float) -> None:
        raylet = self.machines.second_raylet
        raylet.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        with suppress(psutil.NoSuchProcess):
            raylet.send_signal(signal.SIGCONT)

    def _kill_driver(self) -> None:
        assert self._driver is not None
        self._driver.kill()

    def disturb(self, kind: str) -> None:
        """Carry one run to its end, in which something of a kind happens."""
        row = Row()
        directory = self.folder / f"run{self._runs}"
        self._runs += 1
        began_s = time.monotonic()
        process = self._start(directory, resume=False)
        try:
            self._await(process, directory, int(self.rng.integers(3, self._count // 2)))
            self._happen(kind)
            ended = process.wait(RUN_S)
            if kind == "head (GCS) killed":
                said = self._log.read_text()
                assert "the head of the cluster" in said, said[-3000:]
                assert "--resume" in said, said[-3000:]
                assert ended == 1
            while ended:
                assert kind in ("head (GCS) killed", "coordinator killed"), self._said()
                self._mend(kind)
                row.resumed += 1
                process = self._start(directory, resume=True)
                ended = process.wait(RUN_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert check_run(directory) == self.reference
        records = [r["kind"] for r in read_journal(directory / "events.jsonl")]
        row.times = 1
        row.lost, row.joined = records.count("devices_lost"), records.count("devices_joined")
        row.texts = self._count
        row.seconds.append(time.monotonic() - began_s)
        self.rows[kind] = self.rows[kind].plus(row) if kind in self.rows else row
        if not row.resumed:
            self._mend(kind)

    def _happen(self, kind: str) -> None:
        """Let something happen; engines come and go, so that one may have to be waited for."""
        for _ in range(200):
            with suppress(LookupError, psutil.NoSuchProcess):
                self.kinds[kind]()
                return
            time.sleep(0.05)
        raise AssertionError(f"{kind}: nothing was found that this could happen to")

    @property
    def _count(self) -> int:
        return sum(len(lines) for lines in self.reference.values())

    @property
    def _log(self) -> Path:
        return self.folder / "stderr.txt"

    def _said(self) -> str:
        return self._log.read_text()[-3000:]

    def _start(self, directory: Path, *, resume: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(PROGRAM), str(self.folder), str(directory)]
        command += ["--ray", self.machines.address, *(["--resume"] if resume else [])]
        with self._log.open("wb") as log:
            self._driver = subprocess.Popen(command, stderr=log)
        return self._driver

    def _await(self, process: subprocess.Popen[bytes], directory: Path, enough: int) -> None:
        """Wait until so many requests are finished."""
        journal, deadline_s = directory / "events.jsonl", time.monotonic() + RUN_S
        while not journal.exists() or journal.read_bytes().count(b'"finished"') < enough:
            assert process.poll() is None, self._said()
            assert time.monotonic() < deadline_s, self._said()
            time.sleep(0.02)

    def _mend(self, kind: str) -> None:
        """Have two machines again."""
        if kind.startswith("head"):
            self.machines.close()
            self.machines = Machines()
        elif kind.startswith(("machine killed, none", "raylet")):
            self.machines.replace_second()

    def table(self) -> str:
        """Return what was done, as Markdown."""
        lines = [
            "| what happened | times | resumed by hand | machines lost / joined | "
            "outputs once each, texts equal | seconds a run, median (longest) |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for kind, row in self.rows.items():
            took = f"{np.median(row.seconds):.0f} ({max(row.seconds):.0f})"
            lines.append(
                f"| {kind} | {row.times} | {row.resumed} | {row.lost} / {row.joined} | "
                f"{row.texts:,} | {took} |"
            )
        return "\n".join(lines)


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="kinds that begin so")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samullm-soak-ray-") as name:
        folder = Path(name)
        make_files(folder, arguments.items)
        soak = Soak(folder, np.random.default_rng(arguments.seed))
        try:
            for number in range(arguments.rounds):
                for kind in [k for k in soak.kinds if k.startswith(tuple(arguments.only))]:
                    soak.disturb(kind)
                    took_s = soak.rows[kind].seconds[-1]
                    print(f"round {number + 1}: {kind}: whole, {took_s:.0f} s", flush=True)
        finally:
            print(soak.table(), flush=True)
            soak.machines.close()


if __name__ == "__main__":
    main()
