"""What a checkpoint's files say of its quantisation: each method's own spelling of schemes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samullm_plugin.checkpoints.hf_config import ConfigFile, load_json, readable
from samullm_plugin.checkpoints.quantization import Quantization, Rule, Scheme
from samullm_plugin.errors import InputError

_GPTQ = frozenset({"gptq", "gptq-marlin", "auto-gptq"})
_AUTO_ROUND = frozenset({"auto-round", "intel/auto-round", "inc"})
_PACKED = frozenset({"awq", "awq-marlin", "auto-awq", "moe-wna16"}) | _GPTQ | _AUTO_ROUND
_MODELOPT: Mapping[str, Scheme] = {
    "FP8": Scheme(8),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(8, 0),
    "FP8_PB_WO": Scheme(8, 128 * 128),
    "FP8_BLOCK_SCALES": Scheme(8, 128 * 128),
    "MXFP8": Scheme(8, 32, 1),
    "INT8_SQ": Scheme(8, 0),
    "NVFP4": Scheme(4, 16, 1),
    "NVFP4_AWQ": Scheme(4, 16, 1),
    "W4A16_NVFP4": Scheme(4, 16, 1),
    "W4A8_NVFP4_FP8": Scheme(4, 16, 1),
    "MXFP4": Scheme(4, 32, 1),
    "W4A8_MXFP4_FP8": Scheme(4, 32, 1),
    "W4A16_AWQ": Scheme(4, 128, 2),
    "W4A8_AWQ": Scheme(4, 128, 2),
    "INT4_AWQ": Scheme(4, 128, 2),
}


def read_quantization(file: ConfigFile) -> Quantization | None:
    """Return how a checkpoint's weights are stored; None: all in the model's type.

    Raises:
        InputError: naming the method, if it is not known.
    """
    section = next(
        (s[n] for s in (file.raw, file.text.given)
         for n in ("quantization_config", "compression_config")
         if isinstance(s.get(n), Mapping) and s[n]),
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
    with readable(None, f"{file.file}: quantization"):
        return _of_section(section, file.file)


def _of_section(section: Mapping[str, Any], file: Path) -> Quantization | None:
    """Return what one configuration means."""
    method = str(section.get("quant_method") or "").lower().replace("_", "-")
    inner = section.get("quantization")
    if isinstance(inner, Mapping) and (
        "quant_algo" in inner or dict(section.get("producer") or {}).get("name") == "modelopt"
    ):
        return _modelopt({**section, **inner}, file)
    kept = _kept(section, file)
    if method in _PACKED:
        return _packed(section, method, kept, file)
    if method in ("fp8", "fbgemm-fp8"):
        block = section.get("weight_block_size")
        group = int(block[0]) * int(block[1]) if block else (0 if method == "fbgemm-fp8" else -1)
        return Quantization(method, Scheme(8, group), kept)
    if method == "compressed-tensors":
        return _compressed_tensors(section, kept, file)
    if method == "mxfp4":
        return Quantization(method, Scheme(4, 32, 1), kept, only_experts=True)
    if method in ("bitsandbytes", "bnb"):
        four = bool(section.get("load_in_4bit", section.get("_load_in_4bit")))
        double = bool(section.get("bnb_4bit_use_double_quant"))
        scheme = Scheme(4, 64, 1.0625 if double else 4) if four else Scheme(8, 0)
        return Quantization("bitsandbytes", scheme, kept)
    if method.startswith("modelopt") or "quant_algo" in section:
        return _modelopt(section, file)
    if method in ("experts-int8", "int8"):
        return Quantization(method, Scheme(8, 0), kept, only_experts=method == "experts-int8")
    known = "awq, gptq, fp8, compressed-tensors, mxfp4, bitsandbytes, modelopt, auto-round"
    raise _refusal(file, f"quantization {method or dict(section)!r}", f" (known: {known})")


def _refusal(file: Path, feature: str, known: str = "") -> InputError:
    """Return what is said of a quantisation whose sizes nobody here knows."""
    return InputError(
        f"{file}: {feature} is not modelled{known}; give the sizes under `architecture` in "
        "app.yaml, or a folder with its safetensors files"
    )


def _kept(section: Mapping[str, Any], file: Path) -> tuple[Rule, ...]:
    """Return the modules that keep their type."""
    names = (
        "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "ignore", "exclude",
        "exclude_modules",
    )  # fmt: skip
    found = next((v for n in names if (v := section.get(n))), ())
    return tuple(Rule(_checked(str(v), file)) for v in found)


def _checked(pattern: str, file: Path) -> str:
    """Return a pattern of modules.

    Raises:
        InputError: if it is no regular expression.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InputError(
                f"{file}: quantization: {pattern!r} is no regular expression: {error}"
            ) from error
    return pattern


