"""The agents of a cluster's machines as Ray actors: started, asked, called and ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from samullm_plugin import Cluster, InputError, RunError
from samullm_ray.cluster import device_resource
from samullm_ray.messages import MachineFacts
from samullm_ray.options import RayOptions

logger = logging.getLogger(__name__)

_JOIN_AGAIN_S, _JOIN_AGAIN_AT_MOST_S = 5.0, 320.0
"""Pauses before a machine is asked again to join: each is twice the one before."""


class Actors:
    """The agents of a plan's machines, in one placement group that spreads them.

    Args:
        cluster: the plan's machines.
        options: of the executor.

    Raises:
        InputError: if the machines are not available.
    """

    def __init__(self, cluster: Cluster, options: RayOptions) -> None:
        import ray
        from ray.util.placement_group import placement_group

        self._options = options
        self._resource = device_resource(options)
        self._needs = [len(m) for m in cluster.machines]
        self._group = placement_group(
            [{self._resource: float(n)} for n in self._needs],
            strategy="STRICT_SPREAD" if len(self._needs) > 1 else "STRICT_PACK",
        )
        if not self._group.wait(options.join_timeout_s):
            have = sorted(
                (n["Resources"].get(self._resource, 0.0) for n in ray.nodes() if n["Alive"]),
                reverse=True,
            )
            self.close()
            raise InputError(
                f"executor ray: the plan needs {_count(self._needs, self._resource)}; the cluster "
                f"has {_count(have, self._resource)}, or not all of them free; plan for the "
                "machines that `samullm cluster` prints, or start the missing ones"
            )

    def start(self, index: int) -> Any:
        """Start the agent of a machine; return its handle at once."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from samullm_ray.agent import Agent

        count = self._needs[index]
        asked: dict[str, Any] = {"num_cpus": 0}
        if self._resource == "GPU":
            asked["num_gpus"] = count
        elif self._resource == "CPU":
            asked["num_cpus"] = count
        else:
            asked["resources"] = {self._resource: count}
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        actor = ray.remote(Agent).options(
            **asked,
            max_concurrency=4,
            max_restarts=0,
            enable_task_events=False,  # this process would report every call to the head
            scheduling_strategy=strategy,
        )
        return actor.remote(self._options.platform, count, self._options.start_method)

    def close(self) -> None:
        """Give the machines back."""
        import ray

        with suppress(Exception):  # whatever became of the cluster, nothing is left to give back
            ray.util.remove_placement_group(self._group)


def _count(sizes: Sequence[float], resource: str) -> str:
    several = ", ".join(f"{n:g}" for n in sizes)
    return f"{len(sizes)} machine(s) with {several} x {resource}"


@dataclass(slots=True)
class ActorTransport:
    """Calls to an agent through Ray.

    Attributes:
        handle: of the actor.
    """

    handle: Any

    def call(self, data: bytes) -> Future[bytes]:
        """Call the agent's ``exchange``."""
        try:
            future: Future[bytes] = self.handle.exchange.remote(data).future()
        except Exception as error:  # Ray's own errors have no common base
            future = Future()
            future.set_exception(error)
        return future

    def final(self, error: BaseException) -> str | None:
        """Return why no call will ever succeed again; an unreachable agent may come back."""
        from ray.exceptions import ActorUnavailableError

        if isinstance(error, ActorUnavailableError):
            return None
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"

    def fence(self) -> None:
        """Kill the agent, which takes its engines with it."""
        import ray

        with suppress(Exception):  # it may be gone already
            ray.kill(self.handle)


