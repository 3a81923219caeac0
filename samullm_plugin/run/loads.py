"""Notes in the journal of how much runs and waits, from which reports draw lines."""

from __future__ import annotations

from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.run.engines import Engines
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.serving import Serving

FIRST_EVERY_S = 0.5
NOTED = 100
"""After so many notes only every second one is made; so there are at most so many per doubling of
the run's length."""


class LoadNotes:
    """Makes the notes, ever less often in a long run.

    Args:
        executor: knows what has begun.
        engines: of the run.
        serving: knows what waits.
        ledger: knows what was generated.
        log: takes the notes.
    """

    def __init__(
        self, executor: Executor, engines: Engines, serving: Serving, ledger: Ledger, log: RunLog
    ) -> None:
        self._executor, self._engines, self._serving = executor, engines, serving
        self._ledger, self._log = ledger, log
        self._next_s, self._every_s, self._noted = 0.0, FIRST_EVERY_S, 0

    def note(self, now_s: float) -> None:
        """Note how much is running and waiting, if it is time."""
        if now_s < self._next_s:
            return
        if self._noted == NOTED:
            self._noted //= 2
            self._every_s *= 2
        self._next_s = now_s + self._every_s
        self._noted += 1
        tokens = sum(int(g.sum()) for g in self._ledger.generated)
        running = held = 0
        for deployment in self._engines.deployments.values():
            for replica in deployment.replicas:
                if replica.ready_s is None:
                    continue
                begun = self._executor.progress(replica.key)
                tokens += sum(n for r, n in begun.items() if r in replica.outstanding)
                held += len(replica.outstanding)
                running += sum(1 for n in begun.values() if n) if begun else 0
        waiting = self._serving.waiting()
        self._log.add(
            now_s, "load", running=running, at_engines=held, waiting=waiting, tokens=tokens
        )
