"""Errors with messages a user can act on.

Every one of them ends a command with one message and no traceback: :class:`InputError` with exit
code 2 (the input is wrong), the rest with exit code 1 (the run failed).
"""

from __future__ import annotations


class SamullmError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class InputError(SamullmError):
    """The input is wrong: the message names file, field or line, and the remedy."""

    exit_code = 2


class PluginError(SamullmError):
    """A plugin failed to load, raised, or broke a rule of its interface."""


class PlanError(SamullmError):
    """A plan breaks a rule or cannot finish; the message lists every violation."""


class RunError(SamullmError):
    """A run failed after it had started."""
