"""Plans, problems and results as JSON files that can be read back.

Every file is one object that starts with ``format`` (name and version of the format) and
``written_by``. ``plan.json`` is readable throughout; problems, which are also kept as benchmark
instances, hold long arrays in the compressed form of :mod:`samullm_plugin.planning.arrays`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError
from samullm_plugin.files import read_json, save
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult
from samullm_plugin.planning.records import RecordReader, to_record

PLAN_FORMAT = "samullm-plan-1"
PROBLEM_FORMAT = "samullm-problem-1"
RESULT_FORMAT = "samullm-result-1"


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan and where it comes from.

    Attributes:
        plan: the plan.
        application: name of the application, or file and options by which it was named.
        num_gpus: devices of the cluster it was made for, if known.
        scheduler: who made it.
        provenance: what its predictions rest on, for people, by topic.
        makespan_s: simulated makespan per length scenario.
        lower_bound_s: no plan can be faster, per length scenario.
        fused: by name, the nodes it knows that were fused of several, and those.
    """

    plan: Plan
    application: str
    num_gpus: int | None = None
    scheduler: str = ""
    provenance: Mapping[str, str] | None = None
    makespan_s: tuple[float, ...] = ()
    lower_bound_s: tuple[float, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def write_plan(
    path: Path,
    plan: Plan,
    *,
    application: str,
    num_gpus: int | None = None,
    scheduler: str = "",
    provenance: Mapping[str, str] | None = None,
    makespan_s: Sequence[float] = (),
    lower_bound_s: Sequence[float] = (),
    fused: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write ``plan.json``; the arguments are the fields of :class:`StoredPlan`.

    Raises:
        InputError: if the file cannot be written.
    """
    stored = StoredPlan(
        plan,
        application,
        num_gpus,
        scheduler,
        provenance,
        tuple(map(float, makespan_s)),
        tuple(map(float, lower_bound_s)),
        {name: tuple(parts) for name, parts in (fused or {}).items()},
    )
    _write(path, PLAN_FORMAT, to_record(stored), indent=2)


def read_plan(path: Path) -> StoredPlan:
    """Return a stored plan; devices and nodes are checked only against a problem.

    Raises:
        InputError: naming file, path and what is wrong.
    """
    return RecordReader(str(path)).read(StoredPlan, _read(path, PLAN_FORMAT))


def write_problem(path: Path, problem: Problem) -> None:
    """Write a problem.

    Raises:
        InputError: if the file cannot be written, or an iteration latency cannot be stored.
    """
    _write(path, PROBLEM_FORMAT, to_record(problem), indent=None)


def read_problem(path: Path, step_models: Mapping[str, Any] | None = None) -> Problem:
    """Return a stored problem, checked as a new one is.

    Args:
        path: the file.
        step_models: makes iteration latencies of other types, see
            :class:`~samullm_plugin.planning.records.RecordReader`.

    Raises:
        InputError: naming file, path and what is wrong.
    """
    return RecordReader(str(path), step_models).read(Problem, _read(path, PROBLEM_FORMAT))


def write_result(path: Path, result: PlanResult) -> None:
    """Write a plan with its simulated traces and bounds.

    Raises:
        InputError: if the file cannot be written.
    """
    _write(path, RESULT_FORMAT, to_record(result), indent=None)


def read_result(path: Path) -> PlanResult:
    """Return a stored result.

    Raises:
        InputError: naming file, path and what is wrong.
    """
    return RecordReader(str(path)).read(PlanResult, _read(path, RESULT_FORMAT))


def _write(path: Path, name: str, record: Mapping[str, Any], indent: int | None) -> None:
    """Write a file whole or not at all."""
    head = {"format": name, "written_by": f"samullm-plugin {version('samullm-plugin')}"}
    separators = None if indent else (",", ":")
    text = json.dumps({**head, **record}, indent=indent, separators=separators, allow_nan=False)
    save(path, [text.encode(), b"\n"])


def _read(path: Path, name: str) -> dict[str, Any]:
    """Return the fields of a file of a format."""
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("format"), str):
        raise InputError(f"{path}: format: missing; a file of format {name} is needed")
    found = record.pop("format")
    record.pop("written_by", None)
    if found != name:
        kind, _, wanted = name.rpartition("-")
        if found.startswith(kind + "-"):
            raise InputError(
                f"{path}: format: {found} was written by another release; this one reads version "
                f"{wanted}: make the file again"
            )
        raise InputError(f"{path}: format: {found} instead of {name}")
    return record
