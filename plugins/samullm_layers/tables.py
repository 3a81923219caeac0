"""Tables of measured layer times.

``dense.csv``, ``per_sequence.csv``, ``attention.csv``, ``skew_fit.csv`` and ``meta.yaml``, each
plain or with ``.gz``. The format is that of LLMServingSim (casys-kaist/LLMServingSim @ 5daddb21);
times are microseconds of device time on one GPU of a tensor-parallel group.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from samullm_plugin import InputError
from samullm_plugin.model.types import Floats

PER_LAYER = {
    "layernorm": 2,  # before attention and before the MLP
    "qkv_proj": 1,
    "qk_norm": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
    "all_reduce": 2,  # after o_proj and after down_proj
}
"""Calls of each layer in one transformer layer."""
ONCE = ("embedding", "final_layernorm")
"""Layers called once in an iteration."""
REQUIRED = (
    "embedding", "final_layernorm", "layernorm", "qkv_proj", "o_proj", "gate_up_proj", "act_fn",
    "down_proj",
)  # fmt: skip
ATTENTION_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
SKEW_LABELS = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")

Series = tuple[Floats, Floats]
"""Arguments in increasing order and the seconds at each."""


@dataclass(frozen=True, slots=True)
class LayerTables:
    """Measured layers of one model, device and tensor-parallel size.

    Attributes:
        folder: where they were read from.
        dense: seconds of each layer by tokens.
        per_sequence: seconds of each layer by sequences.
        attention: rows of prefill chunk, tokens computed before it, decode sequences, tokens of
            each, shape ``(m, 4)``.
        attention_s: seconds of each row, shape ``(m,)``.
        skew: rows of prefill chunk and upper bounds of decode sequences, share of the longest,
            longest sequence and tokens before the chunk, shape ``(k, 5)``; ``k`` may be 0.
        skew_share: where between all-mean and all-longest such a batch lies, shape ``(k,)``.
        default_share: the same for batches no row of ``skew`` covers.
        about: device, tool and date, for provenance.
    """

    folder: Path
    dense: dict[str, Series]
    per_sequence: dict[str, Series]
    attention: Floats
    attention_s: Floats
    skew: Floats
    skew_share: Floats
    default_share: float
    about: str


def read_tables(folder: Path, size: int) -> LayerTables:
    """Read the tables of one tensor-parallel size.

    Args:
        folder: the ``tp<N>`` folder; ``meta.yaml`` may lie in it or beside it.
        size: ``N``.

    Raises:
        InputError: naming file, row and what is wrong.
    """
    dense = _series(folder, "dense.csv", "tokens")
    file = _find(folder, "dense.csv")
    for layer in REQUIRED:
        if layer not in dense:
            raise InputError(f"{file}: no rows for layer {layer!r}; profile it as well")
    unknown = set(dense) - set(PER_LAYER) - set(ONCE)
    if unknown:
        raise InputError(
            f"{file}: layer {sorted(unknown)[0]!r} is not one whose calls are known; known: "
            f"{', '.join((*PER_LAYER, *ONCE))}"
        )
    per_sequence = _series(folder, "per_sequence.csv", "sequences")
    if "lm_head" not in per_sequence:
        raise InputError(f"{_find(folder, 'per_sequence.csv')}: no rows for layer 'lm_head'")
    points, seconds = _attention(folder)
    meta = _meta(folder)
    bounds, shares, default = _skew(folder, meta, size)
    said = [meta.get("gpu"), f"vLLM {meta['vllm_version']}" if "vllm_version" in meta else None]
    about = ", ".join(str(s) for s in said if s) or str(folder)
    return LayerTables(folder, dense, per_sequence, points, seconds, bounds, shares, default, about)


def find_table(folder: Path, name: str) -> Path | None:
    """Return a table's path, plain or compressed, or None if there is none."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((c for c in candidates if c.is_file()), None)


def _find(folder: Path, name: str) -> Path:
    found = find_table(folder, name)
    if found is None:
        raise InputError(f"{folder}: {name} (or {name}.gz) is missing; profile the layers again")
    return found


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Table:
    """Columns of a file as text, with the line each row ends at."""

    file: Path
    columns: dict[str, tuple[str, ...]]
    lines: list[int]

    def numbers(self, column: str, least: float) -> Floats:
        """Return a column as numbers of at least ``least``.

        Raises:
            InputError: naming the first row that holds another.
        """
        texts = self.columns[column]
        try:
            values = np.array(texts, dtype=np.float64)
        except ValueError:
            values = np.array([_float(t) for t in texts])
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= least)))
        if len(wrong):
            row = int(wrong[0])
            bound = f" of at least {least:g}" if math.isfinite(least) else ""
            raise InputError(
                f"{self.file}:{self.lines[row]}: {column} is {texts[row]!r}; it must be a "
                f"number{bound}"
            )
        return values


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _read(file: Path, columns: Sequence[str]) -> _Table:
    """Return the named columns of a file.

    Raises:
        InputError: if a column is missing, a row is short, or there are no rows.
    """
    reader = csv.reader(io.StringIO(_text(file)))
    head = next(reader, [])
    missing = [c for c in columns if c not in head]
    if missing:
        raise InputError(
            f"{file}: column {missing[0]!r} is missing; the columns are {', '.join(columns)}"
        )
    rows, lines = [], []
    for row in reader:
        if not row:
            continue
        if len(row) < len(head):
            raise InputError(f"{file}:{reader.line_num}: a value is missing")
        rows.append(row)
        lines.append(reader.line_num)
    if not rows:
        raise InputError(f"{file}: no rows")
    by_column = list(zip(*(row[: len(head)] for row in rows), strict=True))
    return _Table(file, {c: by_column[head.index(c)] for c in columns}, lines)