def _packed(
    section: Mapping[str, Any], method: str, kept: tuple[Rule, ...], file: Path
) -> Quantization:
    """Return the meaning of a configuration of AWQ's or GPTQ's kind."""
    given = section.get("bits", section.get("w_bit", section.get("weight_bits")))
    bits = _bits(4 if given is None else given, method, file)
    group = section.get("group_size", section.get("q_group_size", section.get("groupsize", -1)))
    usual = _packed_scheme(bits, group, str(section.get("data_type") or ""))
    scheme: Scheme | None = usual
    rules, head = list(kept), usual if section.get("lm_head") is True else None
    if method in _GPTQ:
        for pattern, change in dict(section.get("dynamic") or {}).items():
            leaves_out = str(pattern).startswith("-:")
            text = _checked("re:" + str(pattern).removeprefix("-:").removeprefix("+:"), file)
            rules.append(Rule(text, None if leaves_out else _changed(usual, change, file)))
        if listed := list(_flat(section.get("modules_in_block_to_quantize"))):
            rules += [Rule(name, usual) for name in listed]
            scheme = None
    if method in _AUTO_ROUND:
        for name, change in dict(section.get("extra_config") or {}).items():
            found = _changed(usual, change, file)
            if str(name).endswith("lm_head"):
                head = found
                continue
            special = set("*+?^$()[]{}|\\") & set(str(name))
            text = _checked(f"re:.*?(?:{name})", file) if special else str(name)
            rules.append(Rule(text, found))
        blocks = section.get("block_name_to_quantize") or section.get("to_quant_block_names")
        if blocks:
            names = str(blocks).split(",") if isinstance(blocks, str) else _flat(blocks)
            rules += [Rule(str(name).strip(), usual) for name in names]
            scheme = None
    return Quantization(method, scheme, tuple(rules), head=head)


def _packed_scheme(bits: float, group: object, data_type: str = "") -> Scheme:
    """Return a scheme with half-precision scales and a packed zero point of a weight's bits."""
    size = 0 if group in (None, -1) else int(str(group))
    if data_type.startswith(("mx_fp", "nv_fp")):
        return Scheme(bits, size or (32 if data_type.startswith("mx") else 16), 1)
    return Scheme(bits, size, 2 + bits / 8)


def _changed(usual: Scheme, change: object, file: Path) -> Scheme | None:
    """Return the scheme of modules with settings of their own; None from 16 bits on."""
    own = change if isinstance(change, Mapping) else {}
    bits = _bits(own.get("bits", usual.bits), "of one module", file)
    if bits >= 16:
        return None
    return _packed_scheme(
        bits, own.get("group_size", usual.group or -1), str(own.get("data_type") or "")
    )


def _flat(names: object) -> Iterator[str]:
    """Yield the texts of nested lists."""
    if isinstance(names, str):
        yield names
    elif isinstance(names, list | tuple):
        for name in names:
            yield from _flat(name)


