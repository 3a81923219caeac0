"""Measured engine iterations as columns, and the tables that they and model sizes are read from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.latency import StepTable
from samullm_plugin.model.types import Bools, Floats, Ints
from samullm_plugin.records import read_record

_STALL_RATIO = 2.0
_STALL_MIN_S = 0.003
"""A host stalled if it took so many times the usual time, and so much longer (choices)."""


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """Measured iterations, one row each.

    Attributes:
        model: model name.
        tensor_parallel_size: devices it ran on.
        device: device name, as the table gives it.
        phase: ``decode``, ``prefill`` or ``mixed``, shape ``(n,)``.
        shape: what the rows were made as, such as ``uniform`` or ``skew``, shape ``(n,)``.
        batch_size: scheduled sequences, shape ``(n,)``.
        steps: composition of the iterations as they were computed. An engine that pads prompts
            computes ``padded_tokens``; those are the tokens here, because vLLM V1 computes only
            real ones: a fit on padded tokens evaluated on real tokens is what V1 would take.
        seconds: whole iteration on the engine, the measuring code's own logging subtracted.
        device_s: device-synchronised model forward, or NaN where it was not measured.
    """

    model: str
    tensor_parallel_size: int
    device: str
    phase: NDArray[np.str_]
    shape: NDArray[np.str_]
    batch_size: Ints
    steps: StepTable
    seconds: Floats
    device_s: Floats

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.seconds)

    def where(self, keep: Bools) -> Iterations:
        """Return the rows for which ``keep`` is true."""
        steps = self.steps
        chosen = StepTable(
            steps.num_seqs[keep],
            steps.num_tokens[keep],
            steps.prefill_seqs[keep],
            steps.prefill_tokens[keep],
            steps.prefill_pairs[keep],
            steps.context_tokens[keep],
            steps.longest_tokens[keep],
        )
        return Iterations(
            self.model,
            self.tensor_parallel_size,
            self.device,
            self.phase[keep],
            self.shape[keep],
            self.batch_size[keep],
            chosen,
            self.seconds[keep],
            self.device_s[keep],
        )

    @property
    def host_s(self) -> Floats:
        """Return the seconds outside the model forward (NaN where that was not measured)."""
        return self.seconds - self.device_s

    def host_stalls(self) -> Floats:
        """Return the seconds by which the host stalled in each row, 0 in most, shape ``(n,)``.

        A row stalled if its host time exceeds twice the usual one of rows with about as many
        sequences in the same phase, and that by at least 3 ms: garbage collection and the like, of
        the measuring process. Rows without a separate device time have no known stall.
        """
        host = self.host_s
        stalls = np.zeros(len(self))
        bands = np.floor(4 * np.log2(np.maximum(self.batch_size, 1))).astype(np.int64)
        for phase in np.unique(self.phase):
            for band in np.unique(bands):
                rows = (self.phase == phase) & (bands == band) & np.isfinite(host)
                # Long-context rows prepare longer inputs: compare like with like.
                tokens = self.steps.context_tokens + self.steps.prefill_tokens
                for part in (tokens > 8 * self.batch_size, tokens <= 8 * self.batch_size):
                    chosen = rows & part
                    if np.count_nonzero(chosen) < 3:
                        continue
                    usual = np.median(host[chosen])
                    stalled = chosen & (host > max(_STALL_RATIO * usual, usual + _STALL_MIN_S))
                    stalls[stalled] = host[stalled] - usual
        return stalls


_REQUIRED = ("phase", "batch_size", "context_tokens", "max_seq_len", "new_tokens", "iter_s")
_OPTIONAL = (
    "padded_tokens",
    "comp_s",
    "meta_s",
    "warmup",
    "prefill_seqs",
    "prefill_tokens",
    "prefill_pairs",
)
_PHASES = ("decode", "prefill", "mixed")


def read_iterations(
    path: Path, *, model: str | None = None, tensor_parallel_size: int | None = None
) -> list[Iterations]:
    """Read a CSV table (``.csv`` or ``.csv.gz``), one row per iteration, by model and size.

    Columns: ``model`` and ``tp`` (unless given as arguments), ``phase`` (decode, prefill, mixed),
    ``batch_size``, ``context_tokens`` (decode: sum of lengths with the current token; prefill:
    prompt tokens), ``max_seq_len``, ``new_tokens``, ``iter_s``; optional ``device``, ``shape``,
    ``padded_tokens``, ``comp_s``, ``meta_s`` (subtracted), ``warmup`` (1: left out). Mixed rows
    need ``prefill_seqs``, ``prefill_tokens``, ``prefill_pairs``; their ``context_tokens`` and
    ``max_seq_len`` are those of the decode sequences.

    Args:
        path: the table.
        model: take only this model; or the name, if the table has no such column.
        tensor_parallel_size: the same for the size.

    Raises:
        InputError: naming file, row and remedy.
    """
    groups: dict[tuple[str, int], list[tuple[str, str, str, list[float]]]] = {}
    fields, rows = _open(path)
    missing = [c for c in _REQUIRED if c not in fields]
    if model is None and "model" not in fields:
        missing.append("model")
    if tensor_parallel_size is None and "tp" not in fields:
        missing.append("tp")
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; the table needs {', '.join(_REQUIRED)}, and "
            "model and tp (or --model and --tp)"
        )
    for line, row in rows:
        name = row.get("model") or model or ""
        size = _number(path, line, row, "tp") if row.get("tp") else float(tensor_parallel_size or 0)
        if not name or size < 1 or size != int(size):
            raise InputError(f"{path}, row {line}: model {name!r} and tp {size:g} are not usable")
        if (model is not None and name != model) or (
            tensor_parallel_size is not None and size != tensor_parallel_size
        ):
            continue
        values = [_number(path, line, row, c) for c in _REQUIRED[1:]]
        values += [_number(path, line, row, c) if row.get(c) else math.nan for c in _OPTIONAL]
        if values[_INDEX["warmup"]] == 1:
            continue
        _check(path, line, row, values)
        groups.setdefault((name, int(size)), []).append(
            (row.get("device") or "", row["phase"], row.get("shape") or "uniform", values)
        )
    if not groups:
        wanted = "" if model is None else f" of {model}"
        wanted += "" if tensor_parallel_size is None else f" at tp {tensor_parallel_size}"
        raise InputError(f"{path}: no rows{wanted}; check the file, --model and --tp")
    return [_table(key, rows_) for key, rows_ in groups.items()]


_INDEX = {name: i for i, name in enumerate((*_REQUIRED[1:], *_OPTIONAL))}


def _open(path: Path) -> tuple[list[str], Iterator[tuple[int, Mapping[str, str]]]]:
    """Return the column names and the rows with their line numbers."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a CSV table: {error}") from error
    reader = csv.reader(io.StringIO(text))
    fields = next(reader, [])

    def rows() -> Iterator[tuple[int, Mapping[str, str]]]:
        for line, cells in enumerate(reader, start=2):
            if len(cells) != len(fields):
                raise InputError(
                    f"{path}, row {line}: {len(cells)} cells, but {len(fields)} columns"
                )
            yield line, dict(zip(fields, cells, strict=True))

    return fields, rows()


