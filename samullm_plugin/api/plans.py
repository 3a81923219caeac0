"""A plan as Python sees it: figures, stages, charts; and plans of several schedulers compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from samullm_plugin.api.description import Description
from samullm_plugin.app.fields import validate
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import Component, PlannerSection
from samullm_plugin.errors import InputError
from samullm_plugin.model.plan import Plan, Stage
from samullm_plugin.model.result import PlanResult
from samullm_plugin.planning.artifacts import StoredPlan, read_plan, write_plan
from samullm_plugin.planning.instances import Instance, make_instance
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.planning.reporting import provenance_lines, stage_lines, text_gantt
from samullm_plugin.rules.verify import verify
from samullm_plugin.run.known import Known, known_outputs, known_text
from samullm_plugin.run.reuse import NO_REUSE, ReuseOptions
from samullm_plugin.run.rundir import read_facts


@dataclass(frozen=True, slots=True, eq=False)
class AppPlan:
    """A verified plan of an application, with where its figures come from.

    Attributes:
        app: the application.
        loaded: with its tables, as they were read for the plan.
        instance: the planning problem.
        result: the plan and the host's own figures.
        reuse: where outputs of equal requests are looked for.
        known: what was found there; None: nothing.
    """

    app: Description
    loaded: LoadedApplication
    instance: Instance
    result: PlanResult
    reuse: ReuseOptions = NO_REUSE
    known: Known | None = None

    @property
    def plan(self) -> Plan:
        """Return the plan itself."""
        return self.result.plan

    @property
    def scheduler(self) -> str:
        """Return the name of the scheduler that made it."""
        return self.result.scheduler

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return its stages."""
        return self.result.plan.stages

    @property
    def makespan_s(self) -> float:
        """Return the predicted seconds of the run, the mean over the length scenarios."""
        return self.result.mean_makespan_s

    @property
    def lower_bound_s(self) -> float:
        """Return seconds that no plan can beat, the mean over the length scenarios."""
        return float(np.mean(self.result.lower_bound_s))

    @property
    def num_requests(self) -> int:
        """Return the requests of all nodes."""
        return sum(len(n.requests) for n in self.loaded.app.nodes)

    @property
    def rests_on(self) -> list[str]:
        """Return where the predicted times come from, a line per model."""
        return [*provenance_lines(self.instance.problem), *self.instance.problem.app.notes]

    def gantt(self, width: int = 72) -> str:
        """Return a Gantt chart as text, in the first length scenario."""
        return text_gantt(self.result.traces[0], self.instance.problem.cluster, width)

    def save(self, path: str | Path) -> Path:
        """Write the plan as ``plan.json``, for ``samullm run --plan``."""
        target = Path(path)
        write_plan(target, StoredPlan.of_result(self.result))
        return target

    _HEADINGS: ClassVar = ("stage", "node", "spread", "GPUs", "from s", "to s")

    def _rows(self) -> list[tuple[str, ...]]:
        lines = stage_lines(self.result.plan, self.result.traces[0], self.instance.problem.cluster)
        return [
            (
                str(line.stage + 1),
                line.node,
                line.parallel,
                line.devices,
                "" if line.start_s is None else f"{line.start_s:.1f}",
                "" if line.end_s is None else f"{line.end_s:.1f}",
            )
            for line in lines
        ]

    def _title(self) -> str:
        known = known_text(self.known, self.instance.problem)
        return (
            f"{self.loaded.app.name} on {self.instance.problem.cluster.size_text} by "
            f"{self.scheduler}: {self.makespan_s:.1f} s predicted, no plan below "
            f"{self.lower_bound_s:.1f} s" + ("" if known is None else f"; {known}")
        )

    def __repr__(self) -> str:
        """Return the figures in a line and the chart."""
        return f"{self._title()}\n{self.gantt()}"

    def _repr_html_(self) -> str:
        """Return the plan as notebooks show it."""
        table = html_table(self._HEADINGS, self._rows())
        chart = f"<pre style='line-height:1.1'>{escape(self.gantt())}</pre>"
        return f"<p><b>{escape(self._title())}</b></p>{chart}{table}"


