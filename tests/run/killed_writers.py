"""Writers of a store that are killed by SIGKILL wherever they are: ``test_store.py`` runs this.

A program of its own, as a process that forks should have no threads; its children need no imports.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from samullm_plugin.run.store import OutputStore

KEYS = 4000
WRITERS = 3


def key(number: int) -> bytes:
    """Return a key of the store."""
    return number.to_bytes(16, "big")


def content(number: int) -> bytes:
    """Return what is kept under a key: short and long, over several pages of the file as well."""
    return hashlib.sha256(str(number).encode()).digest() * (1 + number % 400)


def write(path: Path, seed: int, pipe: int) -> None:
    """Read and write without end; keys that are in the file are told through the pipe."""
    chance = random.Random(seed)
    store = OutputStore(path)
    while True:
        at = chance.randrange(KEYS)
        if store.get(key(at)) not in (None, content(at)):
            os.write(pipe, b"wrong\n")
        store.put(key(at), content(at), f"m{at % 3}")
        if chance.random() < 0.05:
            keys = [k.hex() for k in store._pending]
            store.flush()
            os.write(pipe, f"{' '.join(keys)}\n".encode())


class Writer:
    """A process that writes."""

    def __init__(self, path: Path, seed: int) -> None:
        """Begin, and wait for its first write."""
        self._pipe, told = os.pipe()
        self._process = os.fork()
        if not self._process:
            os.close(self._pipe)
            try:
                write(path, seed, told)
            finally:
                os._exit(1)
        os.close(told)
        self._told = os.read(self._pipe, 1 << 16)
        assert self._told, "the writer failed"

    def kill(self) -> set[bytes]:
        """Kill it and return the keys of its writes."""
        assert os.waitpid(self._process, os.WNOHANG) == (0, 0), "the writer failed"
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        while part := os.read(self._pipe, 1 << 16):
            self._told += part
        os.close(self._pipe)
        assert b"wrong" not in self._told
        whole = self._told[: self._told.rfind(b"\n") + 1].decode()
        return {bytes.fromhex(k) for k in whole.split()}


def main(path: Path, kills: int) -> None:
    """Kill writers of one store, one after another while the others go on, and look at it.

    Raises:
        AssertionError: if anything that was written is not there, or is not what was written.
    """
    chance = random.Random(7)
    writers = [Writer(path, seed) for seed in range(WRITERS)]
    written: set[bytes] = set()
    for seed in range(kills):
        time.sleep(chance.random() * 0.02)
        at = chance.randrange(WRITERS)
        written |= writers[at].kill()
        writers[at] = Writer(path, WRITERS + seed)
    for writer in writers:
        written |= writer.kill()
    base = sqlite3.connect(path)
    assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = dict(base.execute("SELECT key, output FROM outputs").fetchall())
    assert written <= rows.keys()
    assert rows == {key(at): content(at) for at in range(KEYS) if key(at) in rows}
    print(len(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
