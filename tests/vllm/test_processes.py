"""When a process counts as gone, and what ends it when its coordinator does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from samullm_vllm.processes import RecordedProcess, kill, wait_gone

LEADERLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1.0,)).start()
print("started", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""

HANGING = """
import ctypes, os, sys
from samullm_vllm.processes import end_with_parent
end_with_parent(int(sys.argv[1]), cleaning_up=True)
print(os.getpid(), flush=True)
ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
"""

PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""

WATCHING = """
import socket, subprocess, sys, time
from samullm_vllm.processes import ended_with_peer
control = socket.socket(fileno=int(sys.argv[1]))
with ended_with_peer(control):
    helper = subprocess.Popen(["sleep", "60"])
    print(helper.pid, flush=True)
    while not control.recv(1, socket.MSG_PEEK) or sys.argv[2] == "stay":
        time.sleep(0.01)
print("told", flush=True)
time.sleep(60)
"""


@contextmanager
def leaderless(seconds: str) -> Iterator[tuple[subprocess.Popen[str], RecordedProcess]]:
    """Start a process whose leader ends at once and a thread of which goes on for so long."""
    with subprocess.Popen(
        [sys.executable, "-c", LEADERLESS.replace("1.0", seconds)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        recorded = RecordedProcess.of(process.pid)
        assert recorded is not None
        yield process, recorded


def test_a_process_runs_as_long_as_one_of_its_threads() -> None:
    """Memory of devices goes with the last thread, however long the leader has been a zombie."""
    with leaderless("3.0") as (process, recorded):
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 1
        assert recorded.find() is not None
        assert not wait_gone([recorded], 0.1)
        assert wait_gone([recorded], 60.0)
        assert recorded.find() is None  # though nobody has waited for it yet
        assert process.poll() is not None


def test_one_whose_leader_has_ended_is_killed() -> None:
    with leaderless("60.0") as (process, recorded):
        assert kill([recorded])
        assert process.wait(10.0) == -9


def test_an_engine_that_hangs_ends_with_its_coordinator() -> None:
    """Even in a call that lets no thread of Python run, such as one that waits for a device."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, HANGING], stdout=subprocess.PIPE, text=True
    ) as coordinator:
        assert coordinator.stdout is not None
        engine = RecordedProcess.of(int(coordinator.stdout.readline()))
        assert engine is not None
        time.sleep(0.1)  # until it hangs
        coordinator.kill()
        assert wait_gone([engine], 60.0)


@contextmanager
def watching(how: str) -> Iterator[tuple[subprocess.Popen[str], socket.socket, psutil.Process]]:
    """Start a process that ends with the other end of its socket, and a helper of its own."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-c", WATCHING, str(theirs.fileno()), how],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as process,
    ):
        theirs.close()
        assert process.stdout is not None
        helper = psutil.Process(int(process.stdout.readline()))
        try:
            yield process, ours, helper
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_while_it_imports_a_process_ends_with_its_peer_and_takes_its_helpers_along() -> None:
    with watching("stay") as (process, ours, helper):
        ours.sendall(b"x")  # work that comes meanwhile is no end
        time.sleep(0.3)
        assert process.poll() is None
        ours.close()
        assert process.wait(20) == -signal.SIGKILL
        gone, _ = psutil.wait_procs([helper], 20)
        assert gone or helper.status() == psutil.STATUS_ZOMBIE


def test_afterwards_the_end_of_the_peer_is_its_own_affair() -> None:
    with watching("leave") as (process, ours, _):
        ours.sendall(b"x")
        assert process.stdout is not None
        assert process.stdout.readline() == "told\n"
        ours.close()
        time.sleep(0.3)
        assert process.poll() is None
