"""Models timed in their configurations, alone and behind the models whose outputs they read.

Of many sizes of a model some are timed; the others lie between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from samullm_plugin import ParallelConfig, Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.simulator import NodeQuery, NodeRun, PlanSimulator

APART = 2.0
"""Ratio of two sizes that are timed (a choice)."""


def far_apart(devices: Sequence[int]) -> list[int]:
    """Return the indices of the first and the last size, and between them of some far apart.

    Args:
        devices: of the sizes, not decreasing.
    """
    kept: list[int] = []
    for k, size in enumerate(devices):
        if not kept or size >= APART * devices[kept[-1]] or k == len(devices) - 1:
            kept.append(k)
    return kept


def between(devices: Sequence[int], timed: Sequence[int], values: Floats) -> Floats:
    """Return values for all sizes, linear over the logarithm of their devices.

    Args:
        devices: of all sizes.
        timed: indices of those that have values, increasing.
        values: theirs, shape ``(len(timed), n)``.

    Returns:
        Shape ``(len(devices), n)``.
    """
    wanted, at = np.log(devices), np.log([devices[k] for k in timed])
    return np.column_stack([np.interp(wanted, at, column) for column in values.T])


EVERY_PAIR = 12
"""Up to how many modes of a node all are timed behind its producers' modes (a choice)."""


@dataclass(frozen=True, slots=True)
class TimedMode:
    """A node in a configuration on a kind of GPU.

    Attributes:
        node: index of the node.
        parallel: parallel sizes.
        gpu: label of the kind.
        device: a device of it.
        load_s: seconds of an engine start.
    """

    node: int
    parallel: ParallelConfig
    gpu: str
    device: int
    load_s: float

    @classmethod
    def idle(cls, problem: Problem, node: int, parallel: ParallelConfig) -> TimedMode:
        """Return a mode on the devices it would get on the idle cluster."""
        devices = problem.idle_devices(node, parallel)
        assert devices is not None, f"{parallel} has no place on the idle cluster"
        load_s = problem.load_s(problem.mode(node, parallel, devices))
        return cls(node, parallel, problem.cluster.kinds[devices[0]], devices[0], load_s)

    def query(
        self, simulator: PlanSimulator, scenario: int, available_s: Floats | None = None
    ) -> NodeQuery:
        """Return the simulation of the whole node, started at 0.

        Args:
            simulator: the host's.
            scenario: index of the length scenario.
            available_s: when the inputs of its requests are there; None: from the start.
        """
        return simulator.start_query(
            scenario, self.node, self.parallel, self.device, self.load_s, available_s
        )


def alone(simulator: PlanSimulator, scenario: int, modes: Sequence[TimedMode]) -> list[NodeRun]:
    """Return the runs of modes that start at 0 with all their inputs there."""
    return simulator.runs.get_many([m.query(simulator, scenario) for m in modes])


def tails_s(
    simulator: PlanSimulator,
    scenario: int,
    producers: Sequence[TimedMode],
    finish_s: Sequence[Floats],
    consumers: Sequence[TimedMode],
) -> Floats:
    """Return what a node needs after its producer's end if both are started together.

    Inputs from other producers are taken to be there, and the producer to run at full speed. Where
    there are many modes, some far apart are simulated, and the others lie between them, linear over
    the logarithm of their devices. Consumers of several pipeline stages, whose simulation is slow,
    lie between those of one stage, linear over what they take alone.

    Args:
        simulator: the host's.
        scenario: index of the length scenario.
        producers: modes of the producer.
        finish_s: for each of them, when each request of the producer finishes, shape ``(n,)``.
        consumers: modes of the consumer.

    Returns:
        Shape ``(len(producers), len(consumers))``.
    """
    works = simulator.works[scenario]
    rows, single = spaced(producers), one_stage(consumers)
    few = spaced([consumers[c] for c in single])
    columns = [single[k] for k in few]
    timed = np.zeros((len(rows), len(columns)))
    for at, p in enumerate(rows):
        finish = [np.zeros(len(w.output_tokens)) for w in works]
        finish[producers[p].node] = finish_s[p]
        available = works[consumers[0].node].inputs.available_s(
            simulator.with_python(scenario, finish)
        )
        queries = [consumers[c].query(simulator, scenario, available) for c in columns]
        ends = [run.end_s for run in simulator.runs.get_many(queries)]
        timed[at] = np.maximum(0.0, np.array(ends) - float(finish_s[p].max()))
    across = np.zeros((len(consumers), len(rows)))  # by consumer's mode
    across[single] = _between([consumers[c] for c in single], few, timed.T)
    if len(single) < len(consumers):
        alone_s = np.array([run.end_s for run in alone(simulator, scenario, consumers)])
        across = _by_time(alone_s, single, across)
    return _between(producers, rows, across.T)


def one_stage(modes: Sequence[TimedMode]) -> list[int]:
    """Return the indices of a node's modes of one pipeline stage; of all, if there are none."""
    single = [k for k, mode in enumerate(modes) if mode.parallel.pipeline_parallel_size == 1]
    return single or list(range(len(modes)))


def spaced(modes: Sequence[TimedMode]) -> list[int]:
    """Return the indices of the modes that are timed in pairs: all, or some far apart."""
    if len(modes) <= EVERY_PAIR:
        return list(range(len(modes)))
    kept = [
        same[k]
        for same in _alike(modes)
        for k in far_apart([modes[m].parallel.num_devices for m in same])
    ]
    return sorted(kept)


def _by_time(alone_s: Floats, known: Sequence[int], values: Floats) -> Floats:
    """Return values for all modes, linear over the seconds that they take alone.

    A mode slower than all known ones has as much more as it is slower.

    Args:
        alone_s: by mode.
        known: indices of those that have values.
        values: shape ``(modes, n)``; rows of others are ignored.

    Returns:
        Shape ``(modes, n)``.
    """
    order = sorted(known, key=lambda k: alone_s[k])
    slowest_s = alone_s[order[-1]]
    result = values.copy()
    for k in set(range(len(alone_s))) - set(known):
        near = [np.interp(alone_s[k], alone_s[order], column) for column in values[order].T]
        result[k] = np.array(near) + max(0.0, alone_s[k] - slowest_s)
    return result


def _alike(modes: Sequence[TimedMode]) -> list[list[int]]:
    """Return the indices of modes by shape of a replica and kind of GPU, fewest devices first."""
    groups: dict[tuple[int, int, str], list[int]] = {}
    for k, m in enumerate(modes):
        size = m.parallel.tensor_parallel_size, m.parallel.pipeline_parallel_size
        groups.setdefault((*size, m.gpu), []).append(k)
    return [sorted(g, key=lambda k: modes[k].parallel.num_devices) for g in groups.values()]


def _between(modes: Sequence[TimedMode], timed: Sequence[int], values: Floats) -> Floats:
    """Return values for all modes from those of some.

    Args:
        modes: all modes.
        timed: indices of those that have values, increasing.
        values: theirs, shape ``(len(timed), n)``.

    Returns:
        Shape ``(len(modes), n)``.
    """
    if len(timed) == len(modes):
        return values
    place = {k: row for row, k in enumerate(timed)}
    result = np.zeros((len(modes), values.shape[1]))
    for same in _alike(modes):
        known = [at for at, k in enumerate(same) if k in place]
        of = values[[place[same[at]] for at in known]]
        result[same] = between([modes[k].parallel.num_devices for k in same], known, of)
    return result
