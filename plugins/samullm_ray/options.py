"""Options of the executor ``ray``."""

from __future__ import annotations

from pydantic import Field, field_validator
from samullm_vllm.vllm_executor import VllmOptions


class RayOptions(VllmOptions):
    """Options of the executor ``ray``."""

    address: str | None = Field(
        default=None,
        description="Address of the Ray cluster, `auto` for the one this machine belongs to. "
        "Without: a cluster of this machine alone is started and ended with the run.",
    )
    resource: str | None = Field(
        default=None,
        description="Ray resource that counts a machine's devices. Without: GPU where the cluster "
        "has GPUs, else CPU.",
    )
    join_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Machines that do not answer within this time are missing.",
    )
    lost_timeout_s: float = Field(
        default=20.0,
        gt=0,
        description="A machine of which nothing is heard for so long is given up.",
    )
    linger_s: float = Field(
        default=0.05,
        ge=0,
        description="Under load, how long a machine gathers outputs before it answers; longer "
        "where there are more than eight machines.",
    )

    @field_validator("sleep_mode")
    @classmethod
    def _stays_awake(cls, asked: bool) -> bool:
        if asked:
            raise ValueError("engines on other machines cannot be put to sleep; leave it out")
        return asked
