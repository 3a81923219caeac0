"""Journals: nothing appended is lost, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.run.journal import Journal, read_journal


def records(count: int, start: int = 0) -> list[dict[str, object]]:
    return [{"time_s": float(i), "kind": "x", "text": "é" * i} for i in range(start, start + count)]


def test_a_torn_line_anywhere_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    journal.append(records(6))
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(end <= size for end in ends)
        assert len(list(read_journal(path))) == complete
        journal = Journal(path)
        journal.append(records(1, start=9))
        journal.close()
        found = list(read_journal(path))
        assert [r["time_s"] for r in found] == [*range(complete), 9]


def test_what_was_written_is_read_again_whatever_it_holds(tmp_path: Path) -> None:
    """Values of functions and texts of exceptions may hold what JSON from elsewhere may not."""
    deep: object = 1
    for _ in range(150):
        deep = [deep]
    odd = {
        "time_s": 0.0,
        "kind": "x",
        "half": "a\ud800",
        "deep": deep,
        "large": 10**400,
        "none": float("inf"),
    }
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    places = journal.append([odd, *records(1)])
    journal.sync()
    assert journal.read(places[0]) == odd | {"none": None}
    journal.close()
    assert list(read_journal(path)) == [odd | {"none": None}, *records(1)]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time_s":0,"kind":"x"}\n{"time\n{"time_s":1,"kind":"x"}\n')
    with pytest.raises(InputError, match=r"events\.jsonl line 2: is not JSON"):
        list(read_journal(path))


def test_a_failed_write_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    journal.append(records(2))
    real = os.write
    calls = 0

    def write(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunError, match=r"No space left.*make room and continue with --resume"):
        journal.append(records(3, start=2))
    monkeypatch.undo()
    assert len(list(read_journal(path))) == 2
    journal.append(records(1, start=2))
    journal.close()
    assert [r["time_s"] for r in read_journal(path)] == [0, 1, 2]


def test_appended_lines_survive_a_kill(tmp_path: Path) -> None:
    """The process kills itself with SIGKILL right after ``append`` has returned."""
    path = tmp_path / "events.jsonl"
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from samullm_plugin.run.journal import Journal\n"
        f"journal = Journal(Path({str(path)!r}), sync_interval_s=3600)\n"
        "journal.append([{'time_s': 0.0, 'kind': 'a'}, {'time_s': 1.0, 'kind': 'b'}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert [r["kind"] for r in read_journal(path)] == ["a", "b"]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    journal.append([{"time_s": float("inf"), "kind": "x", "devices": (1, 2), "text": 'a\n"b"'}])
    journal.close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "time_s": None,
        "kind": "x",
        "devices": [1, 2],
        "text": 'a\n"b"',
    }
