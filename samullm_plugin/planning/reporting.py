"""Plans for people: stage tables, a Gantt chart, where figures come from, how two plans differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

from samullm_plugin.model.application import Application, EngineOptions, ModelNode, ModelSpec
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.plan import Plan, Stage
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.result import PlanResult, PlanTrace


@dataclass(frozen=True, slots=True)
class StageLine:
    """One assignment of a stage, for a table.

    Attributes:
        stage: index of the stage.
        node: name of the node.
        parallel: such as ``dp2xtp1``.
        devices: such as ``0-3,6``, or ``m0:0-3 m1:2`` on several machines.
        end: end event of the stage.
        start_s: when the engine's start began; None if the assignment went on unchanged or was
            never started because the node had finished before.
        end_s: when its devices were free again.
    """

    stage: int
    node: str
    parallel: str
    devices: str
    end: str
    start_s: float | None
    end_s: float | None


def stage_lines(plan: Plan, trace: PlanTrace, cluster: Cluster) -> list[StageLine]:
    """Return the plan stage by stage with the times of one scenario."""
    machines = cluster.machines_if_several
    lines = []
    for index, stage in enumerate(plan.stages):
        for a in stage.assignments:
            segment = next(
                (
                    s
                    for s in trace.segments
                    if s.node == a.node and s.stage == index and s.parallel == a.parallel
                ),
                None,
            )
            lines.append(
                StageLine(
                    index,
                    a.node,
                    str(a.parallel),
                    device_list(a.devices, machines),
                    end_event(stage),
                    None if segment is None else segment.start_s,
                    None if segment is None else segment.end_s,
                )
            )
    return lines


def end_event(stage: Stage) -> str:
    """Return the event that ends a stage, in words."""
    end = stage.end
    words = {
        "first_finisher": "the first finishes",
        "all_finished": "all have finished",
        "node_finished": f"{end.node} finishes",
        "node_progress": f"{end.node} is {100 * end.fraction:.0f} % done",
    }
    return words[end.kind]


@dataclass(frozen=True, slots=True)
class Difference:
    """How a node is run by two plans.

    Attributes:
        node: name.
        first: its engines in the first plan, such as ``dp4xtp1 0-310 s``.
        second: in the second plan.
        first_device_s: device seconds it holds in the first plan.
        second_device_s: in the second plan.
    """

    node: str
    first: str
    second: str
    first_device_s: float
    second_device_s: float


def differences(first: PlanResult, second: PlanResult) -> list[Difference]:
    """Return the nodes that two plans run differently, by what that costs in device seconds."""
    found = []
    for name in dict.fromkeys(n.name for r in (first, second) for n in r.problem.app.nodes):
        a, b = _engines(first.traces[0], name), _engines(second.traces[0], name)
        if a != b:
            held = [_device_s(r.traces[0], name) for r in (first, second)]
            found.append(Difference(name, a, b, held[0], held[1]))
    return sorted(found, key=lambda d: -abs(d.second_device_s - d.first_device_s))


def _engines(trace: PlanTrace, node: str) -> str:
    return ", ".join(
        f"{s.parallel} {s.start_s:.0f}-{s.end_s:.0f} s" for s in trace.segments if s.node == node
    )


def _device_s(trace: PlanTrace, node: str) -> float:
    mine = [s for s in trace.segments if s.node == node]
    return sum((s.end_s - s.start_s) * len(s.devices) for s in mine)


def fusion_lines(app: Application) -> list[str]:
    """Return which of the user's nodes share engines, a line per fused node."""
    found = []
    for node in app.nodes:
        if node.fused:
            names = [p.name for p in node.fused]
            last = f"{', '.join(names[:-1])} and {names[-1]}"
            shown = last if len(names) <= 6 else f"{names[0]} to {names[-1]}, {len(names)} nodes"
            found.append(f"{node.name}: {shown}, on the same engines")
    return found


