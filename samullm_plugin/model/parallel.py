"""How one model is spread over devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from samullm_plugin.errors import InputError
from samullm_plugin.model.types import STORED


@dataclass(frozen=True, slots=True, order=True)
class ParallelConfig:
    """Data-, tensor- and pipeline-parallel sizes of one model (vLLM's names).

    Attributes:
        data_parallel_size: independent engine replicas.
        tensor_parallel_size: devices that share each layer of a replica.
        pipeline_parallel_size: groups of layers of a replica.
    """

    __pydantic_config__ = STORED

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below one.

        Raises:
            InputError: naming the field.
        """
        for name in ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def devices_per_replica(self) -> int:
        """Return the devices one replica occupies."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_devices(self) -> int:
        """Return the devices all replicas occupy."""
        return self.data_parallel_size * self.devices_per_replica

    def replicas(self, devices: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield the devices of each replica: they are given replica after replica."""
        size = self.devices_per_replica
        for first in range(0, len(devices), size):
            yield tuple(devices[first : first + size])

    def __str__(self) -> str:
        """Return a short form such as ``dp2xtp4``."""
        text = f"dp{self.data_parallel_size}xtp{self.tensor_parallel_size}"
        pp = self.pipeline_parallel_size
        return text if pp == 1 else f"{text}xpp{pp}"
