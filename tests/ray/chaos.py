"""Lets machines, engines and coordinators of runs on a Ray cluster fail, and checks what is left.

``python tests/ray/chaos.py`` is the soak (``make soak-ray``). The cluster is two raylets of this
machine. A run is disturbed once or twice, at random points; whatever happens, every output must be
there exactly once, with the text of an undisturbed run on local engines, and no process of the run
may be left. A run that ends with an error has to say so, and is resumed. What a run's failures
break is told, and the next run follows on a new cluster.

What takes time is that every agent imports vLLM, so that runs are short and share two failures,
but for the one that a machine joins: what joins must have work to do. That run is planned again as
``samullm run`` does, and engines on the machine that joined must finish requests.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from samullm_plugin.run.journal import read_journal  # found by the line above
from tests.outliving import wait_gone
from tests.ray.machines import Machines
from tests.run.chaos import check_run
from tests.run.real_app import make_files

PROGRAM = Path(__file__).parents[1] / "run" / "real_app.py"
RUN_S = 900.0
SHORT_STOP_S, LONG_STOP_S = 5.0, 25.0
"""The test cluster gives a silent raylet up after about ``machines.SILENT_S``."""
JOINS = "machine killed, another joins"
HEAD, HEAD_LATE = "head (GCS) killed", "head (GCS) killed at the end"
RUNS = (
    ("raylet stopped for 5 s", "agent stopped"),
    ("agent killed", "raylet stopped until Ray gives it up"),
    ("machine killed, none joins", "coordinator killed"),
    ("engine killed", HEAD_LATE),
    (JOINS,),
    ("raylet killed", HEAD),
)
"""What happens to a run, one after another."""
LONG = (JOINS, HEAD)
"""Needs a run that goes on for as long as it takes to notice."""
LEFT_CPU_S = 20.0
"""What a process of a run that is over may still work: an agent may be importing vLLM."""


@dataclass
class Row:
    """What was done, and what came of it, counted in the runs' journals.

    Attributes:
        times: runs that were carried to their end.
        failed: runs in which something was not as it must be.
        resumed: runs that had to be resumed.
        engines: engines that failed while their machine was there.
        lost: machines given up.
        joined: machines that joined.
        used: engines on machines that joined which finished requests.
        used_texts: these requests.
        texts: outputs compared.
        seconds: what each run took, resuming included.
        left_s: how long after each run its last process was gone.
    """

    times: int = 0
    failed: int = 0
    resumed: int = 0
    engines: int = 0
    lost: int = 0
    joined: int = 0
    used: int = 0
    used_texts: int = 0
    texts: int = 0
    seconds: list[float] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)

    def plus(self, other: Row) -> Row:
        """Return both together."""
        names = [f.name for f in fields(Row)]
        return Row(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def count(self, records: list[dict[str, Any]]) -> None:
        """Count what a run's journal tells."""
        kinds = [r["kind"] for r in records]
        self.engines += kinds.count("engine_failed")
        self.lost += kinds.count("devices_lost")
        self.joined += kinds.count("devices_joined")
        back, theirs = set[int](), set[str]()
        for record in records:
            if record["kind"] == "devices_joined":
                back |= set(record["devices"])
            elif record["kind"] == "devices_lost":
                back -= set(record["devices"])
            elif record["kind"] == "engine_started" and back & set(record["devices"]):
                theirs.add(record["key"])
            elif record["kind"] == "engine_stopped" and record["key"] in theirs:
                self.used += record["num_finished"] > 0
                self.used_texts += record["num_finished"]


@dataclass(frozen=True)
class Application:
    """What is run.

    Attributes:
        folder: of the application; runs are in it.
        reference: outputs of an undisturbed run on local engines.
    """

    folder: Path
    reference: dict[str, list[str]]

    @classmethod
    def make(cls, folder: Path, items: int) -> Application:
        """Write it, and run it on local engines."""
        folder.mkdir()
        make_files(folder, items)
        local = folder / "local"
        subprocess.run([sys.executable, str(PROGRAM), str(folder), str(local)], check=True)
        return cls(folder, check_run(local))

    @property
    def count(self) -> int:
        """Return how many outputs it has."""
        return sum(len(lines) for lines in self.reference.values())


