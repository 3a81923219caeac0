"""Functions of others in a child process: their faults cost a call, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from samullm_plugin.errors import InputError, PluginError
from samullm_plugin.host.isolation import IsolatedWorker
from samullm_plugin.planning.artifacts import read_plan


@pytest.fixture
def worker() -> Iterator[IsolatedWorker]:
    worker = IsolatedWorker()
    yield worker
    worker.close()


def test_values_come_back_and_prints_do_not(worker, capfd) -> None:
    assert worker.call("f", sorted, 20.0, [3, 1, 2]) == [1, 2, 3]
    worker.call("f", print, 20.0, "for people")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "for people\n")


def test_one_child_serves_until_it_dies(worker) -> None:
    first = worker.call("f", os.getpid, 20.0)
    assert worker.call("f", os.getpid, 20.0) == first != os.getpid()
    answer = worker.try_call(os._exit, 20.0, 3)
    assert answer.failure is not None
    assert (answer.failure.kind, answer.failure.text) == (
        "died",
        "ended its process (exit status 3)",
    )
    assert worker.call("f", os.getpid, 20.0) != first


def test_what_raises_is_named_and_its_traceback_kept(worker) -> None:
    with pytest.raises(PluginError, match=r"^step parse raised ZeroDivisionError: "):
        worker.call("step parse", divmod, 20.0, 1, 0)
    failure = worker.try_call(divmod, 20.0, 1, 0).failure
    assert failure is not None
    assert failure.trace.rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")
    with pytest.raises(PluginError, match=r"^step parse raised SystemExit: bye"):
        worker.call("step parse", sys.exit, 20.0, "bye")


def test_an_input_error_stays_one(worker) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        worker.call("f", read_plan, 60.0, Path("nowhere.json"))


def test_a_call_that_hangs_is_killed_with_what_it_started(worker) -> None:
    pid = worker.call("f", os.getpid, 20.0)
    with pytest.raises(PluginError, match="f did not answer within 1 s and was ended"):
        worker.call("f", subprocess.run, 1.0, ["sleep", "300"])
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) or _sleeps_of(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert worker.call("f", os.getpid, 20.0) != pid


def _sleeps_of(session: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            continue
    return found


def test_a_value_that_cannot_be_sent_is_a_failure(worker) -> None:
    failure = worker.try_call(open, 20.0, os.devnull).failure
    assert failure is not None
    assert failure.kind == "raised"
    assert worker.call("f", len, 20.0, "abc") == 3


def test_ctrl_c_does_not_reach_the_child(worker) -> None:
    pid = worker.call("f", os.getpid, 20.0)
    assert os.getpgid(pid) != os.getpgid(os.getpid())
    os.kill(pid, signal.SIGKILL)
    failure = worker.try_call(os.getpid, 20.0).failure
    assert failure is not None
    assert failure.kind == "died"


class Slow:
    """Takes a second to be read by whoever it is sent to, as a busy machine's imports do."""

    def __reduce__(self) -> tuple[object, tuple[float]]:
        return time.sleep, (1.0,)


def test_the_limit_begins_with_the_function(worker) -> None:
    answer = worker.try_call(str, 0.5, Slow())
    assert answer.failure is None
    assert answer.value == "None"
    late = worker.try_call(time.sleep, 0.5, 20.0)
    assert late.failure is not None
    assert late.failure.kind == "timeout"
