"""Answers that take long to find: asked of a child process, and kept on this machine.

Of models: transformers and vLLM build one without memory for its weights. vLLM is asked about
families that nobody here has modelled and the installed vLLM serves: its own model says how many
parameters it has, its layers what they keep (``get_kv_cache_spec``). transformers is asked for
parameters alone. Importing them takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.hf_config import ConfigFile, has_defaults
from samullm_plugin.checkpoints.parts import (
    Attention,
    Layer,
    Layers,
    Matrix,
    Mlp,
    Part,
    StateSpace,
)
from samullm_plugin.model.engine_config import vllm_version


def cache_folder(name: str) -> Path:
    """Return the folder of one kind of answers.

    In the folder that the setting ``SAMULLM_CACHE_DIR`` names, by default the user's cache
    (``XDG_CACHE_HOME``).
    """
    if own := os.environ.get("SAMULLM_CACHE_DIR"):
        return Path(own) / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "samullm" / name


def read_kept(name: str, key: str) -> dict[str, Any] | None:
    """Return a kept answer; None if there is none that can be read."""
    try:
        value = json.loads((cache_folder(name) / f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def keep(name: str, key: str, value: object) -> bool:
    """Keep an answer, whole or not at all; return whether this machine has a place for it."""
    folder = cache_folder(name)
    new = folder / f".{key}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(value), encoding="utf-8")
        new.replace(folder / f"{key}.json")
    except OSError:
        return False
    return True


logger = logging.getLogger(__name__)

_answers: dict[tuple[str, str], Any] = {}


def installed(package: str) -> str | None:
    """Return the version of a package, without importing it; None where it is missing."""
    if find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ask(
    kind: str, script: str, question: str, asked: str, *, limit_s: float, remark: str = ""
) -> Any:
    """Return what a script answers, so that no class of a library stays in this process.

    It prints ``answer`` and JSON; whatever else it does means that it has no answer.

    Args:
        kind: of answers, under which they are kept.
        script: Python; it reads the question.
        question: what is asked.
        asked: library and version: another one may answer otherwise.
        limit_s: seconds that it may take.
        remark: what is said where nobody has asked before.

    Returns:
        None if it has no answer, which is kept as well; also if it could not run, was killed or
        took too long, which is not.
    """
    key = hashlib.sha256(f"{asked} {question}".encode()).hexdigest()[:32]
    if (kind, key) not in _answers:
        kept = read_kept(kind, key)
        if kept is None:
            if remark:
                logger.warning(remark)
            done = _run(script, question, limit_s)
            if done is None:
                return None
            kept = {"answer": done[0]}
            keep(kind, key, kept)
        _answers[kind, key] = kept.get("answer")
    return _answers[kind, key]


def _run(script: str, question: str, limit_s: float) -> tuple[Any] | None:
    """Return the answer of a child process; None if it could not run to its end."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            check=False, input=question, capture_output=True, text=True, timeout=limit_s,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.info("asking failed: %s", error)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("answer "):
            return (json.loads(line.removeprefix("answer ")),)
    logger.info("it cannot be built: %s", done.stderr[-2000:])
    return None if done.returncode < 0 else (None,)


_LIMIT_S = 600.0

_SCRIPT = """
import json, os, sys, tempfile, warnings
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="",
                  VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
warnings.filterwarnings("ignore")
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
raw = json.load(sys.stdin)
for name in ("auto_map", "quantization_config"):  # no code of the folder; parameters, not bytes
    raw.pop(name, None)
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/config.json", "w") as file:
        json.dump(raw, file)
    config = EngineArgs(
        model=folder, runner="generate", skip_tokenizer_init=True, enforce_eager=True,
        dtype="bfloat16", load_format="dummy", max_model_len=2048, enable_prefix_caching=False,
    ).create_engine_config()
    if config.model_config.is_encoder_decoder:
        sys.exit("a model of encoder and decoder")
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "file://" + folder + "/store", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        layers = []
        for layer in config.compilation_config.static_forward_context.values():
            spec = layer.get_kv_cache_spec(config) if hasattr(layer, "get_kv_cache_spec") else None
            if spec is None:
                continue
            entry = {"spec": type(spec).__name__}
            if hasattr(spec, "shapes"):
                entry["state"] = [[str(d).removeprefix("torch."), torch.Size(s).numel()]
                                  for s, d in zip(spec.shapes, spec.dtypes)]
            else:
                entry.update(
                    kv_heads=spec.num_kv_heads, dtype=str(spec.dtype).removeprefix("torch."),
                    token_bytes=spec.page_size_bytes / spec.block_size,
                    window=getattr(spec, "sliding_window", None)
                    or getattr(spec, "attention_chunk_size", None) or 0,
                )
            layers.append(entry)
named = list(model.named_parameters())
print("answer", json.dumps({
    "layers": layers,
    "parameters": sum(p.numel() for _, p in named),
    "experts": sum(p.numel() for n, p in named if ".experts." in n),
}))
sys.stdout.flush()
os._exit(0)
"""