class Soak:
    """Disturbed runs on a cluster that is mended after each.

    Args:
        folder: of the applications.
        rng: chooses when something happens.
        items: of a run.
        long_items: of a run of ``LONG``.
    """

    def __init__(self, folder: Path, rng: np.random.Generator, items: int, long_items: int) -> None:
        self.folder, self.rng = folder, rng
        self.rows: dict[tuple[str, ...], Row] = {}
        self.happened = Counter[str]()
        self._items, self._long_items = items, long_items
        self._apps: dict[int, Application] = {}
        self._runs = 0
        self._driver: subprocess.Popen[bytes] | None = None
        self.machines = Machines()

    def _app(self, kinds: tuple[str, ...]) -> Application:
        items = self._long_items if set(LONG) & set(kinds) else self._items
        if items not in self._apps:
            self._apps[items] = Application.make(self.folder / str(items), items)
        return self._apps[items]

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        """Return what can happen, by name."""
        return {
            "engine killed": lambda: self.machines.second_engine().kill(),
            "agent killed": lambda: self.machines.second_agent().kill(),
            "agent stopped": lambda: self.machines.second_agent().send_signal(signal.SIGSTOP),
            "machine killed, none joins": self.machines.kill_second,
            JOINS: self._replace,
            "raylet killed": lambda: self.machines.kill_second(whole=False),
            "raylet stopped for 5 s": lambda: self._stop(SHORT_STOP_S),
            "raylet stopped until Ray gives it up": lambda: self._stop(LONG_STOP_S),
            "coordinator killed": self._kill_driver,
            HEAD: self.machines.kill_head,
            HEAD_LATE: self.machines.kill_head,
        }

    def _replace(self) -> None:
        self.machines.kill_second()
        self.machines.add_second()

    def _stop(self, seconds: float) -> None:
        raylet = self.machines.second_raylet

        def resume() -> None:
            with suppress(psutil.NoSuchProcess):
                raylet.send_signal(signal.SIGCONT)

        raylet.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, resume).start()

    def _kill_driver(self) -> None:
        assert self._driver is not None
        self._driver.kill()

    def disturb(self, kinds: tuple[str, ...]) -> bool:
        """Carry one run to its end, in which something happens; return whether all held.

        After a failure the cluster is another.
        """
        row = Row()
        try:
            self._disturb(kinds, row)
        except Exception:  # what does not hold is the result
            traceback.print_exc()
            print(self._said(), flush=True)
            row.failed = 1
            self._renew()
        self.rows[kinds] = self.rows[kinds].plus(row) if kinds in self.rows else row
        return not row.failed

    def _disturb(self, kinds: tuple[str, ...], row: Row) -> None:
        app = self._app(kinds)
        directory = app.folder / f"run{self._runs}"
        self._runs += 1
        apart = app.count // (8 if set(LONG) & set(kinds) else 3)
        points = apart * np.arange(len(kinds)) + self.rng.integers(3, apart // 2, len(kinds))
        if HEAD_LATE in kinds:
            points[-1] = app.count - 2
        began_s = time.monotonic()
        process = self._start(app, directory, replan=JOINS in kinds)
        theirs = set[psutil.Process]()
        try:
            for kind, enough in zip(kinds, points, strict=True):
                self._await(process, directory, int(enough))
                theirs |= set(self.machines.workers())
                self._happen(kind)
                self.happened[kind] += 1
            ended = process.wait(RUN_S)
            if HEAD in kinds:
                said = self._log.read_text()
                assert "the head of the cluster" in said, said[-3000:]
                assert "--resume" in said, said[-3000:]
                assert ended == 1
            theirs |= set(self.machines.workers())
            while ended:
                assert kinds[-1] in (HEAD, "coordinator killed"), self._said()
                self._mend(kinds)
                row.resumed += 1
                process = self._start(app, directory, resume=True)
                ended = process.wait(RUN_S)
                theirs |= set(self.machines.workers())
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        row.seconds.append(time.monotonic() - began_s)
        assert check_run(directory) == app.reference
        row.count(list(read_journal(directory / "events.jsonl")))
        if kinds[0].startswith("machine"):
            assert not row.engines, "a lost machine counts as a failure of a node"
        assert row.used or JOINS not in kinds, "the machine that joined had no work"
        if not row.resumed:
            self._mend(kinds)
        row.left_s.append(wait_gone(theirs, LEFT_CPU_S))
        row.times, row.texts = 1, app.count

    def _happen(self, kind: str) -> None:
        """Let something happen; engines come and go, so that one may have to be waited for."""
        for _ in range(200):
            with suppress(LookupError, psutil.NoSuchProcess):
                self.kinds[kind]()
                return
            time.sleep(0.05)
        raise AssertionError(f"{kind}: nothing was found that this could happen to")

    @property
    def _log(self) -> Path:
        return self.folder / "stderr.txt"

    def _said(self) -> str:
        return self._log.read_text()[-3000:] if self._log.exists() else ""

    def _start(
        self, app: Application, directory: Path, *, resume: bool = False, replan: bool = False
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(PROGRAM), str(app.folder), str(directory)]
        command += ["--ray", self.machines.address]
        command += [f"--{n}" for n, asked in (("resume", resume), ("replan", replan)) if asked]
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

    def _mend(self, kinds: tuple[str, ...]) -> None:
        """Have two machines again."""
        if any(k.startswith("head") for k in kinds):
            self._renew()
        elif any(k.startswith(("machine killed, none", "raylet")) for k in kinds):
            self.machines.replace_second()

    def _renew(self) -> None:
        """Have another cluster."""
        with suppress(LookupError, psutil.NoSuchProcess):
            self.machines.second_raylet.send_signal(signal.SIGCONT)
        self.machines.close()
        self.machines = Machines()

    def table(self) -> str:
        """Return what was done, as Markdown."""
        lines = [
            "| what happened | runs | wrong | resumed by hand | engines failed | "
            "machines given up / joined | engines on joined machines, their outputs | "
            "outputs once each, texts equal | seconds a run, median (longest) | "
            "longest until all its processes were gone, s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for kinds, row in self.rows.items():
            took = f"{np.median(row.seconds):.0f} ({max(row.seconds):.0f})" if row.seconds else ""
            left = f"{max(row.left_s):.1f}" if row.left_s else ""
            lines.append(
                f"| {', then '.join(kinds)} | {row.times} | {row.failed} | {row.resumed} | "
                f"{row.engines} | {row.lost} / {row.joined} | {row.used}, {row.used_texts:,} | "
                f"{row.texts:,} | {took} | {left} |"
            )
        return "\n".join(lines)


def main() -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--long-items", type=int, default=900, help=f"of: {', '.join(LONG)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="runs with kinds that begin so")
    parser.add_argument("--alone", action="store_true", help="one failure in each run")
    arguments = parser.parse_args()
    folder, whole = Path(tempfile.mkdtemp(prefix="samullm-soak-ray-")), True
    rng = np.random.default_rng(arguments.seed)
    soak = Soak(folder, rng, arguments.items, arguments.long_items)
    runs = [(k,) for ks in RUNS for k in ks] if arguments.alone else list(RUNS)
    runs = [ks for ks in runs if any(k.startswith(tuple(arguments.only)) for k in ks)]
    try:
        for number in range(arguments.rounds):
            for kinds in runs:
                began_s = time.monotonic()
                held = soak.disturb(kinds)
                whole &= held
                took_s = time.monotonic() - began_s
                what = "whole" if held else "WRONG"
                print(f"round {number + 1}: {kinds}: {what}, {took_s:.0f} s", flush=True)
    finally:
        print(soak.table(), f"failures by kind: {dict(soak.happened)}", sep="\n", flush=True)
        soak.machines.close()
    if not whole:
        print(f"what is left of the runs is in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
