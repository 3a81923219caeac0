"""Bundled tables of measured output lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from samullm_plugin.checkpoints.models import find_name, short_name
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.lengths import LengthDistribution


@dataclass(frozen=True, slots=True, eq=False)
class LengthTable:
    """Measured output lengths of one model.

    Attributes:
        model: its name in the measurements.
        distribution: of the output lengths.
        num_observations: number of outputs behind it.
        source: where they were measured.
    """

    model: str
    distribution: LengthDistribution
    num_observations: int
    source: str


@cache
def _read(name: str) -> Mapping[str, Any]:
    text = (files("samullm_plugin") / "data" / "lengths" / name).read_text(encoding="utf-8")
    table: Mapping[str, Any] = json.loads(text)
    return table


def measured_models() -> tuple[str, ...]:
    """Return the names of the models with bundled output lengths."""
    return tuple(_read("no_robots.json")["models"])


@cache
def measured_lengths(model: str) -> LengthTable | None:
    """Return the bundled output lengths of a model, named with or without organisation."""
    table = _read("no_robots.json")
    name = find_name(model, table["models"])
    if name is None:
        return None
    entry = table["models"][name]
    top = 1.0 - entry["cut_mass"]
    grid = np.array(table["probabilities"]) * top
    lengths = np.array(entry["lengths"], np.float64)
    if not len(lengths):  # every output ran into the context limit
        empty = np.empty(0, np.int64)
        distribution = LengthDistribution(empty, np.empty(0), entry["cut_at"])
    else:
        distribution = LengthDistribution.from_quantiles(grid, lengths, censored_at=entry["cut_at"])
    return LengthTable(name, distribution, entry["num_observations"], table["source"])


def workloads() -> tuple[str, ...]:
    """Return the names of the bundled workloads of other origin."""
    return tuple(_read("workloads.json")["workloads"])


@cache
def workload_lengths(name: str) -> LengthTable:
    """Return the output lengths of another real workload, to try plans on shifted lengths.

    Raises:
        InputError: naming the workloads there are.
    """
    table = _read("workloads.json")
    if name not in table["workloads"]:
        known = ", ".join(table["workloads"])
        raise InputError(
            f"unknown workload {name!r}{suggest(name, table['workloads'])}; known: {known}"
        )
    entry = table["workloads"][name]
    distribution = LengthDistribution.from_quantiles(
        np.array(table["probabilities"]), np.array(entry["lengths"], np.float64)
    )
    return LengthTable(name, distribution, entry["num_observations"], table["source"])


def unknown_model(model: str) -> InputError:
    """Return the error for a model without measured lengths."""
    known = measured_models()
    hint = suggest(short_name(model), (short_name(k) for k in known))
    return InputError(
        f"model {model}: no output lengths were measured for it{hint}; measured: "
        f"{', '.join(known)}; measure it with `samullm profile lengths`, or name a measured model "
        "that stands in for it under length_estimator.options.stand_ins"
    )
