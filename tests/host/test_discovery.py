"""Broken metadata of one distribution affects that one only, and is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from samullm_plugin.host.manager import PluginHost

FILES = {
    "leftover": (None, b"[samullm]\nleft = odd_plug\n"),
    "garb": (b"Metadata-Version: 2.1\nName: garb\nVersion: 1.0\n", b"[samullm]\nno entry\nx = \n"),
    "binary": (b"Metadata-Version: 2.1\nName: bin\nVersion: 1.0\n", b"\xff\xfe[samullm]\n"),
    "others": (None, b"[console_scripts]\nno entry\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_metadata(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, points = FILES[name]
    folder = tmp_path / f"{name}-1.0.dist-info"
    folder.mkdir()
    if metadata is not None:
        (folder / "METADATA").write_bytes(metadata)
    (folder / "entry_points.txt").write_bytes(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    host = PluginHost.from_settings()
    assert host.resolve("scheduler", "greedy").value is not None
    failed = host.failures()
    if name == "others":
        assert failed == []
        return
    (row,) = failed
    assert "its metadata cannot be read" in row.reason
    assert str(folder) in row.reason
