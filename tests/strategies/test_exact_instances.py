"""The stored instances: enough of every kind, and those that are quick are solved again."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from samullm_cpsat.instance import Instance
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.planning import solve_instance

FOLDER = Path(__file__).parents[1] / "instances"
SHAPES = (
    *("ensembling", "routing", "chain", "mixed", "map-reduce", "vote", "filter-vote"),
    *("pipeline", "diamond", "kinds", "machines", "equal", "long"),
)
QUICK_S = 0.5


@cache
def stored() -> dict[str, dict[str, Any]]:
    return {f.stem: json.loads(f.read_text()) for f in sorted(FOLDER.glob("*.json"))}


def test_there_are_enough_of_every_kind() -> None:
    instances = {name: Instance.from_json(data["instance"]) for name, data in stored().items()}
    assert len(instances) >= 100
    assert all(2 <= len(i.tasks) <= 9 and 2 <= i.num_devices <= 8 for i in instances.values())
    large = [i for i in instances.values() if len(i.tasks) >= 4 and i.num_devices == 8]
    assert len(large) >= 20
    for shape in SHAPES:
        assert any(name.startswith(shape) for name in instances), shape
    for i in instances.values():
        assert len({p.gpu for p in i.pools}) == 1 + i.name.startswith("kinds"), i.name
        assert len({p.machine for p in i.pools}) == 1 + i.name.startswith("machines"), i.name


def test_stored_figures_make_sense() -> None:
    for name, data in stored().items():
        best = data["best"]
        for structure, found in best.items():
            assert 0 < found["bound"] <= found["objective"], (name, structure)
            assert found["optimal"] == (found["bound"] == found["objective"]), (name, structure)
        if "segments" in best:  # a plan without switching is one in segments, too
            assert best["segments"]["bound"] <= best["no-switching"]["objective"], name
            assert best["segments"]["objective"] <= best["no-switching"]["objective"], name


QUICK = [
    (name, structure)
    for name, data in stored().items()
    for structure, found in data["best"].items()
    if found["seconds"] < (QUICK_S if structure == "no-switching" else QUICK_S / 2)
]


@pytest.mark.parametrize(("name", "structure"), QUICK, ids=[f"{n}-{s}" for n, s in QUICK])
def test_solved_again(name: str, structure: str) -> None:
    """Bounds and objectives of both runs do not contradict each other, and what was proven is."""
    data = stored()[name]
    known = data["best"][structure]
    options = ExactOptions.model_validate({"structure": structure, "time_limit_s": 20.0})
    outcome = solve_instance(Instance.from_json(data["instance"]), options).outcome
    assert outcome.bound <= known["objective"]
    assert known["bound"] <= outcome.objective
    if known["optimal"] and outcome.optimal:
        assert outcome.objective == known["objective"]
    assert outcome.optimal or outcome.objective <= known["objective"] * 1.05