def _bits(value: object, method: str, file: Path) -> float:
    """Return a number of bits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 16:
        raise InputError(f"{file}: quantization {method}: bits is {value!r}; it must be 1 to 16")
    return float(value)


def _compressed_tensors(
    section: Mapping[str, Any], kept: tuple[Rule, ...], file: Path
) -> Quantization | None:
    """Return the meaning of a compressed-tensors configuration."""
    form = str(section.get("format") or "")
    sparsity = dict(section.get("sparsity_config") or {})
    if form == "marlin-24" or str(sparsity.get("format") or "dense") != "dense":
        raise _refusal(file, f"compressed-tensors with sparse weights ({form or 'sparse'})")
    groups = section.get("config_groups") or {}
    if not groups and form == "dense":
        return None
    if not groups:
        raise _refusal(file, "compressed-tensors without config_groups")
    usual: Scheme | None = None
    rules = list(kept)
    for group in groups.values():
        scheme = _weights(group, str(group.get("format") or form), file)
        for target in group.get("targets") or ["Linear"]:
            text = str(target)
            if text == "Linear":
                usual = scheme
            elif text.startswith("re:") or "." in text or text.islower():
                rules.append(Rule(_checked(text, file), scheme))
            elif scheme is not None:
                raise _refusal(file, f"compressed-tensors for layers of the class {text!r}")
    cache = section.get("kv_cache_scheme")
    dtype = "fp8" if isinstance(cache, Mapping) and cache.get("num_bits") == 8 else ""
    return Quantization("compressed-tensors", usual, tuple(rules), kv_cache_dtype=dtype)


def _weights(group: Mapping[str, Any], form: str, file: Path) -> Scheme | None:
    """Return the scheme of a group of layers; None if it leaves weights as they are."""
    if group.get("weights", {}) is None:
        return None
    weights = dict(group.get("weights") or {})
    bits = _bits(weights.get("num_bits", 8), "compressed-tensors", file)
    strategy = str(weights.get("strategy") or "tensor")
    size = {"tensor": -1, "channel": 0, "token": 0}.get(strategy, -1)
    if strategy in ("group", "tensor_group"):
        size = int(weights.get("group_size") or 128)
    elif strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
        size = int(rows) * int(columns)
    small = form.startswith("mx") or str(weights.get("scale_dtype") or "").endswith("uint8")
    scale = 1.0 if small or (bits == 4 and str(weights.get("type")) == "float") else 2.0
    if not weights.get("symmetric", True):
        scale += bits / 8
    return Scheme(bits, size, scale)


def _modelopt(section: Mapping[str, Any], file: Path) -> Quantization:
    """Return the meaning of a modelopt configuration."""
    algo = str(section.get("quant_algo") or "FP8").upper()
    names = section.get("exclude_modules") or section.get("ignore") or ()
    kept = tuple(Rule(_checked(str(v), file)) for v in names)
    cache = section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme")
    dtype = "fp8" if cache and "8" in str(cache) else ""
    if algo == "MIXED_PRECISION":
        listed = dict(section.get("quantized_layers") or {})
        rules = [Rule(str(name), _algorithm(entry, file)) for name, entry in listed.items()]
        return Quantization("modelopt_mixed", None, (*kept, *rules), kv_cache_dtype=dtype)
    scheme = _algorithm({**section, "quant_algo": algo}, file)
    method = "modelopt_fp4" if scheme.bits == 4 else "modelopt"
    return Quantization(method, scheme, kept, kv_cache_dtype=dtype)


def _algorithm(section: Mapping[str, Any], file: Path) -> Scheme:
    """Return the scheme of one of modelopt's algorithms."""
    algo = str(section.get("quant_algo") or "").upper()
    found = _MODELOPT.get(algo)
    if found is None:
        raise _refusal(file, f"modelopt: quant_algo {algo!r}", f" (known: {', '.join(_MODELOPT)})")
    if found.group in (16, 32, 128) and section.get("group_size"):
        return Scheme(found.bits, int(section["group_size"]), found.scale_bytes)
    return found
