"""What runs on this machine have measured, kept for the next plan.

One file per model files, kind of device, size, vLLM version and engine settings, in the user's
cache: iterations, from which a latency is fitted, seconds of engine starts, and output lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.checkpoints.asking import keep, read_kept
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.engine_config import vllm_version
from samullm_plugin.model.latency import StepLatency, StepTable
from samullm_plugin.model.lengths import LengthObservations
from samullm_plugin.model.types import Floats
from samullm_plugin.profiling.fitting import fit_iterations
from samullm_plugin.profiling.iterations import Iterations

_FOLDER = "calibrations"
_LENGTHS = "lengths"
_STARTS = "starts"
_COLUMNS = (
    "num_seqs", "num_tokens", "prefill_seqs", "prefill_tokens", "prefill_pairs", "context_tokens",
    "longest_tokens",
)  # fmt: skip
KEPT_ITERATIONS = 4000
"""Iterations that are kept of each setting: a sample of all that were seen."""
KEPT_LENGTHS = 2000
KEPT_STARTS = 20
LEAST_ITERATIONS = 50
"""Iterations from which they say more than a data sheet."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What was measured of one setting.

    Attributes:
        steps: sample of the iterations' compositions.
        seconds: what they took.
        num_iterations: all that were seen.
        start_s: seconds of engine starts.
    """

    steps: StepTable
    seconds: Floats
    num_iterations: int
    start_s: tuple[float, ...] = ()

    def latency(self, base: StepLatency) -> tuple[StepLatency, float]:
        """Return the latency of the iterations, and its mean absolute error on them in percent.

        Args:
            base: what was assumed before; scaled to the iterations where they are too few, or too
                alike, to be fitted.
        """
        table, seconds = self.steps, self.seconds
        count = len(seconds)
        rows = Iterations(
            "", 1, "", np.full(count, "mixed"), np.full(count, "run"), table.num_seqs, table,
            seconds, np.full(count, np.nan),
        )  # fmt: skip
        scaled = base.scaled(float(seconds.sum() / max(base.step_seconds(table).sum(), 1e-9)))
        candidates = [scaled]
        # A few iterations of one kind cannot be fitted: the assumed form, scaled, is all they tell.
        with contextlib.suppress(InputError, ValueError, np.linalg.LinAlgError):
            candidates.append(fit_iterations(rows).latency)
        errors = [self._error_pct(c) for c in candidates]
        best = int(np.argmin(errors))
        return candidates[best], errors[best]

    def _error_pct(self, latency: StepLatency) -> float:
        usual = np.abs(latency.step_seconds(self.steps) / self.seconds - 1)
        return float(100 * usual.mean())


def setting_key(
    model: ModelSpec, device: str, tensor_parallel_size: int, pipeline_parallel_size: int
) -> str:
    """Return what settings of equal iterations share: files, device, sizes, version, arguments."""
    engine, version = asdict(model.engine), " ".join(vllm_version() or ("none",))
    text = json.dumps(
        [_files(model), device, tensor_parallel_size, pipeline_parallel_size, version,
         engine, model.max_model_len],
        sort_keys=True, default=str,
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _files(model: ModelSpec) -> Any:
    """Return what tells a model's files from others: names and sizes, and the configuration."""
    folder = Path(model.path or model.name)
    config = folder / "config.json"
    try:
        text = config.read_bytes()
        files = sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors"))
    except OSError:
        return [model.path or model.name]
    return [hashlib.sha256(text).hexdigest(), files]


def read_calibration(key: str) -> Calibration | None:
    """Return what was measured of a setting; None if nothing was, or it cannot be read."""
    kept = read_kept(_FOLDER, key)
    if kept is None:
        return None
    try:
        steps = np.array(kept["steps"], np.float64).reshape(-1, len(_COLUMNS))
        seconds = np.array(kept["seconds"], np.float64)
        starts = tuple(float(s) for s in kept["start_s"])
        return Calibration(_table(steps), seconds, int(kept["num_iterations"]), starts)
    except (KeyError, TypeError, ValueError):
        return None


def _table(rows: Floats) -> StepTable:
    whole = rows[:, :4].astype(np.int64)
    return StepTable(*whole.T, *rows[:, 4:].T)


