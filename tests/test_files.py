"""Files: one bad line costs one line, and what can be written is written."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.files import parse_json, read_rows, replace_file, save, to_json

LINES = b'{"id": "a", "prompt": "x"}\n{"id": "b"}\n'


def rows(path: Path, data: bytes) -> list[tuple[int, dict[str, object], str | None]]:
    path.write_bytes(data)
    return [(r.number, dict(r.value), r.error) for r in read_rows(path, "requests")]


@pytest.mark.parametrize(
    "character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\u00a0"]
)
def test_lines_end_at_newlines_only(tmp_path: Path, character: str) -> None:
    raw = json.dumps({"prompt": f"a{character}b"}, ensure_ascii=character < " ")
    found = rows(tmp_path / "r", (raw + "\n" + '{"prompt": "c"}').encode())
    assert [v["prompt"] for _, v, _ in found] == [f"a{character}b", "c"]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \t\r\n"])
def test_marks_and_line_ends_are_passed_over(tmp_path: Path, start: bytes, end: bytes) -> None:
    found = rows(tmp_path / "r", start + LINES.replace(b"\n", end))
    assert [(v["id"], e) for _, v, e in found] == [("a", None), ("b", None)]


def test_packed_files_are_known_by_their_content(tmp_path: Path) -> None:
    import pyarrow

    expected = rows(tmp_path / "r", LINES)
    packed = gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])
    assert rows(tmp_path / "r.jsonl", packed) == expected
    zstd = pyarrow.compress(LINES, codec="zstd", asbytes=True)
    assert rows(tmp_path / "z.jsonl", zstd) == expected
    many = b"".join(b'{"id": %d}\n' % i for i in range(100_000))
    zstd = pyarrow.compress(many, codec="zstd", asbytes=True)
    assert [v["id"] for _, v, _ in rows(tmp_path / "z", zstd)] == list(range(100_000))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "must be a JSON object, not list"),
        (b"7", "must be a JSON object, not int"),
        (b'{"a": ', "is not JSON: EOF while parsing a value at column 5"),
        (b'{"a": "\xff"}', "is not JSON: invalid unicode code point"),
        (b'{"a": "\\ud800"}', "holds half of a UTF-16 pair"),
        (b'{"a": "\\udc00x"}', "holds half of a UTF-16 pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: number out of range"),
        (b'{"a": ' + b"[" * 5000, "is not JSON: recursion limit exceeded"),
        (b"\x00\x00", "is not JSON"),
    ],
)
def test_a_bad_line_costs_that_line(tmp_path: Path, line: bytes, message: str) -> None:
    found = rows(tmp_path / "r", b'{"id": 1}\n' + line + b'\n{"id": 3}\n')
    assert [n for n, _, _ in found] == [1, 2, 3]
    assert found[0][1:] == ({"id": 1}, None)
    assert found[2][1:] == ({"id": 3}, None)
    assert message in str(found[1][2])
    assert found[1][1] == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "there is no such requests file"),
        ("\ufeff{}".encode("utf-16-le"), "is UTF-16; write it as UTF-8"),
        (gzip.compress(LINES * 100, mtime=0)[:-12], "the gzip file is damaged"),
        (gzip.compress(LINES, mtime=0)[:12] + b"\xff" * 30, "damaged"),
        (b"\x28\xb5\x2f\xfd" + b"\x00" * 50, "cannot be read"),
    ],
    ids=["missing", "utf-16", "gzip-cut", "gzip-damaged", "zstd-damaged"],
)
def test_unreadable_files_are_named(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "r"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        list(read_rows(path, "requests"))
    assert str(path) in str(error.value)


def test_numbers_that_json_lacks_are_read_and_written_as_null() -> None:
    value = parse_json(b'{"a": NaN, "b": -Infinity, "c": 123456789012345678901234567890}')
    assert value["c"] == 123456789012345678901234567890
    assert json.loads(to_json(value)) == {"a": None, "b": None, "c": value["c"]}


def test_what_can_be_written_is_written() -> None:
    import numpy as np

    value = {"id": "\ud800", "n": np.arange(2), "x": (float("inf"), 1.5, None, True), 3: Path("a")}
    assert json.loads(to_json(value)) == {
        "id": "\ud800", "n": [0, 1], "x": [None, 1.5, None, True], "3": "a",
    }  # fmt: skip
    assert to_json({"a": "\u2028é"}) == '{"a":"\u2028é"}'.encode()
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        to_json({"a": "\ud800", "b": object()})


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def parts() -> object:
        yield b"new"
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError):
        replace_file(path, parts())  # type: ignore[arg-type]  # a generator of bytes, then nothing
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]
    (tmp_path / "link").symlink_to(path)
    replace_file(tmp_path / "link", [b"new"], sync=True)
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(InputError, match=r"/dev/full: cannot be written: No space left on device"):
        save(Path("/dev/full"), [b"x"])
    with pytest.raises(InputError, match="Is a directory"):
        save(tmp_path, [b"x"])
