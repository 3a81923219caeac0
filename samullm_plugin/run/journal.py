"""The append-only journal of a run: one JSON object per line.

What is appended is handed to the operating system before :meth:`Journal.append` returns, so the end
of the process loses nothing. It is forced to the disk (fsync) at most ``sync_interval_s`` later and
when the journal is closed, so that the end of the machine loses what was finished in that interval;
those requests simply run again. A last line without its end, left by a crash while writing, is
dropped when the journal is read or opened again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import msgspec

from samullm_plugin.errors import InputError, RunError
from samullm_plugin.files import reread_json, sync_file, to_json

Record = Mapping[str, Any]

_READ_BYTES = 4096


class Journal:
    """Appends records to a file; nothing that was appended is ever changed."""

    def __init__(self, path: Path, *, sync_interval_s: float = 1.0) -> None:
        """Open a journal, new or old.

        Args:
            path: the file.
            sync_interval_s: longest time until what was appended is forced to the disk.
        """
        self.path = path
        self._interval_s = sync_interval_s
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = _whole_lines(self._fd)
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, self._size, os.SEEK_SET)
        self._synced_at = time.monotonic()
        self._dirty = False

    def append(self, records: Iterable[Record]) -> list[int]:
        """Write records; either all of them or none are in the file afterwards.

        Returns:
            Where each of them begins in the file, and then where the last one ends.

        Raises:
            RunError: if the disk is full or fails, with the remedy.
        """
        lines = [to_json(record) + b"\n" for record in records]
        places = list(accumulate(map(len, lines), initial=self._size))
        data = b"".join(lines)
        if not data:
            return places
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            with suppress(OSError):  # a torn line is dropped when the journal is opened again
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise disk_error(self.path, error) from error
        self._size += len(data)
        self._dirty = True
        if time.monotonic() - self._synced_at >= self._interval_s:
            self.sync()
        return places

    def read(self, place: int) -> dict[str, Any]:
        """Return the record that begins at a place, which :meth:`append` returned.

        Raises:
            RunError: if the disk fails, or the file was changed by somebody else.
        """
        return _record_at(self._fd, self.path, place)

    def sync(self) -> None:
        """Force what was appended to the disk.

        Raises:
            RunError: if the disk is full or fails.
        """
        if self._dirty:
            try:
                sync_file(self._fd)
            except OSError as error:
                raise disk_error(self.path, error) from error
            self._dirty = False
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Force everything to the disk and close the file; safe to call twice."""
        if self._fd < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1


class JournalReader:
    """Reads single records of a journal that nobody need be writing.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, place: int) -> dict[str, Any]:
        """Return the record that begins at a place, as :meth:`Journal.read`."""
        return _record_at(self._fd, self._path, place)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def _record_at(fd: int, path: Path, place: int) -> dict[str, Any]:
    data, size = b"", _READ_BYTES
    try:
        while not data.endswith(b"\n"):
            more = os.pread(fd, size, place + len(data))
            if not more:
                raise RunError(f"{path}: was cut short by somebody else during the run")
            data += more[: end + 1] if (end := more.find(b"\n")) >= 0 else more
            size = 16 * _READ_BYTES
        record = reread_json(data)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror}; once it can be, continue with --resume "
            f"{path.parent}"
        ) from error
    except ValueError as error:
        raise RunError(f"{path}: was changed by somebody else during the run") from error
    return dict(record)


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run's journal, without a torn last line.

    Raises:
        InputError: naming the line that is damaged.
    """
    return (record for _, record in _read(path, _wrong))


class FinishedRecord(msgspec.Struct, gc=False):
    """What a resumed run needs of the record of a request that an engine has finished.

    Records of that kind that say more of this (seconds of a call), or are damaged, are none.
    """

    time_s: float
    kind: Literal["finished"]
    node: str
    request: int
    num_tokens: int
    prompt_tokens: int = 0
    finish_reason: str | None = None
    text: str | None = None
    error: str | None = None
    seconds: None = None


Placed = tuple[int, dict[str, Any] | FinishedRecord]
"""Where a record begins in its journal, and the record."""


