"""Files: JSON and JSON lines in, whole files or none out. Every room reads and writes by this."""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import pydantic_core

from samullm_plugin.errors import InputError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks."""

_BLANK = b" \t\r\n"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.ENOSYS)
"""What file systems and devices answer that cannot force data to a disk."""


# --- reading ---


class Row(NamedTuple):
    """One line of a JSON lines file.

    Attributes:
        number: of the line, from 1.
        value: its object; empty if it is none.
        error: why it cannot be used; None if it can.
        line: as it is written.
    """

    number: int
    value: Mapping[str, Any]
    error: str | None = None
    line: bytes = b""


def read_rows(path: Path, what: str) -> Iterator[Row]:
    r"""Yield the objects of a JSON lines file, one row at a time.

    Lines end at ``\n`` and nowhere else: U+2028, U+2029 and U+0085 may stand raw inside JSON
    strings. ``\r`` before it, a byte order mark and empty lines are passed over; gzip and zstd are
    unpacked, whatever the file is called. What is wrong with one line is that row's ``error``.

    Args:
        path: the file.
        what: what it holds, for messages, such as ``requests``.

    Raises:
        InputError: if the file as a whole cannot be read.
    """
    with _opened(path, what) as file:
        for number, line in enumerate(file, start=1):
            row = line.removeprefix(_BOM) if number == 1 else line
            if number == 1 and row[:2] in UTF_16:
                raise InputError(f"{path}: is UTF-16; write it as UTF-8")
            if not (row := row.strip(_BLANK)):
                continue
            try:
                value = parse_json(row)
            except ValueError as error:
                hint = ""
                if number == 1 and row.startswith(b"["):
                    hint = " (an array over several lines?)"
                reason = f"is not JSON: {error}; each line must be one JSON object{hint}"
                yield Row(number, {}, reason)
                continue
            if isinstance(value, dict):
                yield Row(number, value, None, row)
            else:
                hint = "; write one object a line" if isinstance(value, list) else ""
                yield Row(number, {}, f"must be a JSON object, not {type(value).__name__}{hint}")


def good_rows(path: Path, what: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where each row stands, and its object.

    Raises:
        InputError: if the file cannot be read, or at its first bad row.
    """
    for row in read_rows(path, what):
        if row.error is not None:
            raise InputError(f"{path} line {row.number}: {row.error}")
        yield f"{path} line {row.number}", row.value


def parse_json(text: bytes) -> Any:
    """Return a JSON value; numbers may be NaN or infinite, integers of any size.

    Raises:
        ValueError: saying what is wrong and at which column.
    """
    try:
        return pydantic_core.from_json(text)
    except ValueError as error:
        message = str(error).replace(" at line 1 column ", " at column ")
        with suppress(ValueError, RecursionError):
            json.loads(text)  # Python's own reader takes halves of UTF-16 pairs
            message = "holds half of a UTF-16 pair, such as \\ud800, which is no character"
        raise ValueError(message) from error


DEEPEST = 100
"""Levels that a value may be nested: half of what can be written as JSON and read again."""


def is_too_deep(value: object) -> bool:
    """Return whether lists and mappings are nested more than :data:`DEEPEST` levels."""
    level: list[object] = [value]
    for _ in range(DEEPEST + 1):
        inside: list[object] = []
        for one in level:
            if isinstance(one, Mapping):
                inside += one.values()
            elif isinstance(one, list | tuple):
                inside += one
        if not inside:
            return False
        level = inside
    return True


def reread_json(text: bytes) -> Any:
    """Return a value that :func:`to_json` has written, halves of UTF-16 pairs and deep ones too.

    Raises:
        ValueError: saying what is wrong and at which column.
    """
    try:
        return pydantic_core.from_json(text)
    except ValueError:
        with suppress(ValueError, RecursionError):
            return json.loads(text)
        return parse_json(text)


def read_json(path: Path, missing: str = "there is no such file") -> Any:
    """Return the value a JSON file holds.

    Args:
        path: the file.
        missing: what to say if it is not there.

    Raises:
        InputError: naming the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: {missing}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return pydantic_core.from_json(data.removeprefix(_BOM))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}") from error


@contextmanager
def _opened(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Have a file open for reading, unpacked."""
    try:
        with path.open("rb") as file:
            packed = file.read(4)
            file.seek(0)
            if packed.startswith(_GZIP):
                import gzip

                with gzip.open(file) as unpacked:
                    yield unpacked  # type: ignore[misc]  # reads bytes as any other file
            elif packed == _ZSTD:
                with _zstd(file) as unpacked:
                    yield unpacked
            else:
                yield file
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such {what} file") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error


@contextmanager
def _zstd(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Unpack zstd."""
    import io

    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
        yield io.BufferedReader(stream)


def arrow_input(path: Path) -> Any:
    """Return a file for pyarrow to read, which itself takes no names that are not UTF-8.

    Raises:
        OSError: if it cannot be opened.
    """
    import pyarrow as pa

    return pa.memory_map(os.fsencode(path))


# --- writing ---


def arrow_output(path: Path) -> Any:
    """Return a new file for pyarrow to write, which itself takes no names that are not UTF-8.

    Raises:
        OSError: if it cannot be made.
    """
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path), "wb")


def to_json(value: object, *, indent: int | None = None) -> bytes:
    """Return a value as JSON; what JSON or UTF-8 lacks does not stop it.

    Numbers that are infinite or none become null, halves of surrogate pairs are written as escapes,
    numpy values as lists and numbers.

    Raises:
        TypeError: for objects that have no JSON form.
    """
    try:
        return pydantic_core.to_json(value, indent=indent, inf_nan_mode="null", fallback=_plain)
    except pydantic_core.PydanticSerializationError:
        plain = pydantic_core.to_jsonable_python(value, inf_nan_mode="null", fallback=_plain)
        separators = (",", ": ") if indent else (",", ":")
        return json.dumps(plain, indent=indent, separators=separators).encode()


def _plain(value: Any) -> object:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def replace_file(path: Path, parts: Iterable[bytes], *, sync: bool = False) -> None:
    """Write a file in one step: readers see the old or the new content, never half of it.

    Args:
        path: the file; devices and pipes are written to as they are.
        parts: its content.
        sync: force it to the disk.

    Raises:
        OSError: if it cannot be written; the old content is still there.
    """
    if path.is_symlink():
        path = path.resolve()
    if _is_special(path):
        with path.open("wb") as file:
            file.writelines(parts)
        return
    draft = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.writelines(parts)
            file.flush()
            if sync:
                sync_file(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def save(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file the user asked for, in one step.

    Raises:
        InputError: if it cannot be written, naming it.
    """
    try:
        replace_file(path, parts)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def sync_file(descriptor: int) -> None:
    """Force a file's content to the disk, where its file system can.

    Raises:
        OSError: if the disk is full or fails.
    """
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _is_special(path: Path) -> bool:
    """Return whether something is there that is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
