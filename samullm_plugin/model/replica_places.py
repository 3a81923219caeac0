"""Which free devices the replicas of a model take, by machine and NVLink group."""

from __future__ import annotations

from samullm_plugin.model.parallel import ParallelConfig

Place = tuple[int, int]
"""A machine and one of its NVLink groups, by their indices."""


def take_replicas(
    places: dict[Place, list[int]], parallel: ParallelConfig, shunned: set[int], machines: int
) -> tuple[int, ...] | None:
    """Return devices of one kind for all replicas of a model.

    Args:
        places: free devices in order by machine and NVLink group; what is chosen is taken out.
        parallel: sizes to place.
        shunned: devices to take only if no others do.
        machines: on how many each replica lies.
    """
    tp = parallel.tensor_parallel_size
    chosen: list[int] = []
    if parallel.pipeline_parallel_size == 1 and not shunned:
        # The fullest place stays the fullest until it has no more room: each is gone through once.
        missing = parallel.data_parallel_size
        for count, _, place in sorted((len(d), d[0], p) for p, d in places.items() if len(d) >= tp):
            taken = min(missing, count // tp) * tp
            chosen += places[place][:taken]
            places[place] = places[place][taken:]
            missing -= taken // tp
            if not missing:
                return tuple(chosen)
        return None
    stages = parallel.pipeline_parallel_size // machines
    for _ in range(parallel.data_parallel_size):
        used: set[int] = set()
        for _ in range(machines):
            homes = _machines_with_room(places, tp, stages, used, most=machines > 1)
            for _ in range(stages):
                part = _part(places, tp, homes, shunned)
                if part is None:
                    return None
                place, devices = part
                homes = {place[0]}
                places[place] = [d for d in places[place] if d not in devices]
                chosen += devices
            used |= homes
    return tuple(chosen)


def _machines_with_room(
    places: dict[Place, list[int]], tp: int, stages: int, used: set[int], *, most: bool
) -> set[int]:
    """Return the machines with room for so many stages of a replica.

    Args:
        places: free devices by machine and NVLink group.
        tp: devices of a stage.
        stages: of them on one machine.
        used: machines that have a part of the replica already.
        most: only those that have room most often: so as many replicas as there can be find their
            machines.
    """
    parts: dict[int, int] = {}
    for (machine, _), members in places.items():
        if machine not in used:
            parts[machine] = parts.get(machine, 0) + len(members) // tp
    least = max([1, *(n // stages for n in parts.values())]) if most else 1
    return {m for m, n in parts.items() if n // stages >= least}


def _part(
    places: dict[Place, list[int]], tp: int, homes: set[int], shunned: set[int]
) -> tuple[Place, list[int]] | None:
    """Return ``tp`` devices of one place: of the fullest that has room, the first of equals.

    Args:
        places: free devices in order by machine and NVLink group.
        tp: how many.
        homes: machines to look on.
        shunned: devices to take only if no others do.
    """
    best: tuple[tuple[int, int, int], Place, list[int]] | None = None
    for place, members in places.items():
        if len(members) < tp or place[0] not in homes:
            continue
        devices = members[:tp]
        if shunned:
            devices = sorted(members, key=lambda d: (d in shunned, d))[:tp]
        key = sum(d in shunned for d in devices), len(members), devices[0]
        if best is None or key < best[0]:
            best = key, place, devices
            if not shunned and len(members) == tp:
                break  # no place is fuller, and they come in order
    return None if best is None else best[1:]
