"""``plan.json``: a plan, what it was made for, and what it was expected to take.

The file is one object that starts with ``format`` (name and version of the format) and
``written_by``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from samullm_plugin.errors import InputError
from samullm_plugin.files import read_json, save
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult
from samullm_plugin.model.types import STORED
from samullm_plugin.records import read_record, to_record

PLAN_FORMAT = "samullm-plan-1"


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A plan and where it comes from.

    Attributes:
        plan: the plan.
        application: name of the application, or file and options by which it was named.
        num_gpus: devices of the cluster it was made for, if known.
        machines: its devices by machine; none if there is only one.
        scheduler: who made it.
        makespan_s: simulated makespan per length scenario.
        lower_bound_s: no plan can be faster, per length scenario.
        fused: by name, the nodes it knows that were fused of several, and those.
        request_policy: the request policy that was chosen with it; None: none was.
        cards: its devices by GPU where engines share some; else none.
    """

    __pydantic_config__ = STORED

    plan: Plan
    application: str
    num_gpus: int | None = None
    machines: tuple[tuple[int, ...], ...] = ()
    scheduler: str = ""
    makespan_s: tuple[float, ...] = ()
    lower_bound_s: tuple[float, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    request_policy: str | None = None
    cards: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        plan: Plan,
        problem: Problem,
        scheduler: str,
        *,
        makespan_s: Iterable[float] = (),
        lower_bound_s: Iterable[float] = (),
        request_policy: str | None = None,
    ) -> StoredPlan:
        """Return a plan of a problem with what its file says of it.

        Args:
            plan: the plan.
            problem: what it is of.
            scheduler: who made it.
            makespan_s: simulated makespan per length scenario.
            lower_bound_s: no plan can be faster, per length scenario.
            request_policy: chosen with it.
        """
        return cls(
            plan,
            problem.app.name,
            problem.cluster.num_gpus,
            problem.cluster.machines_if_several,
            scheduler,
            tuple(map(float, makespan_s)),
            tuple(map(float, lower_bound_s)),
            problem.app.fused,
            request_policy,
            problem.cluster.cards_if_shared,
        )

    @classmethod
    def of_result(cls, result: PlanResult) -> StoredPlan:
        """Return a plan that was just made, with the host's own figures."""
        return cls.of(
            result.plan,
            result.problem,
            result.scheduler,
            makespan_s=result.makespan_s,
            lower_bound_s=result.lower_bound_s,
            request_policy=result.request_policy,
        )


def write_plan(path: Path, stored: StoredPlan) -> None:
    """Write ``plan.json``.

    Raises:
        InputError: if the file cannot be written.
    """
    head = {"format": PLAN_FORMAT, "written_by": f"samullm-plugin {version('samullm-plugin')}"}
    text = json.dumps({**head, **to_record(stored)}, indent=2, allow_nan=False)
    save(path, [text.encode(), b"\n"])


def read_plan(path: Path) -> StoredPlan:
    """Return a stored plan; devices and nodes are checked only against a problem.

    Raises:
        InputError: naming file, path and what is wrong.
    """
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("format"), str):
        raise InputError(f"{path}: format: missing; a file of format {PLAN_FORMAT} is needed")
    found = record.pop("format")
    for note in ("written_by", "provenance"):
        record.pop(note, None)
    if found != PLAN_FORMAT:
        kind, _, wanted = PLAN_FORMAT.rpartition("-")
        if found.startswith(kind + "-"):
            raise InputError(
                f"{path}: format: {found} was written by another release; this one reads version "
                f"{wanted}: make the file again"
            )
        raise InputError(f"{path}: format: {found} instead of {PLAN_FORMAT}")
    return read_record(StoredPlan, record, str(path))
