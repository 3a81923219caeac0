"""Read tables of model sizes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.records import read_record

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
