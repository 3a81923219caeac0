"""What a run was expected to do, kept in its directory from the start: ``planned.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from samullm_plugin.errors import SamullmError
from samullm_plugin.files import read_json
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.interfaces.length import LengthEstimator
from samullm_plugin.model.application import Application, ModelNode, PythonNode
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import EngineSegment, PlanTrace
from samullm_plugin.planning.reporting import provenance_lines
from samullm_plugin.records import read_record, to_record

FORECAST_FILE = "planned.json"


@dataclass(frozen=True, slots=True)
class ForecastNode:
    """A node of the application as its user wrote it.

    Attributes:
        name: its name.
        model: name of its model.
        num_requests: rows of its request table.
        fused: node of the plan that it has become a part of; empty: it is a node of the plan.
        finish_s: when its last request was to finish; None: not recorded.
        hidden_calls: of a Python node, how many of its first requests are calls whose values the
            rows behind them hold; None: it has a model.
    """

    name: str
    model: str
    num_requests: int
    fused: str = ""
    finish_s: float | None = None
    hidden_calls: int | None = None

    @property
    def served_as(self) -> str:
        """Return the node of the plan whose engines serve it."""
        return self.fused or self.name


@dataclass(frozen=True, slots=True)
class ForecastTrace:
    """What the simulation of the first plan said, but for single requests.

    Attributes:
        makespan_s: when the last request was to finish.
        segments: engines in order of their start.
        stage_start_s: when each stage was to begin.
        idle_share: share of device seconds without an iteration.
    """

    makespan_s: float
    segments: tuple[EngineSegment, ...]
    stage_start_s: tuple[float, ...]
    idle_share: float


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """A run as it was foreseen when it began.

    Attributes:
        nodes: as their user wrote them, in the plan's order.
        gpus: kind of each device.
        trace: the first plan's simulation.
        rests_on: what the figures come from, lines for people by topic.
        virtual_clock: the executor's time is computed; nothing really ran.
        modelled_lengths: output lengths were drawn and not generated.
        written_by: release that began the run.
    """

    nodes: tuple[ForecastNode, ...]
    gpus: tuple[str, ...]
    trace: ForecastTrace
    rests_on: Mapping[str, tuple[str, ...]]
    virtual_clock: bool
    modelled_lengths: bool
    written_by: str


def forecast_nodes(app: Application, trace: PlanTrace | None) -> tuple[ForecastNode, ...]:
    """Return the nodes as their user wrote them.

    Args:
        app: as it is planned, with fused nodes.
        trace: its plan, simulated; None: unknown.
    """
    return tuple(
        ForecastNode(
            part.name,
            "" if isinstance(node, PythonNode) else node.model.name,
            len(part),
            node.name if isinstance(node, ModelNode) and node.fused else "",
            None if trace is None else float(trace.finish_s[i][part.rows].max()),
            node.hidden_calls if isinstance(node, PythonNode) else None,
        )
        for i, node in enumerate(app.all_nodes)
        for part in node.parts
    )


def forecast_run(
    problem: Problem,
    trace: PlanTrace,
    executor: Executor,
    estimator: LengthEstimator | None,
) -> Forecast:
    """Return what is foreseen of a run.

    Args:
        problem: the instance.
        trace: its plan, simulated.
        executor: what will run it.
        estimator: where the lengths come from; None: they were given with the application.
    """
    names = dict.fromkeys(n.model.name for n in problem.app.nodes)
    rests_on = {
        "Output lengths": tuple(_length_source(estimator, name) for name in names)
        if estimator is not None
        else ("given with the application",),
        "Iteration latencies": tuple(provenance_lines(problem)),
    }
    if problem.app.notes:
        rests_on["Assumed"] = tuple(problem.app.notes)
    return Forecast(
        forecast_nodes(problem.app, trace),
        problem.cluster.kinds,
        ForecastTrace(trace.makespan_s, trace.segments, trace.stage_start_s, trace.idle_share),
        rests_on,
        executor.virtual_clock,
        type(executor).imitate is not Executor.imitate,
        f"samullm-plugin {version('samullm-plugin')}",
    )


def forecast_record(planned: Forecast) -> object:
    """Return what is written to ``planned.json``."""
    return to_record(planned)


def read_forecast(directory: Path) -> Forecast | None:
    """Return what was foreseen of a run; None for runs of releases that did not write it.

    Raises:
        InputError: if the file is damaged.
    """
    path = directory / FORECAST_FILE
    if not path.exists():
        return None
    return read_record(Forecast, read_json(path), str(path))


def _length_source(estimator: LengthEstimator, model: str) -> str:
    try:
        return estimator.source(model)
    except SamullmError:  # a third party's words are not worth a run
        return f"{model}: {estimator.name} does not say"
