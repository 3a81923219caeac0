"""Request policies as the plan simulator asks them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from samullm_plugin.app.spec import Component, PlannerSection
from samullm_plugin.errors import PluginError, SamullmError
from samullm_plugin.host.interfaces.policy import PolicyBatch, RequestPolicy
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application
from samullm_plugin.model.chains import chains_of
from samullm_plugin.model.problem import Problem
from samullm_plugin.model.programs import program_ids, tokens_before
from samullm_plugin.model.scenarios import LengthScenario
from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.simulator.runs import PolicyCall


def policy_call(
    app: Application, policy: RequestPolicy, predicted: Sequence[LengthScenario]
) -> PolicyCall:
    """Return a policy as the simulator calls it, deciding on predicted lengths.

    Args:
        app: the application.
        policy: the policy.
        predicted: what the policy believes, per scenario of the simulated problem; the problem's
            own scenarios are exact predictions.
    """
    programs = program_ids(app)
    before = [tokens_before(app, p) for p in predicted]
    chains = [_chain_ids(app, i) for i in range(len(app.nodes))]

    def call(
        scenario: int, node: int, requests: Ints, arrival_s: Floats | None, num_replicas: int
    ) -> tuple[Ints | None, Ints | None]:
        table = app.nodes[node].requests
        batch = PolicyBatch(
            node=app.nodes[node].name,
            prompt_tokens=predicted[scenario].prompt_tokens[node][requests],
            predicted_tokens=predicted[scenario].output_tokens[node][requests],
            arrival_s=np.zeros(len(requests)) if arrival_s is None else arrival_s.copy(),
            prefix_id=table.prefix_id[requests],
            prefix_tokens=table.prefix_tokens[requests],
            program_id=programs[node][requests],
            program_tokens=before[scenario][node][requests],
            chain_id=None if (ids := chains[node]) is None else ids[requests],
        )
        return checked_assignment(policy, batch, num_replicas)

    return call


def _chain_ids(app: Application, node: int) -> Ints | None:
    """Return the first request that each request of a node hangs together with, if any does."""
    table = app.nodes[node].requests
    own = table.input_node == node
    if not own.any():
        return None
    return chains_of(len(table), table.input_row[own], table.input_request[own]).first


NO_POLICY = "fcfs"
"""The request policy that leaves everything as it comes."""


def named_policy(name: str) -> Component | None:
    """Return a request policy by its name, as the planner section has it."""
    return None if name == NO_POLICY else Component(type=name)


def offered_policies(app: Application) -> tuple[str, ...]:
    """Return the request policies that may be chosen with a plan of an application."""
    waits = any((n.requests.input_node == i).any() for i, n in enumerate(app.nodes))
    return ("isolate-longest",) if waits else ()


def chosen_policy(
    host: PluginHost,
    planner: PlannerSection,
    problem: Problem,
    chosen: Mapping[str, Component | None],
) -> PolicyCall | None:
    """Return the request policies of a problem's nodes as one.

    Args:
        host: the plugins.
        planner: how the problem is planned.
        problem: the problem; policies are told its own lengths.
        chosen: by node name, its policy; None: first come, first served, in turn.

    Raises:
        InputError: for an unknown policy or wrong options.
    """
    by_node = [chosen[n.name] for n in problem.app.nodes]
    different = [c for k, c in enumerate(by_node) if c not in by_node[:k]]
    calls = [
        planned_policy(host, planner.model_copy(update={"request_policy": c}), problem)
        for c in different
    ]
    if len(calls) == 1:
        return calls[0]
    place = [different.index(c) for c in by_node]

    def call(
        scenario: int, node: int, requests: Ints, arrival_s: Floats | None, num_replicas: int
    ) -> tuple[Ints | None, Ints | None]:
        policy = calls[place[node]]
        if policy is None:
            return None, None
        return policy(scenario, node, requests, arrival_s, num_replicas)

    return call


def planned_policy(
    host: PluginHost, planner: PlannerSection, problem: Problem
) -> PolicyCall | None:
    """Return the request policy a planner section asks for, told the problem's own lengths.

    Raises:
        InputError: for an unknown policy or wrong options.
    """
    chosen = planner.request_policy
    if chosen is None:
        return None
    policy = host.create("request-policy", chosen.type, chosen.options)
    return policy_call(problem.app, policy, problem.scenarios)


def checked_assignment(
    policy: RequestPolicy, batch: PolicyBatch, num_replicas: int
) -> tuple[Ints | None, Ints | None]:
    """Ask a policy and check its answer.

    Raises:
        PluginError: naming the policy and the rule it breaks.
    """
    name = f"request policy {policy.name}"
    for column in fields(batch):
        values = getattr(batch, column.name)
        if isinstance(values, np.ndarray):
            values.setflags(write=False)  # what tries to change it raises
    try:
        with contextlib.redirect_stdout(sys.stderr):
            priority, replica = policy.assign(batch, num_replicas)
    except SamullmError:
        raise
    except Exception as error:  # foreign code
        text = " ".join(str(error).split())
        raise PluginError(f"{name} raised {type(error).__name__}: {text}") from error
    if replica is None:
        return _priorities(priority, batch, name), None
    replicas = np.asarray(replica)
    if replicas.shape != (len(batch),) or not np.issubdtype(replicas.dtype, np.integer):
        raise PluginError(f"{name}: replicas must be {len(batch)} whole numbers")
    if len(batch) and not 0 <= replicas.min() <= replicas.max() < num_replicas:
        raise PluginError(f"{name}: replicas must be from 0 to {num_replicas - 1}")
    return _priorities(priority, batch, name), replicas.astype(np.int64)


def _priorities(priority: Ints | None, batch: PolicyBatch, name: str) -> Ints | None:
    if priority is None:
        return None
    priorities = np.asarray(priority)
    if priorities.shape != (len(batch),) or not np.issubdtype(priorities.dtype, np.integer):
        raise PluginError(f"{name}: priorities must be {len(batch)} whole numbers, or None")
    return priorities.astype(np.int64)
