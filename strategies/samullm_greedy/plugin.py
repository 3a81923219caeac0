"""Registers the paper's greedy stage scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from samullm_greedy.search import Greedy
from samullm_greedy.throughput import Objective, WorkMeter
from samullm_plugin import Plan, Problem, StageScheduler, hookimpl
from samullm_plugin.host.interfaces.scheduler import SchedulingContext


class GreedyOptions(BaseModel):
    """Options of ``greedy``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preemption: bool = Field(
        default=True,
        description="a started model may be resized or paused; false: it keeps its configuration",
    )
    objective: Objective = Field(
        default="paper",
        description="paper: model FLOPs, all experts and recomputed tokens counted; corrected: "
        "active experts, each token once; tokens: tokens, each once",
    )


class GreedyScheduler(StageScheduler):
    """The greedy of SamuLLM (arXiv 2503.16893, section 4).

    A stage is grown from nothing: of all ready models and configurations, and of all larger
    configurations of models in the stage, the step with the largest gain in throughput per added
    GPU is taken, until none gains anything. Throughput is useful work until the first of the
    stage's models finishes, over the stage's time, engine starts included. There the stage ends;
    unfinished models compete again in the next.
    """

    name: ClassVar[str] = "greedy"
    Config: ClassVar[type[BaseModel]] = GreedyOptions

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the greedy plan; with several length scenarios, gains are averaged over them.

        Raises:
            InputError: if a model's architecture is not known and the objective counts FLOPs.
        """
        options = self.config
        assert isinstance(options, GreedyOptions)
        simulator = context.simulator.coarse()
        meter = WorkMeter(simulator.problem, options.objective, simulator.alike)
        search = Greedy(
            simulator.problem,
            simulator,
            meter,
            preemption=options.preemption,
            give_up_s=context.give_up_s,
        )
        plan = search.plan()
        context.report.explanation.update(search.reasons)
        return plan


@hookimpl
def register_schedulers(register: Callable[[type[StageScheduler]], None]) -> None:
    """Offer ``greedy``."""
    register(GreedyScheduler)
