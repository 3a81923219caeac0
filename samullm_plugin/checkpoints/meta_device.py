"""Asks transformers how many parameters a model has: it is built without memory for its weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from samullm_plugin.checkpoints.hf_config import ConfigFile, has_defaults
from samullm_plugin.checkpoints.machine_cache import keep, read_kept

_DIFFERENT = frozenset({"longcat_flash"})
"""Families whose classes hold weights that no checkpoint has (experts that do nothing)."""
_LIMIT_S = 120.0

_SCRIPT = """
import json, os, sys, warnings
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")
warnings.filterwarnings("ignore")
import torch, transformers
from transformers.models.auto import modeling_auto as auto
asked = json.load(sys.stdin)
raw = asked["config"]
kind = raw.pop("model_type")
raw.pop("quantization_config", None)
config = transformers.AutoConfig.for_model(kind, **raw)
names = [n for table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
                         "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
         for n in [getattr(auto, table).get(kind)] if n]
wanted = [n for n in (raw.get("architectures") or ()) if hasattr(transformers, n)]
name = (wanted + [n if isinstance(n, str) else n[0] for n in names])[0]
for part in {id(c): c for c in (config, config.get_text_config())}.values():
    part.tie_word_embeddings = asked["tied"]
with torch.device("meta"):
    model = getattr(transformers, name)(config)
model.tie_weights()
print("parameters", sum(p.numel() for p in model.parameters()))
"""


def count_parameters(file: ConfigFile, tied: bool) -> int | None:
    """Return the parameters by transformers; None where it is not installed or has no such class.

    The answer is kept per configuration and version of transformers.

    Args:
        file: the ``config.json``.
        tied: whether the head is the embedding, as an engine loads it.
    """
    installed = _transformers()
    if installed is None or file.text.kind in _DIFFERENT:
        return None
    kind = file.top.kind
    package = find_spec("transformers")
    folder = kind.removesuffix("_thinker").replace("-", "_")
    places = [] if package is None else package.submodule_search_locations or []
    if not any((Path(place) / "models" / folder).is_dir() for place in places) and not (
        has_defaults(kind)
    ):
        return None
    if file.raw.get("auto_map") and not has_defaults(kind):
        return None  # the class comes with the model's files: its code is not run for a count
    asked = json.dumps({"config": dict(file.raw), "tied": tied}, sort_keys=True)
    return _asked(asked, installed)


@cache
def _transformers() -> str | None:
    """Return the version of transformers, None where it or torch is missing."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return None
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


@cache
def _asked(asked: str, installed: str) -> int | None:
    key = hashlib.sha256(f"{installed} {asked}".encode()).hexdigest()[:32]
    kept = read_kept("parameters", key)
    if kept is None:
        kept = {"parameters": _run(asked)}
        keep("parameters", key, kept)
    found = kept.get("parameters")
    return found if isinstance(found, int) else None


def _run(asked: str) -> int | None:
    """Return the answer of a child process, so that no class of transformers stays in this one."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            check=False,
            input=asked,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines():
        if line.startswith("parameters "):
            return int(line.split()[1])
    return None
