"""The scheduler ``exact``."""

from __future__ import annotations

from samullm_cpsat.options import ExactOptions
from samullm_plugin import InputError, Plan, Problem, StageScheduler, hookimpl
from samullm_plugin.host.interfaces.scheduler import SchedulingContext

LIMITS = {"no-switching": (16, 16), "segments": (5, 8)}
"""By structure, most nodes and most GPUs unless the options say otherwise."""


class Exact(StageScheduler):
    """Finds a plan of a stated structure and proves how good it is, by constraint programming.

    The optimum of the structure is that of its work model, with durations from the host's own
    simulations; see ``docs/exact.md``.
    """

    name = "exact"
    Config = ExactOptions
    config: ExactOptions

    def schedule(self, problem: Problem, context: SchedulingContext) -> Plan:
        """Return the best plan of the structure that was found within the limits.

        Raises:
            InputError: if the instance is too large, naming the limit.
        """
        from samullm_cpsat.planning import plan_exactly

        self._check_size("nodes", len(problem.app.nodes), self.config.max_nodes, 0)
        self._check_size("GPUs", problem.cluster.num_gpus, self.config.max_gpus, 1)
        return plan_exactly(problem, context, self.config)

    def _check_size(self, what: str, size: int, limit: int | None, which: int) -> None:
        """Refuse an instance that is too large."""
        structure = self.config.structure
        most = LIMITS[structure][which] if limit is None else limit
        if size > most:
            raise InputError(
                f"scheduler exact: the instance has {size} {what}, and structure {structure} is "
                f"limited to {most}; use scheduler auto, or raise option max_{what.lower()}"
            )


@hookimpl
def register_schedulers(register):  # type: ignore[no-untyped-def]  # typed by the hook
    """Offer ``exact``."""
    register(Exact)