def read_journal_places(path: Path) -> Iterator[Placed]:
    """Yield where each record of a run's journal begins, and the record, as :func:`read_journal`.

    Most are of finished requests, of which only what they hold in common is read: several times
    faster than all of them as mappings.

    Raises:
        InputError: naming the line that is damaged.
    """
    decode = msgspec.json.Decoder(FinishedRecord).decode
    for place, number, line in _lines(path):
        try:
            if not line.isascii():
                line.decode()  # fields that are passed over are not looked at
            found = decode(line)
            whole = (
                -_LARGEST < found.time_s < _LARGEST
                and -_LARGEST < found.request < _LARGEST
                and -_LARGEST < found.num_tokens < _LARGEST
                and -_LARGEST < found.prompt_tokens < _LARGEST
            )
        except (msgspec.DecodeError, ValueError, RecursionError):
            whole = False
        yield place, found if whole else _record(path, number, line, _wrong)


def _not_an_object(record: object) -> str | None:
    return None if isinstance(record, dict) else "is no JSON object"


def read_appended(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what was appended to a file that is no run's journal, without a torn last line.

    Raises:
        InputError: naming the line that is damaged.
    """
    return (record for _, record in _read(path, _not_an_object))


def _read(
    path: Path, wrong_with: Callable[[Any], str | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for place, number, line in _lines(path):
        yield place, _record(path, number, line, wrong_with)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield place, number from 1 and content of every line that is whole."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield place, number, line
            place += len(line)


def _record(
    path: Path, number: int, line: bytes, wrong_with: Callable[[Any], str | None]
) -> dict[str, Any]:
    """Return the record of a line.

    Raises:
        InputError: if it is damaged.
    """
    try:
        record = reread_json(line)
        wrong = wrong_with(record)
    except ValueError:
        wrong = "is not JSON"
    if wrong is not None:
        raise InputError(
            f"{path} line {number}: {wrong}; the file was damaged after it had been written, and "
            "nothing can be continued from it"
        )
    return dict(record)


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "time_s": (int, float),
    "kind": str,
    "node": str,
    "key": str,
    "reason": str,
    "request": int,
    "num_tokens": int,
    "number": int,
    "stage": int,
    "num_finished": int,
    "busy_s": (int, float),
    "load_s": (int, float),
    "devices": list,
    "parallel": str,
    "interrupted_s": (int, float),
    "plan": dict,
}
"""What the fields of records hold on which others rely."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "engine_started": ("key", "node", "devices", "parallel"),
    "engine_ready": ("key", "node", "load_s"),
    "engine_stopped": ("key", "node", "busy_s", "num_finished"),
    "engine_failed": ("key", "node", "reason"),
    "node_finished": ("node",),
    "finished": ("node", "request", "num_tokens"),
    "failed": ("node", "request"),
    "skipped": ("node", "request"),
    "moved": ("node", "request", "num_tokens"),
    "stage": ("stage", "number"),
    "plan": ("plan",),
    "resumed": ("interrupted_s",),
}
"""Fields that records of a kind must have."""

_TEXTS = ("text", "finish_reason", "error", "request_policy")
"""Fields that hold a text where they are given."""

_LARGEST = 2**62


def _wrong(record: Any) -> str | None:
    """Return what is wrong with a record, or None."""
    if not isinstance(record, dict):
        return "is no record"
    for name in ("time_s", "kind", *_NEEDED.get(str(record.get("kind")), ())):
        value = record.get(name)
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            return f"{name} is missing or wrong"
        if isinstance(value, int | float) and not -_LARGEST < value < _LARGEST:  # nor NaN
            return f"{name} is wrong"
    for name in _TEXTS:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            return f"{name} is wrong"
    return None


def disk_error(path: Path, error: OSError) -> RunError:
    """Return what to tell the user about a write that failed."""
    folder = path.parent.parent if path.parent.name == "outputs" else path.parent
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"{path}: {reason}; what is in the journal is safe: make room and continue "
            f"with --resume {folder}"
        )
    return RunError(
        f"{path}: cannot be written: {reason}; what is in the journal is safe: once it can "
        f"be, continue with --resume {folder}"
    )


def _whole_lines(fd: int) -> int:
    """Return the size of the file up to its last line end."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
