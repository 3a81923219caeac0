"""Asks transformers how many parameters a model has: it is built without memory for its weights."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from samullm_plugin.checkpoints.asking import ask, installed
from samullm_plugin.checkpoints.hf_config import ConfigFile, has_defaults

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
                         "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
                         "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
         for n in [getattr(auto, table, {}).get(kind)] if n]
wanted = [n for n in (raw.get("architectures") or ()) if hasattr(transformers, n)]
name = (wanted + [n if isinstance(n, str) else n[0] for n in names])[0]
for part in {id(c): c for c in (config, config.get_text_config())}.values():
    part.tie_word_embeddings = asked["tied"]
with torch.device("meta"):
    model = getattr(transformers, name)(config)
model.tie_weights()
print("answer", sum(p.numel() for p in model.parameters()))
"""


def count_parameters(file: ConfigFile, tied: bool) -> int | None:
    """Return the parameters by transformers; None where it is not installed or has no such class.

    The answer is kept per configuration and version of transformers.

    Args:
        file: the ``config.json``.
        tied: whether the head is the embedding, as an engine loads it.
    """
    asked = installed("transformers")
    if asked is None or find_spec("torch") is None or file.text.kind in _DIFFERENT:
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
    question = json.dumps({"config": dict(file.raw), "tied": tied}, sort_keys=True)
    answer = ask("parameters", _SCRIPT, question, asked, limit_s=_LIMIT_S)
    return answer if isinstance(answer, int) else None
