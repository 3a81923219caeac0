"""What of an application is known before it runs: outputs that earlier runs have left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.model.problem import Problem
from samullm_plugin.run.ledger import Ledger, Status
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.python_calls import CallRunner, ImitatedCalls
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.reuse import ReuseOptions, opened_reuse
from samullm_plugin.run.text_prompts import TextPrompts


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What of a problem needs not be computed again.

    Attributes:
        problem: what remains: outputs that are there count as not taken.
        counts: by the user's node, how many requests are there.
    """

    problem: Problem
    counts: Mapping[str, int]


class _Uncalled(TextPrompts):
    """Prompts without calls: a user's functions are for the run."""

    def call_runner(self) -> CallRunner:
        """Return what takes calls and never makes them."""
        return ImitatedCalls()


def known_outputs(
    options: ReuseOptions, engine: str | None, loaded: LoadedApplication, problem: Problem
) -> Known | None:
    """Find which requests of an application need not be asked.

    Args:
        options: where their outputs are looked for.
        engine: what would compute, and its version; None: nothing is known.
        loaded: the application as its user wrote it.
        problem: as it is to be planned.

    Returns:
        None if there are none.

    Raises:
        InputError: as :func:`opened_reuse`.
    """
    app = problem.app
    with opened_reuse(options, engine, loaded, app) as reuse:
        if reuse is None or not reuse.hopeful:
            return None
        ledger = Ledger(app)
        log = RunLog(RunInfo("", loaded.app.name, "", Path()))
        RequestQueue(ledger, _Uncalled(loaded, app), log, {}, reuse).admit_first(0.0)
        if not reuse.counts:
            return None
        settled = [s >= Status.FINISHED for s in ledger.status]
        scenarios = tuple(
            replace(
                s,
                output_tokens=tuple(
                    np.where(done, 0, tokens)
                    for done, tokens in zip(settled, s.output_tokens, strict=True)
                ),
            )
            for s in problem.scenarios
        )
        return Known(problem.with_scenarios(scenarios), dict(reuse.counts))


def known_text(known: Known | None, problem: Problem) -> str | None:
    """Return in a line how many requests need not be asked; None if there are none."""
    if known is None:
        return None
    total = sum(len(n.requests) for n in problem.app.nodes)
    parts = ", ".join(f"{name} {count:,}" for name, count in known.counts.items())
    return f"{sum(known.counts.values()):,} of {total:,} requests are known from before ({parts})"