def make_app_plan(
    app: Description,
    changes: Mapping[str, Any],
    scheduler_options: Mapping[str, Any] | None,
    gpus: int | None,
    limit: int | None,
    reuse: ReuseOptions,
    executor: Component | None,
    *,
    fused: Mapping[str, Sequence[str]] | None = None,
) -> AppPlan:
    """Plan an application.

    Args:
        app: the application.
        changes: fields of its planner section to replace; None: kept.
        scheduler_options: of the scheduler; None: the application's, if it is the same scheduler.
        gpus: instead of the cluster's.
        limit: rows of each table.
        reuse: where outputs of equal requests are looked for.
        executor: what the plan is for; None: the application's.
        fused: nodes that are one, as a plan knows them; None: planning decides.

    Raises:
        InputError: if the input is wrong.
        PlanError: if no valid plan was found.
    """
    loaded = app.load(limit)
    planner = changed_planner(loaded.planner, changes)
    instance = make_instance(app.host, loaded, planner, gpus=gpus, fused=fused)
    options = planner.scheduler.options if scheduler_options is None else scheduler_options
    how = instance.planning_options(app.host, options)
    part = executor or loaded.executor
    engine = app.host.create("executor", part.type, part.options).engine_version()
    known = known_outputs(reuse, engine, loaded, instance.problem)
    problem = instance.problem if known is None else known.problem
    simulator = instance.simulator(app.host, problem)
    result = make_plan(app.host, problem, planner.scheduler.type, how, simulator=simulator)
    instance = instance.as_planned(result)
    if known is not None:
        known = replace(known, problem=result.problem)
    return AppPlan(app, loaded, instance, result, reuse, known)


def planned_again(app: Description, directory: Path) -> AppPlan:
    """Return a plan on the devices that a run was planned for.

    An application may name none: then they are this machine's, unless the run's plan does not fit
    these, because a number of GPUs was given.
    """
    stored = read_plan(directory / "plan.json")

    def planned(gpus: int | None) -> AppPlan:
        changes = {"scheduler": "max-heuristic"}  # quickly made: only its figures are used
        reuse = ReuseOptions("cache")
        return make_app_plan(app, changes, None, gpus, None, reuse, None, fused=stored.fused)

    wrong: InputError | None = None
    try:
        made = planned(None)
        if made.loaded.cluster is not None or not verify(made.instance.problem, stored.plan):
            return made
    except InputError as error:
        wrong = error
    facts = read_facts(directory)
    gpus = len(facts.get("cards") or ()) or facts.get("num_devices")
    if not isinstance(gpus, int):
        if wrong is not None:
            raise wrong
        return made
    return planned(gpus)


def changed_planner(planner: PlannerSection, changes: Mapping[str, Any]) -> PlannerSection:
    """Return a planner section with other values, checked.

    Raises:
        InputError: naming the field that is wrong.
    """
    given = {n: v for n, v in changes.items() if v is not None}
    same = given.get("scheduler") == planner.scheduler.type
    if same:  # named again: its options stay
        del given["scheduler"]
    kept = {n: getattr(planner, n) for n in planner.model_fields_set}
    return validate(PlannerSection, {**kept, **given}, "app.plan")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Plans of several schedulers for one application, the shortest first.

    Attributes:
        plans: by scheduler.
        failed: by scheduler, why it made no plan.
    """

    plans: Mapping[str, AppPlan]
    failed: Mapping[str, str]

    @property
    def best(self) -> AppPlan:
        """Return the plan of the shortest predicted makespan."""
        return next(iter(self.plans.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per scheduler."""
        return [
            {
                "scheduler": name,
                "makespan_s": plan.makespan_s,
                "over_best": plan.makespan_s / self.best.makespan_s - 1.0,
                "optimality_gap": plan.result.gap,
                "planning_s": plan.result.planning_s,
                "idle_share": plan.result.traces[0].idle_share,
                "stages": len(plan.stages),
                "status": plan.result.status.value,
            }
            for name, plan in self.plans.items()
        ]

    def to_arrow(self) -> Any:
        """Return the rows as a ``pyarrow.Table``."""
        import pyarrow as pa

        return pa.Table.from_pylist(self.rows())

    def to_pandas(self) -> Any:
        """Return the rows as a data frame."""
        return self.to_arrow().to_pandas()

    def _cells(self) -> list[Sequence[str]]:
        made: list[Sequence[str]] = [
            (
                r["scheduler"],
                f"{r['makespan_s']:.1f}",
                f"+{100 * r['over_best']:.1f} %",
                f"{100 * r['optimality_gap']:.0f} %",
                f"{r['planning_s']:.1f}",
                f"{100 * r['idle_share']:.0f} %",
            )
            for r in self.rows()
        ]
        return made + [(n, f"no plan: {why}", "", "", "", "") for n, why in self.failed.items()]

    _COLUMNS: ClassVar = ("scheduler", "makespan s", "over best", "gap", "planning s", "idle")

    def __repr__(self) -> str:
        """Return the table as text."""
        rows = [self._COLUMNS, *self._cells()]
        plain = [r for r in rows if not r[1].startswith("no plan")]
        widths = [max(len(r[k]) for r in plain) for k in range(len(self._COLUMNS))]
        return "\n".join(
            "  ".join(
                c.rjust(w) if k else c.ljust(w)
                for k, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        )

    def _repr_html_(self) -> str:
        return html_table(self._COLUMNS, self._cells())


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for notebooks."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
