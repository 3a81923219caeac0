"""What a run in progress shows to those who watch it and may replace its plan."""

from __future__ import annotations

from typing import Protocol

from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.plan import Plan
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.types import Floats
from samullm_plugin.rules.transition import RunState
from samullm_plugin.run.dispatch import Deployment, Replica
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.simulator.runs import PolicyCall


class RunView(Protocol):
    """A run in progress; attributes as those of the coordinator."""

    problem: Problem
    executor: Executor
    ledger: Ledger
    queue: RequestQueue
    engines: Engines
    log: RunLog

    @property
    def plan(self) -> Plan:
        """The plan at present."""
        ...

    @property
    def rule(self) -> RunState:
        """Stage and engines as the transition rule knows them."""
        ...

    def now_s(self) -> float:
        """Return the run's clock."""
        ...

    def choose_policy(self, policy: PolicyCall | None) -> None:
        """Let another request policy decide for nodes that have no engines, prepared ones included.

        Engines that there are keep the order and the replicas that they were started with.
        """
        ...

    def take_steps(
        self, deployment: Deployment, replica: Replica
    ) -> tuple[StepTable, Floats] | None:
        """Return a replica's iterations since the last call; None if it does not record them."""
        ...


class Replanning(Protocol):
    """Watches a run in progress and may replace its plan; by default it never does."""

    def begin(self, run: RunView) -> None:
        """Called when the run begins."""

    def consider(self, run: RunView, *, stage_changed: bool) -> Plan | None:
        """Return the plan to go on with, or None to keep the present one."""
        del run, stage_changed
        return None

    def replacement(self, run: RunView) -> Plan | None:
        """Return a plan for the devices that are left, as some are lost; None if there is none."""
        del run
        return None

    def start_with_policy(self, name: str) -> None:
        """Called before an interrupted run goes on under a policy that was chosen during it."""
        del name

    def devices_joined(self) -> None:
        """Called when there are more devices than the plan was made for."""

    def end(self) -> None:
        """Called when the run is over, whatever became of it."""