_KINDS: Mapping[str, str] = {
    "FullAttentionSpec": "full", "MLAAttentionSpec": "full", "SlidingWindowSpec": "sliding_window",
    "SlidingWindowMLASpec": "sliding_window", "ChunkedLocalAttentionSpec": "chunked_local",
}  # fmt: skip


def ask_vllm(file: ConfigFile) -> Layers | None:
    """Return what vLLM says a model is; all weights are spread over its layers alike.

    Args:
        file: the ``config.json``.

    Returns:
        None where vLLM is not installed, does not serve or cannot build the architecture, or keeps
        something else than entries of tokens and states of sequences.
    """
    found = vllm_version()
    if found is None or not _served(file.raw.get("architectures")):
        return None
    answer = ask(
        "vllm_models",
        _SCRIPT,
        json.dumps(dict(file.raw), sort_keys=True),
        found[1],
        limit_s=_LIMIT_S,
        remark=f"vLLM {found[1]} is asked what this model is, once; it may take minutes",
    )
    return _read(file, answer) if isinstance(answer, dict) else None


def _served(architectures: object) -> bool:
    """Return whether vLLM's table of models names an architecture; it is read, not imported."""
    package = find_spec("vllm")
    places = [] if package is None else package.submodule_search_locations or []
    tables = [Path(p) / "model_executor" / "models" / "registry.py" for p in places]
    texts = [t.read_text("utf-8").split("_PREVIOUSLY_SUPPORTED")[0] for t in tables if t.is_file()]
    wanted = architectures if isinstance(architectures, list) else []
    return any(f'"{name}"' in text for text in texts for name in wanted)


def _read(file: ConfigFile, answer: Mapping[str, Any]) -> Layers | None:
    """Return an answer as parts; None if a layer keeps what is neither a token's nor a state."""
    text = file.text
    heads = text.number("num_attention_heads", 1)
    ours: Sequence[Mapping[str, Any]] = answer["layers"]
    outside = 2 * text.number("vocab_size", 0) * text.number("hidden_size", 0)
    experts = int(answer["experts"])
    rest = max(int(answer["parameters"]) - experts - outside, 0)
    kinds, active = text.number("num_experts", 0), text.number("num_experts_per_tok", 1)
    layers = []
    for i, entry in enumerate(ours):
        mine, routed = _share(rest, i, len(ours)), _share(experts, i, len(ours))
        used = mine + (routed * active // kinds if kinds else routed)
        mlp = Mlp(
            (
                Part(f"layers.{i}.mlp", (Matrix(f"layers.{i}.mlp", mine, 1),)),
                Part("experts", (Matrix(f"layers.{i}.mlp.experts", routed, 1),), experts=True),
            ),
            text.number("moe_intermediate_size", 0) or text.number("intermediate_size", 1),
            kinds, active, used,
        )  # fmt: skip
        nothing = Part(f"layer {i}")
        if entry["spec"] == "MambaSpec":
            sizes = {"bfloat16": 0, "float32": 0}
            for dtype, size in entry["state"]:
                if dtype not in sizes:
                    return None
                sizes[dtype] += size
            state = StateSpace(nothing, sizes["bfloat16"], sizes["float32"], "float32")
            layers.append(Layer(state=state, mlp=mlp))
            continue
        kind, kv_heads = _KINDS.get(entry["spec"]), int(entry["kv_heads"])
        if kind is None:
            return None
        head_bytes = entry["token_bytes"] / kv_heads
        whole = entry["dtype"] != "bfloat16"  # an index, whose type engine settings do not change
        attention = Attention(
            kind,  # type: ignore[arg-type]  # one of the above
            heads, kv_heads, 0 if whole else round(head_bytes / 2), nothing,
            int(entry["window"]), side_bytes=round(head_bytes) if whole else 0,
        )  # fmt: skip
        layers.append(Layer(attention, None, mlp))
    around = int(answer["parameters"]) - experts - rest
    return Layers(tuple(layers), (Part("embedding and head", others=around),))


def _share(total: int, i: int, parts: int) -> int:
    """Return the ``i``-th of as equal parts as there are."""
    return total * (i + 1) // parts - total * i // parts


_DIFFERENT = frozenset({"longcat_flash"})
"""Families whose classes hold weights that no checkpoint has (experts that do nothing)."""
_COUNT_SCRIPT = """
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
    answer = ask("parameters", _COUNT_SCRIPT, question, asked, limit_s=_LIMIT_S)
    return answer if isinstance(answer, int) else None
