"""Outputs of finished requests by content, kept in the user's cache folder for later runs.

One SQLite file in write-ahead mode: runs side by side read and write it, and a process that is
killed leaves it as its last commit did. Nothing in a run depends on it: where it cannot be opened
or written, the run goes on without, and says so.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from samullm_plugin.errors import InputError
from samullm_plugin.host.settings import read_settings

logger = logging.getLogger(__name__)

COMMIT_EVERY_S = 1.0
BUSY_S = 30.0
"""Seconds to wait for another process's commit."""

_FORMAT = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS outputs (
    key BLOB PRIMARY KEY, output BLOB NOT NULL, model TEXT NOT NULL, used_s INTEGER NOT NULL
) WITHOUT ROWID
"""


def store_path() -> Path:
    """Return where outputs are kept: ``SAMULLM_OUTPUT_STORE``, else in the user's cache folder."""
    given = read_settings().output_store
    if given is not None:
        return given
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "samullm" / "outputs.sqlite"


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store holds.

    Attributes:
        path: its file.
        outputs: by model, how many.
        file_bytes: size of the file, with what is not yet merged into it.
        oldest_s: when the output that was not used for longest was used, seconds since 1970.
    """

    path: Path
    outputs: dict[str, int]
    file_bytes: int
    oldest_s: int | None


class OutputStore:
    """The stored outputs, open in one process.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open the store.

        Args:
            path: its file.
            create: make one if there is none.

        Raises:
            InputError: if it cannot be opened or is no store.
        """
        self.path = path
        self._pending: dict[bytes, tuple[bytes, str]] = {}
        self._used: set[bytes] = set()
        self._committed_s = time.monotonic()
        if not create and not path.exists():
            raise InputError(f"{path}: there is no store of outputs yet")
        with self._faults("cannot be opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _FORMAT):
                raise InputError(
                    f"{path}: its format is {version}, this version reads {_FORMAT}; remove the "
                    "file, or name another by SAMULLM_OUTPUT_STORE"
                )
            self._base.execute(_TABLE)
            self._base.execute("CREATE INDEX IF NOT EXISTS by_model ON outputs (model)")
            if not version:
                self._base.execute(f"PRAGMA user_version={_FORMAT}")

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turn the library's errors into ones that name file and remedy."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"{self.path}: the store of outputs {what}: {error}; remove the file if it is "
                "damaged, name another by SAMULLM_OUTPUT_STORE, or run with --reuse off"
            ) from error

    def __enter__(self) -> Self:
        """Return the store, closed at the end of the context."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is pending and close."""
        self.close()

    def get(self, key: bytes) -> bytes | None:
        """Return a stored output, or None.

        Raises:
            InputError: if the file cannot be read.
        """
        if key in self._pending:
            return self._pending[key][0]
        with self._faults("cannot be read"):
            row = self._base.execute("SELECT output FROM outputs WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        self._used.add(key)
        return bytes(row[0])

    def has_any(self, models: Iterable[str]) -> bool:
        """Return whether there is an output of one of some models; a guess if it cannot be read."""
        query = "SELECT 1 FROM outputs WHERE model = ? LIMIT 1"
        try:
            return any(self._base.execute(query, (m,)).fetchone() for m in set(models))
        except sqlite3.Error:
            return True

    def put(self, key: bytes, output: bytes, model: str) -> None:
        """Keep an output; it is in the file at most a second later, or after :meth:`flush`."""
        self._pending[key] = output, model
        if time.monotonic() - self._committed_s >= COMMIT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in one transaction.

        Raises:
            InputError: if the file cannot be written.
        """
        self._committed_s = time.monotonic()
        if not self._pending and not self._used:
            return
        now_s = int(time.time())
        pending, self._pending = self._pending, {}
        used, self._used = self._used, set()
        with self._faults("cannot be written"):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany(
                    "INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?)",
                    [(k, value, model, now_s) for k, (value, model) in pending.items()],
                )
                self._base.executemany(
                    "UPDATE outputs SET used_s = ? WHERE key = ?", [(now_s, k) for k in used]
                )
                self._base.execute("COMMIT")
            except BaseException:
                self._base.execute("ROLLBACK")
                raise

    def figures(self) -> StoreFigures:
        """Return what the store holds."""
        with self._faults("cannot be read"):
            rows = self._base.execute("SELECT model, COUNT(*) FROM outputs GROUP BY model")
            outputs = {str(m): int(n) for m, n in rows}
            oldest = self._base.execute("SELECT MIN(used_s) FROM outputs").fetchone()[0]
        files = [self.path, *(Path(f"{self.path}{end}") for end in ("-wal", "-shm"))]
        size = sum(f.stat().st_size for f in files if f.exists())
        return StoreFigures(self.path, outputs, size, oldest)

    def prune(self, *, older_s: float | None = None, model: str | None = None) -> int:
        """Remove outputs and give their space back; return how many.

        Args:
            older_s: those not used for so many seconds; None: whenever.
            model: those of this model; None: of all.
        """
        conditions, values = ["1"], list[object]()
        if older_s is not None:
            conditions.append("used_s < ?")
            values.append(time.time() - older_s)
        if model is not None:
            conditions.append("model = ?")
            values.append(model)
        with self._faults("cannot be written"):
            query = f"DELETE FROM outputs WHERE {' AND '.join(conditions)}"
            count = self._base.execute(query, values).rowcount
            self._base.execute("VACUUM")
            self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def close(self) -> None:
        """Write what is pending and let go of the file; safe to call twice."""
        try:
            self.flush()
        finally:
            self._base.close()
