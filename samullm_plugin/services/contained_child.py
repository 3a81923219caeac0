"""The child process of :mod:`samullm_plugin.services.containment`; not for direct use."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samullm_plugin.services.containment import ContainedCall, ContainedResult, describe

if TYPE_CHECKING:
    from samullm_plugin.core.plan import Plan


def _load(call: ContainedCall) -> Any:
    """Return a new instance of the plugin's class."""
    owner: Any = importlib.import_module(call.module)
    for part in call.qualname.split("."):
        owner = getattr(owner, part)
    return owner(owner.Config.model_validate(dict(call.options)))


def _schedule(call: ContainedCall) -> ContainedResult:
    from time import monotonic

    import numpy as np

    from samullm_plugin.core.simulation import PlanSimulator
    from samullm_plugin.interfaces.scheduler import SchedulingContext
    from samullm_plugin.manager import PluginHost
    from samullm_plugin.services.planning import PlanningOptions, make_plan

    problem, budget_s = call.arguments["problem"], call.arguments["budget_s"]
    seed = call.arguments["seed"]

    def schedule_with(
        name: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = budget_s,
    ) -> Plan:
        how = PlanningOptions(options=options or {}, seed=seed, budget_s=budget_s)
        return make_plan(PluginHost.from_settings(), problem, name, how).plan

    context = SchedulingContext(
        PlanSimulator(problem),
        np.random.default_rng(seed),
        deadline_s=float("inf") if budget_s is None else monotonic() + budget_s,
        schedule_with=schedule_with,
    )
    before = _digest(problem)
    plan = _load(call).schedule(problem, context)
    if _digest(problem) != before:
        return ContainedResult(error_kind="plugin", error="changed the problem it was given")
    return ContainedResult((plan, context.report))


def _digest(problem: Any) -> bytes:
    return hashlib.blake2b(pickle.dumps(problem)).digest()


def _answer(call: ContainedCall) -> ContainedResult:
    try:
        if call.job == "schedule":
            return _schedule(call)
        method = getattr(_load(call), call.arguments["method"])
        return ContainedResult(method(**call.arguments["arguments"]))
    except (Exception, SystemExit) as error:  # foreign code
        return describe(error)


def main() -> None:
    """Read a call from stdin and write its result to what was stdout."""
    answer_to = os.dup(1)
    os.dup2(2, 1)  # whatever the plugin prints must not mix with the answer
    sys.stdout = sys.stderr
    call = pickle.load(sys.stdin.buffer)
    sys.path[:] = list(call.search_path)
    result = _answer(call)
    try:
        data = pickle.dumps(result)
    except Exception as error:  # what a plugin returns may be anything
        data = pickle.dumps(describe(error))
    with os.fdopen(answer_to, "wb") as out:
        out.write(data)


if __name__ == "__main__":
    main()
