"""Where compiled code is kept, and that it is found again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import samullm_plugin
from samullm_plugin.engine import jit

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