def sharing_lines(problem: Problem, trace: PlanTrace) -> list[str]:
    """Return which nodes share engines, and which of one checkpoint cannot and why.

    Args:
        problem: the instance.
        trace: its plan, simulated.
    """
    kinds: dict[int, list[str]] = {}
    for name, number in problem.same_engine.items():
        kinds.setdefault(number, []).append(name)
    lines = []
    for names in kinds.values():
        mine = [s for s in trace.segments if s.node in names]
        woken = sum(s.woken for s in mine)
        taken = sum(s.ready_s == s.start_s and not s.woken for s in mine)
        lines.append(
            f"{', '.join(names)}: the same engines; {taken} of {len(mine)} times they are taken "
            "over from another node and not started"
            + (f", {woken} times they slept and wake" if woken else "")
        )
    first: dict[str, ModelNode] = {}
    for node in problem.app.nodes:
        other = first.setdefault(node.model.path or node.model.name, node)
        if differ := _engine_differences(other.model, node.model):
            lines.append(
                f"{other.name}, {node.name}: one checkpoint, but engines of their own, as "
                f"{', '.join(differ)} {'differ' if len(differ) > 1 else 'differs'}"
            )
    return lines


def _engine_differences(one: ModelSpec, other: ModelSpec) -> list[str]:
    """Return the names of engine arguments in which two uses of a checkpoint differ."""
    found = [] if one.max_model_len == other.max_model_len else ["max_model_len"]
    for field in fields(EngineOptions):
        if field.name != "extra" and getattr(one.engine, field.name) != getattr(
            other.engine, field.name
        ):
            found.append(field.name)
    names = dict.fromkeys(name for name, _ in (*one.engine.extra, *other.engine.extra))
    return found + [n for n in names if one.engine.given(n) != other.engine.given(n)]


def idle_lines(problem: Problem, plan: Plan) -> list[str]:
    """Return which GPUs a plan never uses, by kind, and why they cannot be used if they cannot."""
    used = {d for stage in plan.stages for a in stage.assignments for d in a.devices}
    idle: dict[str, list[int]] = {}
    for device, kind in enumerate(problem.cluster.kinds):
        if device not in used:
            idle.setdefault(kind, []).append(device)
    lines = []
    word = problem.cluster.device_word
    for kind, devices in idle.items():
        keys = [[k for k in costs if k.gpu == kind] for costs in problem.costs]
        if not any(keys):
            why = "there are no latency figures of these models on it"
        elif not any(problem.fits(i, k) for i, of_node in enumerate(keys) for k in of_node):
            why = "no model of the application fits on it"
        else:
            why = "this plan is not shorter with it"
        lines.append(
            f"{word} {device_list(devices, problem.cluster.machines_if_several)} ({kind}): {why}"
        )
    return lines


def part_lines(cluster: Cluster) -> list[str]:
    """Return which devices are parts of which GPUs, where engines share any."""
    machines, lines = cluster.machines_if_several, []
    for count, which in groupby(range(len(cluster.cards)), lambda c: len(cluster.cards[c])):
        gpus = list(which)
        if count > 1:
            devices = device_list((d for c in gpus for d in cluster.cards[c]), machines)
            of = f"GPU {gpus[0]}" if len(gpus) == 1 else f"each of GPUs {device_list(gpus)}"
            lines.append(f"devices {devices}: {count} parts of {of}")
    return lines


def provenance_lines(problem: Problem) -> list[str]:
    """Return per model where its iteration latencies come from, with their known error."""
    lines: dict[str, str] = {}
    for node, costs in zip(problem.app.nodes, problem.costs, strict=True):
        parts: dict[str, list[str]] = {}
        for key, mode in costs.items():
            if mode.kv_cache_tokens < node.model.max_model_len:
                continue
            origin = mode.provenance
            error = "" if origin.error_pct is None else f", ±{origin.error_pct:.1f} %"
            size = key.sizes
            parts.setdefault(f"{origin.kind} ({origin.source}{error})", []).append(size)
        text = "; ".join(f"{', '.join(sizes)} {kind}" for kind, sizes in parts.items())
        lines[node.model.name] = f"{node.model.name}: {text}"
    return list(lines.values())


def start_lines(problem: Problem) -> list[str]:
    """Return per model how long its engines take to start, and where that comes from."""
    lines: dict[str, str] = {}
    for node, costs in zip(problem.app.nodes, problem.costs, strict=True):
        parts = [
            f"{key.sizes} {mode.load.warm_s:.1f} s ({mode.load.source})"
            for key, mode in costs.items()
            if mode.load.source and mode.kv_cache_tokens >= node.model.max_model_len
        ]
        if parts:
            lines[node.model.name] = f"{node.model.name}: {'; '.join(parts)}"
    return list(lines.values())


