"""Options of the scheduler ``exact``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
