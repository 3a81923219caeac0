"""Fake distributions: folders with a dist-info and modules, as pip would leave them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest

from samullm_plugin.host.manager import PluginHost

Install = Callable[..., None]
Load = Callable[..., PluginHost]

SCHEDULER = """
    from samullm_plugin import StageScheduler, hookimpl
    from pydantic import BaseModel, Field

    class Options(BaseModel):
        width: int = Field(default=4, ge=1)
        nested: dict[str, int] = {{}}

    class Mine(StageScheduler):
        '''Schedules nothing.'''
        name = "{name}"
        Config = Options
        def schedule(self, problem, context):
            raise NotImplementedError

    @hookimpl
    def register_schedulers(register):
        register(Mine)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty site-packages folder on the import path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    """Install a fake distribution with one module per entry point."""

    def write(distribution: str, version: str = "1.0", **sources: str) -> None:
        stem = distribution.replace("-", "_").replace(".", "_")
        info = site / f"{stem}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = ["[samullm]"]
        for entry, source in sources.items():
            module = f"{stem}_{entry}"
            (site / f"{module}.py").write_text(dedent(source))
            lines.append(f"{entry} = {module}")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()

    return write


@pytest.fixture
def load(site: Path) -> Load:
    """Return a host that loads what was installed."""

    def make(**options: object) -> PluginHost:
        points = [p for d in metadata.distributions(path=[str(site)]) for p in d.entry_points]
        return PluginHost(points, **options)  # type: ignore[arg-type]  # checked by the host

    return make


@pytest.fixture
def scheduler() -> Callable[[str], str]:
    """Return the source of a plugin with one scheduler of a name."""
    return lambda name: SCHEDULER.format(name=name)
