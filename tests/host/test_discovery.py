"""Broken metadata of one distribution affects that one only, and is reported."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from samullm_plugin.host.discovery import installed_plugins
from samullm_plugin.host.manager import PluginHost

FILES = {
    "leftover": (None, b"[samullm]\nleft = odd_plug\n"),
    "garb": (b"Metadata-Version: 2.1\nName: garb\nVersion: 1.0\n", b"[samullm]\nno entry\nx = \n"),
    "binary": (b"Metadata-Version: 2.1\nName: bin\nVersion: 1.0\n", b"\xff\xfe[samullm]\n"),
    "others": (None, b"[console_scripts]\nno entry\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_metadata(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, points = FILES[name]
    folder = tmp_path / f"{name}-1.0.dist-info"
    folder.mkdir()
    if head is not None:
        (folder / "METADATA").write_bytes(head)
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


def test_the_first_distribution_of_a_name_counts_and_others_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, folder in (("a", "two_plugs"), ("b", "Two.Plugs"), ("c", "renamed"), ("b", "plain")):
        info = tmp_path / place / f"{folder}-1.0.dist-info"
        info.mkdir(parents=True)
        name = "two-plugs" if folder == "renamed" else folder
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if folder != "plain":
            (info / "entry_points.txt").write_text(f"[samullm]\np = in_{place}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / place) for place in "abc"])
    read: list[str] = []
    real = metadata.Distribution.metadata.fget

    def noted(distribution: metadata.Distribution) -> object:
        read.append(distribution._path.name)  # type: ignore[attr-defined]  # of those in folders
        return real(distribution)

    monkeypatch.setattr(metadata.Distribution, "metadata", property(noted))
    assert [p.module for p in installed_plugins() if isinstance(p, EntryPoint)] == ["in_a"]
    assert set(read) == {"two_plugs-1.0.dist-info", "renamed-1.0.dist-info"}
