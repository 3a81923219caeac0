"""Where compiled code is kept, and that it is found again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import samullm_plugin
from samullm_plugin.engine import Curve, EngineConfig, StepLatency, Workload, jit, simulate_engine
from samullm_plugin.engine.loop import advance

SCRIPT = """
import logging, numpy as np
logging.basicConfig(format="%(message)s")
from samullm_plugin.engine import records
from samullm_plugin.engine.jit import compiled
from samullm_plugin.engine.kv_cache import fill_pool
blocks = np.zeros(3, records.BLOCK)
fill_pool(blocks)
print(blocks["free_after"].tolist() == [0, 2, 1], compiled.folder)
"""


def test_every_compiled_module_is_part_of_the_key() -> None:
    folder = Path(jit.__file__).parent.parent
    compiled = {
        str(p.relative_to(folder))
        for p in folder.rglob("*.py")
        if re.search(r"^@(compiled|inner)$", p.read_text(), re.MULTILINE)
    }
    assert compiled <= set(jit.COMPILED_MODULES)


def test_unwritable_folders_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert str(tmp_path) not in str(jit.compiled.find_folder())
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    assert jit.compiled.find_folder().parent == tmp_path / "cache"


def test_read_only_installation_uses_the_users_cache(tmp_path: Path) -> None:
    package = Path(samullm_plugin.__file__).parent
    installed = tmp_path / "site" / "samullm_plugin"
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("__pycache__", "data"))
    engine = installed / "engine"
    (engine / "__pycache__").write_text("")  # not a folder: nothing can be kept beside the sources
    environment = {
        **{k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"},
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    right, told = result.stdout.split()
    assert right == "True"
    folder = Path(told)
    assert folder.is_relative_to(tmp_path / "cache")
    assert list(folder.rglob("*fill_pool*.nbi"))


@pytest.mark.parametrize("more", [{}, {"enable_prefix_caching": True}])
@pytest.mark.parametrize("record_steps", [False, True])
def test_the_loop_is_compiled_once_for_every_setting(
    more: dict[str, bool], record_steps: bool
) -> None:
    """A second form of it, for another type of some argument, would take as long again."""
    config = EngineConfig(
        max_num_seqs=2, num_blocks=9, scheduling_policy="priority", async_scheduling=True, **more
    )
    lengths = np.array([4, 9], np.int32)
    workload = Workload(lengths, lengths, arrival_s=np.array([0.5, 0.25]), priority=lengths)
    simulate_engine(
        config, workload, StepLatency(Curve.line(0.004, 1e-5)), record_steps=record_steps
    )
    simulate_engine(EngineConfig(), Workload(lengths, lengths), StepLatency(Curve.line(0.004, 0)))
    assert len(advance.signatures) == 1
