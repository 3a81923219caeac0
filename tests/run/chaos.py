"""Kills engines and coordinators of real runs at random moments, and checks what is left.

``python tests/run/chaos.py --kills 200 --seed 1`` is the soak (``make soak``).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from samullm_plugin.run.journal import read_journal  # found by the line above
from tests.outliving import wait_gone
from tests.run.real_app import make_files

PROGRAM = Path(__file__).with_name("real_app.py")
ITEMS = 96
"""Work of a run of the soak: so much that many kills fall into it, as each start of a coordinator
imports vLLM."""


@dataclass
class Chaos:
    """What was done, and what came of it.

    Attributes:
        engines: engine processes killed.
        coordinators: coordinators killed.
        runs: runs that were finished.
        texts: outputs compared with those of an undisturbed run.
        slowest_end_s: longest time until all engines of a killed coordinator were gone.
        pause_s: mean time between kills.
        coordinator_share: chance that a kill is for the coordinator.
    """

    folder: Path
    rng: np.random.Generator
    engines: int = 0
    coordinators: int = 0
    runs: int = 0
    texts: int = 0
    slowest_end_s: float = 0.0
    pause_s: float = 1.2
    coordinator_share: float = 0.15
    reference: dict[str, list[str]] = field(default_factory=dict)

    @property
    def kills(self) -> int:
        """Return all kills."""
        return self.engines + self.coordinators

    def run_once(self, kills: int) -> None:
        """Carry one run to its end, killing up to so many processes meanwhile."""
        directory = self.folder / f"run{self.runs}"
        resume = False
        while True:
            process = self._start(directory, resume=resume)
            try:
                done = self._harass(process, directory, kills)
            finally:
                self._end(process)
            if done:
                break
            resume = (directory / "plan.json").exists()
        assert process.returncode == 0, (directory / "stderr.txt").read_text()[-3000:]
        self.runs += 1
        self._check(directory)

    def _start(self, directory: Path, *, resume: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(PROGRAM), str(self.folder), str(directory)]
        with (self.folder / "stderr.txt").open("ab") as log:
            return subprocess.Popen([*command, *(["--resume"] if resume else [])], stderr=log)

    def _harass(self, process: subprocess.Popen[bytes], directory: Path, kills: int) -> bool:
        """Kill until enough; return whether the run ended by itself."""
        while process.poll() is None:
            if self.kills >= kills:
                process.wait()
                break
            time.sleep(float(self.rng.exponential(self.pause_s)))
            engines = _engines(process.pid)
            if not engines or process.poll() is not None:
                continue  # nothing runs yet
            if self.rng.random() < self.coordinator_share:
                everything = _family(process.pid)
                process.kill()
                process.wait()
                self.coordinators += 1
                end_s = wait_gone(everything)
                self.slowest_end_s = max(self.slowest_end_s, end_s)
                return False
            victim = engines[int(self.rng.integers(len(engines)))]
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.engines += 1
        return True

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()

    def _check(self, directory: Path) -> None:
        """Nothing lost, nothing doubled, every text as in the undisturbed run."""
        found = check_run(directory)
        self.texts += sum(len(lines) for lines in found.values())
        if not self.reference:
            self.reference = found
        assert found == self.reference


def check_run(directory: Path) -> dict[str, list[str]]:
    """Return the outputs of a run, in which every request has come to exactly one end, a good one.

    Raises:
        AssertionError: if that is not so.
    """
    records = list(read_journal(directory / "events.jsonl"))
    settled = Counter(
        (r["node"], r["request"]) for r in records if r["kind"] in ("finished", "failed", "skipped")
    )
    assert set(settled.values()) == {1}
    assert not [r for r in records if r["kind"] == "failed"]
    return read_texts(directory)


def read_texts(directory: Path) -> dict[str, list[str]]:
    """Return the outputs of a run, by node, in the order of its requests."""
    texts = {}
    for path in sorted((directory / "outputs").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        texts[path.stem] = [
            f"{line['custom_id']}: {line['response']['body']['choices'][0]['text']}"
            for line in lines
        ]
    return texts


def _family(pid: int) -> list[psutil.Process]:
    """Return all descendants of a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _engines(pid: int) -> list[psutil.Process]:
    """Return the engine processes: forked from a child of the coordinator that imported vLLM."""
    found = []
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if process.ppid() != pid:
                found.append(process)
    return found


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samullm-soak-") as name:
        folder = Path(name)
        make_files(folder, ITEMS)
        chaos = Chaos(folder, np.random.default_rng(arguments.seed), coordinator_share=0.1)
        began = time.monotonic()
        chaos.run_once(0)
        while chaos.kills < arguments.kills:
            chaos.run_once(arguments.kills)
            print(
                f"{chaos.engines} engines and {chaos.coordinators} coordinators killed, "
                f"{chaos.runs} runs complete, {chaos.texts:,} texts alike, "
                f"{time.monotonic() - began:.0f} s; engines gone at most "
                f"{chaos.slowest_end_s:.2f} s after their coordinator",
                flush=True,
            )


if __name__ == "__main__":
    main()
