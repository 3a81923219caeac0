"""Answers that take long to find: asked of a child process, and kept on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """Return the folder of one kind of answers.

    In the folder that the setting ``SAMULLM_CACHE_DIR`` names, by default the user's cache
    (``XDG_CACHE_HOME``).
    """
    if own := os.environ.get("SAMULLM_CACHE_DIR"):
        return Path(own) / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "samullm" / name


def read_kept(name: str, key: str) -> dict[str, Any] | None:
    """Return a kept answer; None if there is none that can be read."""
    try:
        value = json.loads((cache_folder(name) / f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def keep(name: str, key: str, value: object) -> bool:
    """Keep an answer, whole or not at all; return whether this machine has a place for it."""
    folder = cache_folder(name)
    new = folder / f".{key}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(value), encoding="utf-8")
        new.replace(folder / f"{key}.json")
    except OSError:
        return False
    return True


logger = logging.getLogger(__name__)

_answers: dict[tuple[str, str], Any] = {}


def installed(package: str) -> str | None:
    """Return the version of a package, without importing it; None where it is missing."""
    if find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ask(
    kind: str, script: str, question: str, asked: str, *, limit_s: float, remark: str = ""
) -> Any:
    """Return what a script answers, so that no class of a library stays in this process.

    It prints ``answer`` and JSON; whatever else it does means that it has no answer.

    Args:
        kind: of answers, under which they are kept.
        script: Python; it reads the question.
        question: what is asked.
        asked: library and version: another one may answer otherwise.
        limit_s: seconds that it may take.
        remark: what is said where nobody has asked before.

    Returns:
        None if it has no answer, which is kept as well; also if it could not run, was killed or
        took too long, which is not.
    """
    key = hashlib.sha256(f"{asked} {question}".encode()).hexdigest()[:32]
    if (kind, key) not in _answers:
        kept = read_kept(kind, key)
        if kept is None:
            if remark:
                logger.warning(remark)
            done = _run(script, question, limit_s)
            if done is None:
                return None
            kept = {"answer": done[0]}
            keep(kind, key, kept)
        _answers[kind, key] = kept.get("answer")
    return _answers[kind, key]


def _run(script: str, question: str, limit_s: float) -> tuple[Any] | None:
    """Return the answer of a child process; None if it could not run to its end."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=False, input=question, capture_output=True, text=True, timeout=limit_s,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.info("asking failed: %s", error)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("answer "):
            return (json.loads(line.removeprefix("answer ")),)
    logger.info("it cannot be built: %s", done.stderr[-2000:])
    return None if done.returncode < 0 else (None,)
