"""Bytes of weights as a checkpoint stores them, and as an engine holds them.

Which weights a method shrinks, and what comes with them: AWQ and GPTQ pack linear layers and keep a
scale and a zero point a group; fp8 keeps a scale a tensor, row or block; mxfp4 packs experts in
blocks of 32 with one byte of scale each; bitsandbytes keeps a scale a block of 64. Embeddings,
heads, norms and routers keep their type unless the checkpoint says otherwise.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.hf_config import ConfigFile, load_json
from samullm_plugin.checkpoints.parts import Part
from samullm_plugin.errors import InputError

DTYPE_BYTES: Mapping[str, float] = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float64": 8, "int8": 1,
    "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1,
    "fp8_inc": 1, "fp8_ds_mla": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the matrices of linear layers are stored.

    Attributes:
        method: as vLLM names it.
        bits: of one weight.
        group: weights that share a scale; 0: one scale a row; -1: a tensor.
        scale_bytes: of one scale, zero points included.
        ignored: patterns of modules that keep their type.
        only_experts: only experts are shrunk.
        kv_cache_dtype: type of the KV cache that the checkpoint asks for; empty: none.
    """

    method: str
    bits: float
    group: int = -1
    scale_bytes: float = 4.0
    ignored: tuple[str, ...] = ()
    only_experts: bool = False
    kv_cache_dtype: str = ""

    def keeps(self, module: str) -> bool:
        """Return whether a module keeps its type."""
        return any(_matches(pattern, module) for pattern in self.ignored)

    def stored_bytes(self, part: Part, dtype_bytes: float) -> float:
        """Return the bytes of a part."""
        others = part.others * dtype_bytes
        if not part.matrices or self.keeps(part.module) or (self.only_experts and not part.experts):
            return others + part.matrices * dtype_bytes
        scales = part.outputs if self.group == 0 else 1
        if self.group > 0:
            scales = -(-part.matrices // self.group)
        return others + part.matrices * self.bits / 8 + scales * self.scale_bytes


def _matches(pattern: str, module: str) -> bool:
    """Return whether a pattern of ignored modules means a module."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return fnmatch.fnmatch(module, pattern) or fnmatch.fnmatch(module, f"{pattern}.*")
    stem = module.rsplit(".", 1)[0]
    return pattern == module or stem.endswith(pattern) or f".{pattern}." in f".{module}."


def read_quantization(file: ConfigFile) -> Quantization | None:
    """Return how a checkpoint's weights are stored; None: all in the model's type.

    Raises:
        InputError: naming the method, if it is not known.
    """
    section = next(
        (s[n] for s in (file.raw, file.text.given)
         for n in ("quantization_config", "compression_config") if isinstance(s.get(n), Mapping)),
        None,
    )  # fmt: skip
    if section is None and file.folder is not None:
        for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
            if (own := file.folder / name).is_file():
                section = load_json(own, "a quantisation's configuration")
                if name == "quantize_config.json":
                    section = {"quant_method": "gptq", **section}
                elif name == "quant_config.json":
                    section = {"quant_method": "awq", **section}
                break
    if section is None:
        return None
    return _of_section(section, file.file)


def _of_section(section: Mapping[str, Any], file: Path) -> Quantization:
    """Return what one configuration means."""
    method = str(section.get("quant_method") or "").lower().replace("_", "-")
    inner = section.get("quantization")
    if isinstance(inner, Mapping) and (
        "quant_algo" in inner or dict(section.get("producer") or {}).get("name") == "modelopt"
    ):
        return _modelopt({**section, **inner})
    ignored = tuple(str(v) for v in (
        section.get("modules_to_not_convert") or section.get("ignored_layers")
        or section.get("llm_int8_skip_modules") or section.get("ignore")
        or section.get("exclude") or section.get("exclude_modules") or ()
    ))  # fmt: skip
    bits = section.get("bits", section.get("w_bit", section.get("weight_bits")))
    group = section.get("group_size", section.get("q_group_size", section.get("groupsize", -1)))
    group = 0 if group in (None, -1) else int(group)
    if method in (
        "awq",
        "gptq",
        "awq-marlin",
        "gptq-marlin",
        "auto-round",
        "intel/auto-round",
        "auto-gptq",
        "auto-awq",
        "moe-wna16",
        "inc",
    ):
        bits = _bits(bits if bits is not None else 4, method, file)
        # Half-precision scales, and a packed zero point of as many bits as a weight.
        return Quantization(method, bits, group, 2 + bits / 8, ignored)
    if method in ("fp8", "fbgemm-fp8"):
        block = section.get("weight_block_size")
        group = int(block[0]) * int(block[1]) if block else (0 if method == "fbgemm-fp8" else -1)
        return Quantization(method, 8, group, 4, ignored)
    if method == "compressed-tensors":
        return _compressed_tensors(section, ignored, file)
    if method == "mxfp4":
        return Quantization(method, 4, 32, 1, ignored, only_experts=True)
    if method in ("bitsandbytes", "bnb"):
        four = bool(section.get("load_in_4bit", section.get("_load_in_4bit")))
        double = bool(section.get("bnb_4bit_use_double_quant"))
        if four:
            return Quantization("bitsandbytes", 4, 64, 1.0625 if double else 4, ignored)
        return Quantization("bitsandbytes", 8, 0, 4, ignored)
    if method.startswith("modelopt") or "quant_algo" in section:
        return _modelopt(section)
    if method in ("experts-int8", "int8"):
        return Quantization(method, 8, 0, 4, ignored, only_experts=method == "experts-int8")
    known = "awq, gptq, fp8, compressed-tensors, mxfp4, bitsandbytes, modelopt, auto-round"
    raise InputError(
        f"{file}: quantization {method or section!r} is not modelled (known: {known}); give the "
        "sizes under `architecture` in app.yaml, or a folder with its safetensors files"
    )


def _bits(value: object, method: str, file: Path) -> float:
    """Return a number of bits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 16:
        raise InputError(f"{file}: quantization {method}: bits is {value!r}; it must be 1 to 16")
    return float(value)


def _compressed_tensors(
    section: Mapping[str, Any], ignored: tuple[str, ...], file: Path
) -> Quantization:
    """Return the meaning of a compressed-tensors configuration (its first group of layers)."""
    groups = section.get("config_groups") or {}
    if not groups:
        raise InputError(f"{file}: compressed-tensors without config_groups is not modelled")
    weights = dict(next(iter(groups.values())).get("weights") or {})
    bits = _bits(weights.get("num_bits", 8), "compressed-tensors", file)
    strategy = str(weights.get("strategy") or "tensor")
    group = {"tensor": -1, "channel": 0, "token": 0}.get(strategy, -1)
    if strategy in ("group", "tensor_group"):
        group = int(weights.get("group_size") or 128)
    elif strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        group = int(rows) * int(columns)
    scale = 1.0 if bits == 4 and str(weights.get("type")) == "float" else 2.0
    if not weights.get("symmetric", True):
        scale += bits / 8
    cache = section.get("kv_cache_scheme")
    dtype = "fp8" if isinstance(cache, Mapping) and cache.get("num_bits") == 8 else ""
    return Quantization("compressed-tensors", bits, group, scale, ignored, kv_cache_dtype=dtype)


def _modelopt(section: Mapping[str, Any]) -> Quantization:
    """Return the meaning of a modelopt configuration."""
    algo = str(section.get("quant_algo") or "FP8").upper()
    ignored = tuple(str(v) for v in (section.get("exclude_modules") or section.get("ignore") or ()))
    cache = section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme")
    dtype = "fp8" if cache and ("8" in str(cache)) else ""
    if "NVFP4" in algo or "MXFP4" in algo or "W4" in algo:
        group = int(section.get("group_size") or (32 if "MX" in algo else 16))
        return Quantization("modelopt_fp4", 4, group, 1, ignored, kv_cache_dtype=dtype)
    if "FP8" in algo or "MXFP8" in algo or "INT8" in algo:
        return Quantization("modelopt", 8, -1, 4, ignored, kv_cache_dtype=dtype)
    raise InputError(f"modelopt: quant_algo {algo!r} is not modelled; known: FP8, NVFP4")


def online(method: str, file: Path) -> Quantization | None:
    """Return what an engine makes of weights that it shrinks while it loads them.

    Raises:
        InputError: naming the methods vLLM has.
    """
    name = method.lower().replace("_", "-")
    if name in ("fp8", "fp8-per-tensor", "ptpc-fp8", "fp8-per-block"):
        return Quantization(name, 8, 128 * 128 if "block" in name else -1, 4)
    if name == "mxfp8":
        return Quantization(name, 8, 32, 1)
    if name == "mxfp4":
        return Quantization(name, 4, 32, 1, only_experts=True)
    if name == "bitsandbytes":
        return Quantization(name, 4, 64, 4)
    if name in ("experts-int8", "int8"):
        return Quantization(name, 8, 0, 4, only_experts=True)
    raise InputError(
        f"{file}: engine_args.quantization {method!r}: the checkpoint is not stored so, and an "
        "engine cannot make it while it loads; leave it out, or give a checkpoint that is"
    )
