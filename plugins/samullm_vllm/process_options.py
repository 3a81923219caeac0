"""Options of executors whose engines are processes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ProcessOptions(BaseModel):
    """Options of executors whose engines are processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hang_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="An engine without a heartbeat for so long has failed. Must exceed "
        "its longest iteration.",
    )
    load_timeout_s: float = Field(
        default=1800.0, gt=0, description="An engine that is not ready after so long has failed."
    )
    stop_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="An engine that does not report its unfinished requests within this time is "
        "killed; they then continue from the last tokens received.",
    )
    heartbeat_s: float = Field(
        default=0.25, gt=0, description="Seconds between an engine's heartbeats."
    )
