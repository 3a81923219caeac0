"""The scheduler ``exact``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import InputError, Plan, Problem, StageScheduler, hookimpl
from samullm_plugin.host.interfaces.scheduler import SchedulingContext

LIMITS = {"no-switching": (16, 16), "segments": (5, 8)}
"""By structure, most nodes and most GPUs unless the options say otherwise."""


class ExactOptions(BaseModel):
    """Options of ``exact``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structure: Literal["no-switching", "segments"] = Field(
        "no-switching",
        description="no-switching: every model runs once, in one mode; segments: every model may "
        "be interrupted, moved and resized, in at most max_segments segments.",
    )
    max_segments: int = Field(2, ge=2, le=6, description="Most segments of a model.")
    workers: int = Field(2, ge=1, le=64, description="Threads of the solver.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the solver.")
    time_limit_s: float = Field(
        30.0,
        gt=0,
        description="Seconds for everything. Timing the modes counts, but is not cut short.",
    )
    deterministic_limit: float | None = Field(
        None,
        gt=0,
        description="Limit in the solver's deterministic time, for results that do not depend on "
        "the machine's load.",
    )
    branch_nodes: int = Field(
        60_000_000,
        ge=0,
        description="Most nodes of branch and bound (no-switching): so many for the schedule, and "
        "as many again for the bound of the simulation.",
    )
    simulations: int = Field(
        300,
        ge=0,
        description="Most schedules that are simulated to improve on the work model's, where "
        "models work on each other's outputs (no-switching).",
    )
    ticks: int = Field(20_000, ge=100, description="About as many ticks make up the makespan.")
    max_nodes: int | None = Field(None, ge=1, description="Refuse applications of more nodes.")
    max_gpus: int | None = Field(None, ge=1, description="Refuse clusters of more GPUs.")
    start_from: str | None = Field(
        None, description="Scheduler whose plan is the first solution; else the plan at hand."
    )


class Exact(StageScheduler):
    """Finds a plan of a stated structure and proves how good it is, by constraint programming.

    The optimum of the structure is that of its work model, with durations from the host's own
    simulations; see ``docs/exact.md``.
    """

    name = "exact"
    Config = ExactOptions
    config: ExactOptions

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the best plan of the structure that was found within the limits.

        Raises:
            InputError: if the instance is too large, naming the limit.
        """
        from samullm_cpsat.planning import plan_exactly

        self._check_size("nodes", len(problem.app.nodes), self.config.max_nodes, 0)
        self._check_size("GPUs", problem.cluster.num_gpus, self.config.max_gpus, 1)
        return plan_exactly(problem, context, self.config)

    def _check_size(self, what: str, size: int, limit: int | None, which: int) -> None:
        """Refuse an instance that is too large."""
        structure = self.config.structure
        most = LIMITS[structure][which] if limit is None else limit
        if size > most:
            raise InputError(
                f"scheduler exact: the instance has {size} {what}, and structure {structure} is "
                f"limited to {most}; use scheduler auto, or raise option max_{what.lower()}"
            )


@hookimpl
def register_schedulers(register):  # type: ignore[no-untyped-def]  # typed by the hook
    """Offer ``exact``."""
    register(Exact)
