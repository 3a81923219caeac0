"""Errors with messages a user can act on.

Every one of them ends a command with one message and no traceback: :class:`InputError` with exit
code 2 (the input is wrong), the rest with exit code 1 (the run failed).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Protocol


class SamullmError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class InputError(SamullmError):
    """The input is wrong: the message names file, field or line, and the remedy."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name stands for nothing; the message lists what there is."""


class MissingExtraError(InputError):
    """Something needs a package that only an extra installs.

    Args:
        what: what needs it, such as ``executor vllm``.
        package: what cannot be imported.
        extra: the extra of this distribution that installs it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        """Word the message with the command that helps."""
        super().__init__(
            f"{what} needs {package}, which is not installed: pip install 'samullm-plugin[{extra}]'"
        )


class PluginError(SamullmError):
    """A plugin failed to load, raised, or broke a rule of its interface."""


class PlanError(SamullmError):
    """A plan breaks a rule or cannot finish; the message lists every violation."""


class OutOfTimeError(SamullmError):
    """A scheduler that another one asked had no plan when its time was up."""


class RunError(SamullmError):
    """A run failed after it had started."""


class Reject(Exception):
    """Raised by a user's function: this row will not do. The message says why."""


class _Findings(Protocol):
    """What is used of pydantic's ``ValidationError``, which rooms below do not import."""

    def errors(self, *, include_url: bool, include_context: bool) -> Sequence[Any]:
        """Return one mapping per finding."""


def describe_validation(error: _Findings) -> str:
    """Return pydantic's findings as one line: ``field.path: what is wrong; ...``."""
    findings = []
    for item in error.errors(include_url=False, include_context=False):
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown field"
        elif item["type"] == "missing":
            message = "missing"
        elif isinstance(item["input"], str | int | float | bool | None):
            message += f", not {item['input']!r}"
        findings.append(f"{path}: {message}" if path else message)
    return "; ".join(findings)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for names close to ``name``, or nothing."""
    close = get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
