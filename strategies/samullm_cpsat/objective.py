"""What is minimised."""

from __future__ import annotations

from ortools.sat.python import cp_model

from samullm_cpsat.variables import Variables


def minimise_makespan(model: cp_model.CpModel, v: Variables, bound: int) -> None:
    """Minimise the tick at which the last task has finished, known to be at least ``bound``."""
    assert v.makespan is not None
    model.add(v.makespan >= bound)
    model.minimize(v.makespan)