def say_hello(handles: Sequence[Any], timeout_s: float) -> list[MachineFacts]:
    """Return what the agents say of their machines, which must agree with this one.

    Raises:
        RunError: if an agent does not answer in time.
        InputError: if a machine lacks this package, has other versions or cannot start engines.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        facts: list[MachineFacts] = ray.get(
            [h.hello.remote(timeout_s) for h in handles], timeout=timeout_s + 30.0
        )
    except GetTimeoutError as error:
        raise RunError(
            f"executor ray: not every machine was ready within {timeout_s:.0f} s (load_timeout_s)"
        ) from error
    except (RayActorError, RayTaskError) as error:
        raise InputError(
            f"executor ray: the agent of a machine does not start: {_reason(error)}; install the "
            "same samullm-plugin[ray] and vllm on every machine"
        ) from error
    check_facts(facts)
    return facts


def _reason(error: BaseException) -> str:
    """Return the line of an error, which may hold that of another process, that says what it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return next((line for line in reversed(lines) if "Error" in line), last)


def missing_models(handles: Sequence[Any], paths: Sequence[str]) -> list[list[str]]:
    """Return, for each machine, which folders are not there."""
    import ray

    asked = [[h.has_model.remote(p) for p in paths] for h in handles]
    return [
        [p for p, there in zip(paths, ray.get(row, timeout=60), strict=True) if not there]
        for row in asked
    ]


def end_agents(handles: Sequence[Any], *, head_gone: bool = False) -> None:
    """Have agents end their engines, then end themselves; those that do not answer are killed.

    Args:
        handles: of the agents.
        head_gone: there is no head to have them killed; they end with the rest of the cluster.
    """
    if not handles:
        return
    import ray

    with suppress(Exception):  # whatever became of them, they are killed below
        ray.wait([h.stop.remote() for h in handles], num_returns=len(handles), timeout=15.0)
    for handle in handles if not head_gone else ():
        with suppress(Exception):  # it is gone already
            ray.kill(handle)


def check_facts(facts: Sequence[MachineFacts]) -> None:
    """Refuse machines that cannot start engines or differ in versions.

    Raises:
        InputError: naming the machine and the remedy.
    """
    from samullm_ray.agent import installed_versions

    here = dict(installed_versions())
    for machine in facts:
        if machine.fault:
            raise InputError(f"executor ray: machine {machine.host}: {machine.fault}")
        for name, version in machine.versions:
            if name in here and here[name] != version:
                raise InputError(
                    f"executor ray: machine {machine.host} has {name} {version}, this one "
                    f"{here[name]}; install the same version on both"
                )


def greet_later(
    start: Callable[[], Any],
    timeout_s: float,
    heard: Callable[[Any, MachineFacts], None],
    left: threading.Event,
) -> None:
    """Start an agent that may be there much later, in another thread, which calls ``heard``.

    An agent that ends before it has answered, or whose machine cannot take part as it is, is
    followed by another after a pause; pauses grow.

    Args:
        start: starts the agent and returns its handle; waits for the head of the cluster.
        timeout_s: for the agent to import vLLM.
        heard: is given the handle and what the agent says of its machine, once it answers; raises
            InputError if the machine cannot take part.
        left: is set once no agent is wanted any more.
    """

    def ask() -> None:
        pause_s, told = _JOIN_AGAIN_S, ""
        while not left.is_set():
            agent = None
            try:
                agent = start()
                facts = agent.hello.remote(timeout_s).future().result()
                if not left.is_set():
                    heard(agent, facts)
            except Exception as error:  # Ray's own errors have no common base
                if left.is_set():  # asked for anything now, Ray would start a cluster
                    return
                why = str(error) if isinstance(error, InputError) else _reason(error)
                level = logging.INFO if why == told else logging.WARNING
                logger.log(
                    level,
                    "a machine does not join yet: %s; it is asked again in %g s, and then at "
                    "pauses of up to %g s",
                    why, pause_s, _JOIN_AGAIN_AT_MOST_S,
                )  # fmt: skip
                told = why
                if agent is not None:
                    end_agents([agent])  # its devices are for the next
                left.wait(pause_s)
                pause_s = min(2 * pause_s, _JOIN_AGAIN_AT_MOST_S)
            else:
                return

    threading.Thread(target=ask, daemon=True, name="greeting").start()
