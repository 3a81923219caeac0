"""A plan: which models run together, spread how, on which devices, until what happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from samullm_plugin.errors import InputError
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.types import STORED

EndKind = Literal["first_finisher", "node_finished", "node_progress", "all_finished"]


@dataclass(frozen=True, slots=True)
class StageEnd:
    """The event at which a stage gives way to the next.

    Attributes:
        kind: ``first_finisher`` (the paper's rule: the first of the stage's nodes to finish),
            ``node_finished`` (a named node), ``node_progress`` (a named node has finished a
            fraction of its requests) or ``all_finished`` (every node of the stage).
        node: the named node.
        fraction: share of the node's requests, in (0, 1].
    """

    __pydantic_config__ = STORED

    kind: EndKind = "first_finisher"
    node: str | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an end event that names nothing or too much.

        Raises:
            InputError: naming the field.
        """
        named = self.kind in ("node_finished", "node_progress")
        if named != (self.node is not None):
            raise InputError(f"stage end {self.kind}: node must be given exactly for named events")
        if not 0.0 < self.fraction <= 1.0:
            raise InputError(f"stage end {self.kind}: fraction {self.fraction} is not in (0, 1]")


@dataclass(frozen=True, slots=True)
class Assignment:
    """One model in one stage.

    Attributes:
        node: name of the application's node.
        parallel: parallel sizes.
        devices: device indices; replica ``i`` holds the ``i``-th run of
            ``parallel.devices_per_replica`` of them.
    """

    __pydantic_config__ = STORED

    node: str
    parallel: ParallelConfig
    devices: tuple[int, ...]

    def replicas(self) -> Iterator[tuple[int, ...]]:
        """Return the devices of each replica."""
        return self.parallel.replicas(self.devices)


@dataclass(frozen=True, slots=True)
class Stage:
    """Assignments that run together, and the event that ends them."""

    __pydantic_config__ = STORED

    assignments: tuple[Assignment, ...]
    end: StageEnd = StageEnd()

    def assignment(self, node: str) -> Assignment | None:
        """Return the assignment of a node, or None."""
        return next((a for a in self.assignments if a.node == node), None)

    @property
    def num_devices(self) -> int:
        """Return the devices the stage holds."""
        return sum(len(a.devices) for a in self.assignments)


@dataclass(frozen=True, slots=True)
class Plan:
    """A sequence of stages.

    A node keeps its engine from stage to stage while its assignment stays equal. In its last
    stage of the plan a node runs until it has finished, whatever ends the stage.
    """

    __pydantic_config__ = STORED

    stages: tuple[Stage, ...]

    def last_stage(self, node: str) -> int:
        """Return the index of the last stage that assigns the node, or -1."""
        return max((i for i, s in enumerate(self.stages) if s.assignment(node)), default=-1)