def add_calibration(key: str, new: Calibration, about: Mapping[str, object]) -> bool:
    """Add to what was measured of a setting; return whether it could be kept.

    Args:
        key: of the setting.
        new: what a run has measured.
        about: model, device and sizes, for people who look into the file.
    """
    old = read_calibration(key)
    total = new if old is None else _joined(old, new)
    rng = np.random.default_rng(total.num_iterations)
    rows = np.stack([getattr(total.steps, c).astype(np.float64) for c in _COLUMNS], axis=1)
    chosen = np.arange(len(rows))
    if len(rows) > KEPT_ITERATIONS:
        chosen = np.sort(rng.choice(len(rows), KEPT_ITERATIONS, replace=False))
    return keep(_FOLDER, key, {
        **about,
        "num_iterations": total.num_iterations,
        "steps": rows[chosen].tolist(),
        "seconds": total.seconds[chosen].tolist(),
        "start_s": total.start_s[-KEPT_STARTS:],
    })  # fmt: skip


def _joined(old: Calibration, new: Calibration) -> Calibration:
    """Return two calibrations as one."""
    columns = [
        np.concatenate([getattr(old.steps, c), getattr(new.steps, c)]) for c in _COLUMNS
    ]  # fmt: skip
    return replace(
        old,
        steps=StepTable(*columns),
        seconds=np.concatenate([old.seconds, new.seconds]),
        num_iterations=old.num_iterations + new.num_iterations,
        start_s=(*old.start_s, *new.start_s),
    )


def joined_steps(parts: Sequence[tuple[StepTable, Floats]]) -> tuple[StepTable, Floats]:
    """Return several tables of iterations as one."""
    columns = [np.concatenate([getattr(s, c) for s, _ in parts]) for c in _COLUMNS]
    return StepTable(*columns), np.concatenate([seconds for _, seconds in parts])


def start_factor(device: str) -> float | None:
    """Return what engine starts take on a kind of device here, as a share of what is assumed.

    The median of the starts that were seen, for models and sizes of which none was: else those
    nobody has tried would look quicker than those that were. None if none was seen.
    """
    kept = read_kept(_STARTS, _starts_key(device))
    try:
        found = [float(f) for f in (kept or {})["factors"]]
    except (KeyError, TypeError, ValueError):
        return None
    return float(np.median(found)) if found and min(found) > 0 else None


def add_start_factors(device: str, factors: Sequence[float]) -> bool:
    """Keep what starts took of what was assumed of them; return whether it could be kept."""
    key = _starts_key(device)
    old = (read_kept(_STARTS, key) or {}).get("factors") or []
    return keep(_STARTS, key, {"device": device, "factors": [*old, *factors][-KEPT_STARTS:]})


def _starts_key(device: str) -> str:
    text = json.dumps([device, " ".join(vllm_version() or ("none",))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


LengthRow = tuple[str, int, int, bool]
"""Task, prompt tokens, output tokens, and whether a limit cut the output."""


def _lengths_key(model: ModelSpec) -> str:
    text = json.dumps([_files(model), model.name], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def add_lengths(model: ModelSpec, rows: Sequence[LengthRow]) -> bool:
    """Keep output lengths of a model, the newest of each task first to stay."""
    key = _lengths_key(model)
    old = (read_kept(_LENGTHS, key) or {}).get("rows") or []
    return keep(_LENGTHS, key, {"model": model.name, "rows": [*old, *rows][-KEPT_LENGTHS:]})


def read_lengths(model: ModelSpec) -> list[LengthObservations]:
    """Return the output lengths of a model that runs on this machine have shown, by task."""
    kept = read_kept(_LENGTHS, _lengths_key(model))
    found = []
    try:
        rows = [(str(t), int(p), int(o), bool(c)) for t, p, o, c in (kept or {})["rows"]]
    except (KeyError, TypeError, ValueError):
        return []
    for task in sorted({row[0] for row in rows}):
        columns = [np.array([r[i] for r in rows if r[0] == task]) for i in (1, 2, 3)]
        seen = LengthObservations(model.name, task, columns[0], columns[1], columns[2] > 0)
        found.append(seen)
    return found
