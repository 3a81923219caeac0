"""The store of outputs: kept through kills, shared by processes, pruned, never in a run's way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.errors import InputError
from samullm_plugin.run import store as store_module
from samullm_plugin.run.store import OutputStore, store_path

REPOSITORY = Path(__file__).parents[2]

WRITER = """
import sys, time
from pathlib import Path
from samullm_plugin.run.store import OutputStore
store, first = OutputStore(Path(sys.argv[1])), int(sys.argv[2])
for k in range(first, first + int(sys.argv[3])):
    store.put(k.to_bytes(16, "big"), b"x" * 200 + str(k).encode(), "m")
    if k % 50 == 49:
        store.flush()
        print(k, flush=True)
store.close()
"""


def writer(path: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    for attempt in range(3):
        process = writer(path, attempt * 1_000_000, 1_000_000)
        assert process.stdout is not None
        for _ in range(5 + 7 * attempt):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with OutputStore(path) as store:
            assert store._base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            for k in range(attempt * 1_000_000, last + 1):
                assert store.get(key(k)) == b"x" * 200 + str(k).encode()


def test_many_kills_beside_other_runs_lose_nothing_that_was_written(tmp_path: Path) -> None:
    """Three processes share the store; one after another is killed, wherever it is."""
    command = [sys.executable, "-m", "tests.run.killed_writers", str(tmp_path / "o.sqlite"), "60"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert not done.stderr
    assert int(done.stdout) > 100


def test_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    processes = [writer(path, k * 500, 1_000) for k in range(4)]  # overlapping halves
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with OutputStore(path) as store:
        assert store.figures().outputs == {"m": 2_500}


def test_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "show"]) == 0
    assert "nothing is stored" in capsys.readouterr().err
    assert main(["cache", "prune", "--all"]) == 2
    assert "there is no store of outputs yet" in capsys.readouterr().err
    with OutputStore(store_path()) as store:
        for k in range(10):
            store.put(key(k), b"x", "one" if k < 4 else "two")
        store.flush()
        store._base.execute("UPDATE outputs SET used_s = used_s - 100000 WHERE model = 'two'")
        assert store.get(key(9)) == b"x"  # used again, so it is young
    assert main(["cache", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["outputs"] == {"one": 4, "two": 6}
    assert shown["file_bytes"] > 0
    for words, message in (
        (["prune"], "say what goes"),
        (["prune", "--older-than", "3x"], "write a number and one of s, m, h, d"),
        (["prune", "--model", "three"], "nothing of it is stored; there are one, two"),
    ):
        assert main(["cache", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["cache", "prune", "--older-than", "1d"]) == 0
    assert "5 outputs removed" in capsys.readouterr().err
    assert main(["cache", "prune", "--model", "one"]) == 0
    with OutputStore(store_path()) as store:
        assert store.figures().outputs == {"two": 1}


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(InputError, match=r"o\.sqlite: .* run with --reuse off"):
        OutputStore(path)
    other = OutputStore(tmp_path / "p.sqlite")
    other._base.execute("PRAGMA user_version=9")
    other.close()
    with pytest.raises(InputError, match="its format is 9, this version reads 1"):
        OutputStore(tmp_path / "p.sqlite")


def test_a_store_that_stays_locked_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_S", 0.1)
    first, second = OutputStore(tmp_path / "o.sqlite"), OutputStore(tmp_path / "o.sqlite")
    first._base.execute("BEGIN IMMEDIATE")
    second.put(key(1), b"x", "m")
    began_s = time.monotonic()
    with pytest.raises(InputError, match="cannot be written: database is locked"):
        second.flush()
    assert time.monotonic() - began_s < 20
    first._base.execute("ROLLBACK")
    first.close()
    second.close()
