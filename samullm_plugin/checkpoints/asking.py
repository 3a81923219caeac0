"""Asks a child process what takes a large library to know, and keeps its answer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from samullm_plugin.checkpoints.machine_cache import keep, read_kept

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