def makespan_band(problem: Problem, result: PlanResult) -> tuple[float, float] | None:
    """Return between which seconds the makespan lies if latencies err as they are known to.

    The errors of the nodes' latencies count by the device seconds in which their engines compute;
    None if no error is known.
    """
    trace = result.traces[0]
    total = errors = 0.0
    known = False
    for segment in trace.segments:
        devices = len(segment.devices)
        total += devices * (segment.end_s - segment.start_s)
        costs = problem.mode(problem.app.index(segment.node), segment.parallel, segment.devices)
        if costs.provenance.error_pct is not None:
            known = True
            computing_s = segment.end_s - min(segment.ready_s, segment.end_s)
            errors += devices * computing_s * costs.provenance.error_pct / 100
    if not known or total <= 0:
        return None
    factor = 1 + errors / total
    low, high = min(result.makespan_s), max(result.makespan_s)
    return low / factor, high * factor


LOADING = "░"


def text_gantt(trace: PlanTrace, cluster: Cluster, width: int = 72) -> str:
    """Return a Gantt chart.

    Every node has a letter, in order of its first start; engine starts are shaded, idle time is
    left blank.

    Args:
        trace: a plan carried out.
        cluster: the devices.
        width: columns of the chart.
    """
    if trace.makespan_s <= 0:
        return "(nothing to do)"
    order = list(dict.fromkeys(s.node for s in trace.segments))
    letters = {n: _letter(i) for i, n in enumerate(order)}
    rows = [[" "] * width for _ in range(cluster.num_gpus)]
    scale = width / trace.makespan_s
    for segment in trace.segments:
        first = int(segment.start_s * scale)
        ready = int(min(segment.ready_s, segment.end_s) * scale)
        last = max(first + 1, round(segment.end_s * scale))
        for device in segment.devices:
            for column in range(first, min(last, width)):
                rows[device][column] = LOADING if column < ready else letters[segment.node]
    names = device_labels(cluster.num_gpus, cluster.machines_if_several)
    word = cluster.device_word
    label = max(6, max(map(len, names)) + len(word) + 1)
    lines = [
        f"{f'{word} {name}':<{label}}|{''.join(row)}|"
        for name, row in zip(names, rows, strict=True)
    ]
    end = f"{trace.makespan_s:.0f} s"
    lines.append(" " * label + "0" + " " * (width - len(end)) + " " + end)
    legend = "  ".join(f"{letters[n]} {n}" for n in order)
    lines.append(f"{' ' * label}{legend}  ({LOADING} engine start)")
    return "\n".join(lines)


def _letter(index: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return alphabet[index % len(alphabet)]


def device_labels(num_gpus: int, machines: Sequence[Sequence[int]] = ()) -> list[str]:
    """Return devices as people find them, such as ``3``, or ``m1:3`` where machines are named.

    Args:
        num_gpus: devices of the cluster.
        machines: devices of each machine; none if there is only one. The second part of a label
            counts the devices of its machine from 0.
    """
    labels = [str(d) for d in range(num_gpus)]
    for m, members in enumerate(machines):
        for position, device in enumerate(members):
            labels[device] = f"m{m}:{position}"
    return labels


def device_list(devices: Iterable[int], machines: Sequence[Sequence[int]] = ()) -> str:
    """Return devices as ranges, such as ``0-3,6``, or ``m0:0-3 m1:2`` where machines are named.

    Three or more machines in a row of which the same devices are meant are ``m4-m9:0-7``.

    Args:
        devices: indices in the cluster.
        machines: as :func:`device_labels` has them.
    """
    if machines:
        chosen = set(devices)
        found = [[k for k, d in enumerate(members) if d in chosen] for members in machines]
        parts: list[str] = []
        for mine, alike in groupby(range(len(found)), key=found.__getitem__):
            which = [f"m{m}" for m in alike]
            names = [f"{which[0]}-{which[-1]}"] if len(which) > 2 else which
            parts += [f"{name}:{device_list(mine)}" for name in names if mine]
        return " ".join(parts)
    runs: list[list[int]] = []
    for d in sorted(devices):
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