def _series(folder: Path, name: str, argument: str) -> dict[str, Series]:
    """Return seconds by layer; repeated arguments are averaged."""
    file = _find(folder, name)
    table = _read(file, ("layer", argument, "time_us"))
    found: dict[str, dict[float, list[float]]] = {}
    columns = table.columns["layer"], table.numbers(argument, 1), table.numbers("time_us", 0)
    for layer, x, y in zip(*columns, strict=True):
        found.setdefault(layer, {}).setdefault(float(x), []).append(float(y) * 1e-6)
    result: dict[str, Series] = {}
    for layer, by_argument in found.items():
        knots = sorted(by_argument)
        if len(knots) < 2:
            raise InputError(
                f"{file}: layer {layer!r} has one {argument} only; at least two are needed"
            )
        means = [sum(by_argument[k]) / len(by_argument[k]) for k in knots]
        result[layer] = np.array(knots), np.array(means)
    return result


def _attention(folder: Path) -> tuple[Floats, Floats]:
    table = _read(_find(folder, "attention.csv"), (*ATTENTION_AXES, "time_us"))
    points = np.column_stack([table.numbers(c, 0) for c in ATTENTION_AXES])
    nothing = np.flatnonzero((points[:, 0] == 0) & (points[:, 2] == 0))
    if len(nothing):
        raise InputError(
            f"{table.file}:{table.lines[int(nothing[0])]}: neither prefill_chunk nor n_decode is "
            "above 0: nothing is computed"
        )
    for column, what in ((0, "prefill_chunk"), (2, "n_decode")):
        if not points[:, column].any():
            raise InputError(f"{table.file}: no rows with {what} above 0; profile them as well")
    return points, table.numbers("time_us", 0) * 1e-6


def _meta(folder: Path) -> dict[str, Any]:
    """Return ``meta.yaml``, or nothing if there is none."""
    file = find_table(folder, "meta.yaml") or find_table(folder.parent, "meta.yaml")
    if file is None:
        return {}
    try:
        meta = yaml.safe_load(_text(file))
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {error}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{file}: must be a mapping")
    return meta


def _skew(folder: Path, meta: dict[str, Any], size: int) -> tuple[Floats, Floats, float]:
    """Return the cells of the skew table, their shares, and the share of all others."""
    file = find_table(folder, "skew_fit.csv")
    fit = meta.get("skew_fit") or {}
    if file is None or fit.get("enabled") is False:
        # Said to be switched off: the table beside it was not measured on this device.
        return np.zeros((0, 5)), np.zeros(0), 0.0
    table = _read(file, ("pc", *SKEW_LABELS, "alpha", "n_samples"))
    bounds = np.column_stack([table.numbers("pc", 0), *(_bounds(table, c) for c in SKEW_LABELS)])
    shares = table.numbers("alpha", -math.inf)
    samples = np.maximum(table.numbers("n_samples", 0), 1e-9)
    pooled = float(np.average(shares, weights=samples))
    per_size = fit.get("per_tp") or {}
    entry = per_size.get(size) or per_size.get(str(size)) or {}
    default = entry.get("alpha_default", pooled)
    return bounds, shares, float(default)


def _bounds(table: _Table, column: str) -> Floats:
    """Return the upper bounds that labels such as ``n<=128``, ``sr<=15%`` or ``kp=0`` name.

    Raises:
        InputError: naming the row of a label of another form.
    """
    bound = {label: _bound(label) for label in set(table.columns[column])}
    for line, label in zip(table.lines, table.columns[column], strict=True):
        if math.isnan(bound[label]):
            raise InputError(
                f"{table.file}:{line}: {column} is {label!r}; it must be of the form name<=bound"
            )
    return np.array([bound[label] for label in table.columns[column]])


def _bound(label: str) -> float:
    if ">" in label:
        return math.inf
    text = label.rsplit("=", 1)[-1].lower()
    factor = 1.0
    for suffix, value in (("%", 0.01), ("k", 1024.0), ("m", 1024.0**2)):
        if text.endswith(suffix):
            text, factor = text.removesuffix(suffix), value
    return _float(text) * factor
