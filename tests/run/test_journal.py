"""Journals: nothing appended is lost, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.files import to_json
from samullm_plugin.run.journal import FinishedRecord, Journal, read_journal, read_journal_places


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


def test_nothing_stays_of_a_torn_line_longer_than_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    torn = b'{"time_s": 0, "kind": "finished", "text": "' + b"y" * 500
    path.write_bytes(torn)
    journal = Journal(path)
    journal.append(records(1))
    journal.close()
    assert b"yy" not in path.read_bytes()
    assert len(list(read_journal(path))) == 1


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


def test_records_of_finished_requests_are_read_short_and_refused_as_whole_ones(
    tmp_path: Path,
) -> None:
    """Whatever a byte is changed to, both ways of reading agree."""
    record = {
        "time_s": 12.5, "kind": "finished", "node": "a", "request": 3, "prompt_tokens": 7,
        "num_tokens": 9, "text": "é \u2028 \"x\"", "finish_reason": "length",
        "token_ids": [1, 2], "value": {"a": [None, 1e3, "ü"]}, "key": "00ff",
    }  # fmt: skip
    line = to_json(record)
    rng = np.random.default_rng(5)
    path, read, short = tmp_path / "events.jsonl", 0, 0
    for case in range(1500):
        changed = bytearray(line)
        for at in rng.integers(0, len(line), rng.integers(0, 3)):
            changed[at] = rng.choice(list(b'0123456789.-+eE"\\{}[],:nNutrlsaf \xff\xc3\x00'))
        path.write_bytes(bytes(changed) + b"\n")
        try:
            whole = list(read_journal(path))
        except InputError as error:
            with pytest.raises(InputError, match=re.escape(str(error))):
                list(read_journal_places(path))
            continue
        ((_, found),) = list(read_journal_places(path)) or ((0, None),)
        read += 1
        if isinstance(found, FinishedRecord):
            short += 1
            (expected,) = whole
            for name in ("time_s", "kind", "node", "request", "num_tokens"):
                assert getattr(found, name) == expected[name], case
            assert found.prompt_tokens == expected.get("prompt_tokens", 0), case
            assert found.finish_reason == expected.get("finish_reason"), case
            assert expected.get("seconds") is None
        else:
            assert whole in ([found], [])
    assert read > short > 500
