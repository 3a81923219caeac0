"""The child process of :mod:`samullm_plugin.planning.containment`; not for direct use."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samullm_plugin.planning.containment import ContainedCall, ContainedResult, describe

if TYPE_CHECKING:
    from samullm_plugin.model.plan import Plan


def _load(call: ContainedCall) -> Any:
    """Return a new instance of the plugin's class."""
    owner: Any = importlib.import_module(call.module)
    for part in call.qualname.split("."):
        owner = getattr(owner, part)
    return owner(owner.Config.model_validate(dict(call.options)))


def _schedule(call: ContainedCall) -> ContainedResult:
    from time import monotonic

    import numpy as np

    from samullm_plugin.host.interfaces.scheduler import SchedulingContext
    from samullm_plugin.host.manager import PluginHost
    from samullm_plugin.planning.planner import PlanningOptions, make_plan
    from samullm_plugin.simulator import PlanSimulator

    problem, budget_s = call.arguments["problem"], call.arguments["budget_s"]
    seed = call.arguments["seed"]

    def schedule_with(
        name: str,
        /,
        *,
        options: Mapping[str, object] | None = None,
        budget_s: float | None = budget_s,
        give_up_s: float | None = None,
        scenarios: int | None = None,
    ) -> Plan:
        how = PlanningOptions(options or {}, seed, budget_s, give_up_s=give_up_s)
        part = problem.with_scenarios(problem.scenarios[:scenarios])
        return make_plan(PluginHost.from_settings(), part, name, how).plan

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


def _length(call: ContainedCall) -> ContainedResult:
    """Call a method of a length estimator, fitted as its pickled state says."""
    from samullm_plugin.host.interfaces.length import LengthEstimator

    method, arguments = call.arguments["method"], call.arguments["arguments"]
    estimator = _load(call)  # also what a pickled state needs to be imported
    if call.arguments["state"] is not None:
        estimator = pickle.loads(call.arguments["state"])
    given = [v for k, v in arguments.items() if k != "rng"]
    before = _digest(given)
    value = getattr(estimator, method)(**arguments)
    if _digest(given) != before:
        what = "observations" if method == "fit" else "query"
        return ContainedResult(error_kind="plugin", error=f"changed the {what} it was given")
    if method == "sample":
        return ContainedResult((value, arguments["rng"].bit_generator.state))
    if method != "fit":
        return ContainedResult(value)
    if not isinstance(value, LengthEstimator):
        kind = type(value).__name__
        return ContainedResult(
            error_kind="plugin", error=f"returned a {kind}, not a LengthEstimator"
        )
    try:
        return ContainedResult(pickle.dumps(value))
    except Exception as error:  # foreign objects
        text = f"returned an estimator that cannot be pickled: {error}"
        return ContainedResult(error_kind="plugin", error=text)


def _answer(call: ContainedCall) -> ContainedResult:
    try:
        if call.job == "schedule":
            return _schedule(call)
        if call.job == "length":
            return _length(call)
        method = getattr(_load(call), call.arguments["method"])
        return ContainedResult(method(**call.arguments["arguments"]))
    except (Exception, SystemExit) as error:  # foreign code
        return describe(error)


def main() -> None:
    """Read calls from stdin and write their results to what was stdout, until there are no more."""
    calls = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # a plugin that reads stdin must not swallow calls
    os.dup2(2, 1)  # whatever the plugin prints must not mix with the answers
    sys.stdout = sys.stderr
    while True:
        try:
            call = pickle.load(calls)
        except EOFError:
            return
        sys.path[:] = list(call.search_path)
        result = _answer(call)
        try:
            data = pickle.dumps(result)
        except Exception as error:  # what a plugin returns may be anything
            data = pickle.dumps(describe(error))
        answers.write(data)
        answers.flush()


if __name__ == "__main__":
    main()
