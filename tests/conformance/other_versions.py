"""vLLM's scheduler of versions that are not installed.

It is Python alone: the ``.py`` files of the registry's wheel, unpacked without compiled libraries
before the installed package on the path, and called a CPU build, run as the version itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
_LIMIT_S = 90


class UnavailableError(Exception):
    """The registry cannot be asked, or has no such wheel for this machine."""


def admitted() -> SpecifierSet:
    """Return the versions that ``pyproject.toml`` admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = map(Requirement, project["optional-dependencies"]["vllm"])
    return next(r.specifier for r in found if r.name == "vllm")


def published() -> list[str]:
    """Return the admitted versions that the registry has.

    Raises:
        UnavailableError: saying what pip said.
    """
    text = _pip("index", "versions", "vllm")
    listed = re.search(r"Available versions:(.*)", text)
    if listed is None:
        raise UnavailableError(f"pip lists no versions: {text[-200:]}")
    return list(admitted().filter(v.strip() for v in listed[1].split(",")))


def unpack(version: str, cache: Path) -> Path:
    """Return a folder with the Python files of a version, downloaded once.

    Args:
        version: of vLLM.
        cache: folder that it is kept in.

    Raises:
        UnavailableError: if its wheel cannot be had.
    """
    folder = cache / f"vllm-{version}"
    if folder.is_dir():
        return folder
    _pip(
        "download", "--no-deps", "--only-binary", ":all:", "--dest", str(cache), f"vllm=={version}"
    )
    (wheel,) = cache.glob(f"vllm-{version}-*.whl")
    unfinished = cache / f"vllm-{version}.part"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".py", "METADATA")):
                archive.extract(name, unfinished)
    wheel.unlink()
    (metadata,) = unfinished.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    metadata.write_text(text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    unfinished.rename(folder)
    return folder


def run_with(folder: Path, *options: str) -> str:
    """Run ``python -m tests.conformance`` with the vLLM of a folder; return what it wrote.

    Raises:
        AssertionError: if it found a difference.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance", *options],
        check=False, capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def _pip(*arguments: str) -> str:
    quiet = ("--disable-pip-version-check", "--retries", "0", "--timeout", "10")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments, *quiet],
            check=False, capture_output=True, text=True, timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"pip took more than {_LIMIT_S} s") from None
    if done.returncode:
        raise UnavailableError(f"pip: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