def _number(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    """Return a finite, non-negative number.

    Raises:
        InputError: naming file, row and column.
    """
    text = row[column]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise InputError(
            f"{path}, row {line}: {column} is {text!r}; it must be a number of at least 0 "
            "(remove or repeat the measurement)"
        )
    return value


def _check(path: Path, line: int, row: Mapping[str, str], values: list[float]) -> None:
    """Refuse rows that no iteration can have.

    Raises:
        InputError: naming file, row and column.
    """
    where = f"{path}, row {line}"
    if row["phase"] not in _PHASES:
        raise InputError(f"{where}: phase is {row['phase']!r}; it must be one of {_PHASES}")
    at = _INDEX
    if values[at["batch_size"]] < 1:
        raise InputError(f"{where}: batch_size is {row['batch_size']}; it must be at least 1")
    meta = values[at["meta_s"]]
    seconds = values[at["iter_s"]] - (0.0 if math.isnan(meta) else meta)
    if seconds <= 0:
        raise InputError(f"{where}: iter_s less meta_s is {seconds:g}; it must be positive")
    if values[at["comp_s"]] > values[at["iter_s"]]:
        raise InputError(f"{where}: comp_s is larger than iter_s, of which it is a part")
    if row["phase"] == "mixed" and any(
        math.isnan(values[at[c]]) for c in ("prefill_seqs", "prefill_tokens", "prefill_pairs")
    ):
        raise InputError(
            f"{where}: a mixed iteration needs prefill_seqs, prefill_tokens and prefill_pairs"
        )


def _table(key: tuple[str, int], rows: list[tuple[str, str, str, list[float]]]) -> Iterations:
    """Return the columns of one model at one size."""
    values = np.array([r[3] for r in rows])
    column = {name: values[:, i] for name, i in _INDEX.items()}
    phase = np.array([r[1] for r in rows])
    prefill, mixed = phase == "prefill", phase == "mixed"
    size, new = column["batch_size"], column["new_tokens"]
    computed = np.where(np.isnan(column["padded_tokens"]), new, column["padded_tokens"])
    mean = computed / size
    # Of a pure prefill without recorded pairs: prompts of equal length, as it was computed.
    own_pairs = size * mean * (mean + 1) / 2
    pairs = np.where(np.isnan(column["prefill_pairs"]), own_pairs, column["prefill_pairs"])
    prefill_seqs = np.where(mixed, column["prefill_seqs"], np.where(prefill, size, 0))
    prefill_tokens = np.where(mixed, column["prefill_tokens"], np.where(prefill, computed, 0))
    steps = StepTable(
        num_seqs=size.astype(np.int64),
        num_tokens=np.where(prefill, computed, new).astype(np.int64),
        prefill_seqs=prefill_seqs.astype(np.int64),
        prefill_tokens=prefill_tokens.astype(np.int64),
        prefill_pairs=np.where(prefill | mixed, pairs, 0.0),
        context_tokens=np.where(prefill, 0.0, column["context_tokens"]),
        longest_tokens=np.where(prefill, 0.0, column["max_seq_len"]),
    )
    meta = np.nan_to_num(column["meta_s"])
    return Iterations(
        model=key[0],
        tensor_parallel_size=key[1],
        device=rows[0][0],
        phase=phase,
        shape=np.array([r[2] for r in rows]),
        batch_size=size.astype(np.int64),
        steps=steps,
        seconds=column["iter_s"] - meta,
        device_s=column["comp_s"],
    )


_COLUMNS = {
    "layers": "num_layers",
    "hidden_size": "hidden_size",
    "attention_heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def read_architectures(path: Path) -> dict[str, ModelArchitecture]:
    """Read sizes: CSV with one model per row, or a JSON object of name to sizes.

    CSV columns: model, layers, hidden_size, attention_heads, kv_heads, head_dim, intermediate_size,
    mlp (gated or plain), vocab_size, and for mixtures experts, active_experts. JSON: the fields
    of :class:`~samullm_plugin.model.architecture.ModelArchitecture`.

    Raises:
        InputError: naming file, model and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"{path}: must be a JSON object of model name to sizes")
        models = data.get("models", data)
        return {name: _make(path, name, sizes) for name, sizes in models.items()}
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in ("model", "mlp", *_COLUMNS) if c not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}")
    result: dict[str, ModelArchitecture] = {}
    for line, row in enumerate(reader, start=2):
        try:
            sizes: dict[str, Any] = {field: int(row[c]) for c, field in _COLUMNS.items()}
            sizes["num_experts"] = int(row.get("experts") or 0)
            sizes["num_active_experts"] = int(row.get("active_experts") or 0)
        except ValueError as error:
            raise InputError(f"{path}, row {line}: not a whole number: {error}") from error
        result[row["model"]] = _make(path, row["model"], {**sizes, "mlp": row["mlp"]})
    return result


def _make(path: Path, name: str, sizes: object) -> ModelArchitecture:
    """Return one model's sizes.

    Raises:
        InputError: naming the file and the model.
    """
    return read_record(ModelArchitecture, sizes, f"{path}: {name}")
