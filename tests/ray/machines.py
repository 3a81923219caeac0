"""A Ray cluster on this machine whose raylets stand for machines, and what can happen to them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any

import psutil

SILENT_S = 10
"""Ray takes a machine for dead whose raylet is silent for so long; by itself, three times that."""


class Machines:
    """Two machines with one core each; the head is on the first.

    Attributes:
        address: of the cluster.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as LocalCluster

        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives its workers the lowest priority: beside other work engines hardly get a turn.
        os.environ.setdefault("RAY_worker_niceness", "0")
        self._cluster = LocalCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": 100 << 20,
                "include_dashboard": False,
                "_system_config": {
                    "health_check_period_ms": 1000 * SILENT_S // 5,
                    "health_check_failure_threshold": 5,
                },
            },
        )
        self.address = self._cluster.address
        self._second = self._add()

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    @property
    def second_raylet(self) -> psutil.Process:
        """Return the raylet of the second machine."""
        return psutil.Process(self._second.all_processes["raylet"][0].process.pid)

    def second_agent(self) -> psutil.Process:
        """Return the agent on the second machine."""
        if found := _agents(self.second_raylet):
            return found[-1]
        raise LookupError("there is no agent on the second machine")

    def workers(self) -> list[psutil.Process]:
        """Return all agents, and all that they have started."""
        found = []
        for node in self._cluster.list_all_nodes():
            for info in node.all_processes.get("raylet", ()):
                with suppress(psutil.NoSuchProcess):
                    for agent in _agents(psutil.Process(info.process.pid)):
                        found += [agent, *agent.children(recursive=True)]
        return found

    def second_engine(self) -> psutil.Process:
        """Return an engine on the second machine: its parent is the one that imported vLLM."""
        agent = self.second_agent()
        for process in agent.children(recursive=True):
            if process.ppid() != agent.pid:
                return process
        raise LookupError("there is no engine on the second machine")

    def kill_second(self, *, whole: bool = True) -> None:
        """Kill the second machine's raylet; ``whole``: and all it started, as a power cut would."""
        processes = self.second_raylet.children(recursive=True) if whole else []
        for started in self._second.all_processes.values():
            for info in started:
                info.process.kill()
                info.process.wait()  # a zombie would look alive to its workers
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(self._second, allow_graceful=False)

    def replace_second(self) -> None:
        """Have another second machine, whatever became of the one there was."""
        with suppress(LookupError, psutil.NoSuchProcess):  # it is gone
            self.second_raylet.send_signal(signal.SIGCONT)
            self.kill_second()
        self._second = self._add()

    def kill_head(self) -> None:
        """Kill what all of Ray asks (its GCS)."""
        for info in self._cluster.head_node.all_processes["gcs_server"]:
            info.process.kill()
            info.process.wait()

    def add_second(self) -> None:
        """Start another machine in the place of one that was killed."""
        self._second = self._add()

    def close(self) -> None:
        """End all of them."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def _agents(raylet: psutil.Process) -> list[psutil.Process]:
    """Return the agents that a raylet has started, the latest last."""
    found = []
    for process in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("ray::Agent" in word for word in process.cmdline()):
                found.append((process.create_time(), process))
    return [process for _, process in sorted(found, key=lambda item: item[0])]
