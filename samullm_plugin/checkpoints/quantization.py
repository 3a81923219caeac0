"""Bytes of weights as a checkpoint stores them, and as an engine holds them.

Which weights a method shrinks, and what comes with them: AWQ and GPTQ pack linear layers and keep a
scale and a zero point a group; fp8 keeps a scale a tensor, row or block; mxfp4 packs experts in
blocks of 32 with one byte of scale each; bitsandbytes keeps a scale a block of 64. Embeddings,
heads, norms and routers keep their type unless the checkpoint says otherwise.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samullm_plugin.checkpoints.parts import Matrix, Part
from samullm_plugin.errors import InputError

DTYPE_BYTES: Mapping[str, float] = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float64": 8, "int8": 1,
    "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1,
    "fp8_inc": 1, "fp8_ds_mla": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of a matrix are stored.

    Attributes:
        bits: of one weight.
        group: weights that share a scale; 0: one scale a row; -1: a tensor.
        scale_bytes: of one scale, zero points included.
    """

    bits: float
    group: int = -1
    scale_bytes: float = 4.0

    def stored_bytes(self, matrix: Matrix) -> float:
        """Return the bytes of equal matrices."""
        scales = matrix.outputs if self.group == 0 else 1
        if self.group > 0:
            scales = -(-matrix.inputs * matrix.outputs // self.group)
        weights = matrix.inputs * matrix.outputs * self.bits / 8
        return matrix.count * (weights + scales * self.scale_bytes)


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the modules of some names.

    Attributes:
        pattern: a module's name or contiguous parts of it, with ``*`` for anything; after ``re:``
            a regular expression of its beginning.
        scheme: how they are stored; None: they keep their type.
    """

    pattern: str
    scheme: Scheme | None = None


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the matrices of linear layers are stored.

    Attributes:
        method: as vLLM names it.
        scheme: of matrices that no rule names; None: these keep their type.
        rules: of modules by name; the first that means a module holds.
        only_experts: only experts are shrunk.
        head: scheme of the head; None: it keeps its type.
        kv_cache_dtype: type of the KV cache that the checkpoint asks for; empty: none.
    """

    method: str
    scheme: Scheme | None
    rules: tuple[Rule, ...] = ()
    only_experts: bool = False
    head: Scheme | None = None
    kv_cache_dtype: str = ""
    _places: _Places = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the look-up of rules."""
        object.__setattr__(self, "_places", _Places(self.rules))

    def scheme_of(self, module: str) -> Scheme | None:
        """Return how the matrix of a module is stored; None if it keeps its type."""
        found = self._places.first(module)
        return self.scheme if found is None else self.rules[found].scheme

    def shrinks(self, parts: list[Part]) -> bool:
        """Return whether anything of a model is stored by a scheme at all."""
        return self.scheme is not None or any(
            self.scheme_of(matrix.module) for part in parts for matrix in part.linears
        )

    def stored_bytes(self, part: Part, dtype_bytes: float) -> float:
        """Return the bytes of a part."""
        if part.module == "lm_head" and self.head is not None:
            return self.head.stored_bytes(Matrix(part.module, part.others, 1))
        total = part.others * dtype_bytes
        for matrix in part.linears:
            scheme = None
            if part.experts or not self.only_experts:
                scheme = self.scheme_of(matrix.module)
            numbers = matrix.count * matrix.inputs * matrix.outputs
            total += numbers * dtype_bytes if scheme is None else scheme.stored_bytes(matrix)
        return total


_SPELLINGS = (
    ("language_model.model", "model.", "language_model.model."),
    ("model.language_model", "model.", "model.language_model."),
    ("backbone", "model.", "backbone."),
    ("feed_forward", ".mlp.", ".feed_forward."),
    ("block_sparse_moe", ".mlp.", ".block_sparse_moe."),
)
"""Words of patterns, and what a module is called where such a word is used."""
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # fmt: skip
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MIXER = re.compile(r"(?<=\.)(self_attn|mlp|mamba)(?=\.)")


class _Places:
    """Finds the first of some rules that means a module: names by table, patterns one by one."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[int, re.Pattern[str], str]] = []
        for i, pattern in enumerate(rule.pattern for rule in rules):
            if pattern.startswith("re:"):
                self._patterns.append((i, re.compile(pattern[3:]), pattern.replace("\\", "")))
            elif "*" in pattern:
                for text in (pattern, f"{pattern}.*"):
                    self._patterns.append((i, re.compile(fnmatch.translate(text)), pattern))
            else:
                self._names.setdefault(pattern, i)
        self._text = " ".join([*self._names, *(text for *_, text in self._patterns)])

    def first(self, module: str) -> int | None:
        """Return the number of the first rule that means a module."""
        found: int | None = None
        for name in _spelt(module, self._text):
            words = name.split(".")
            for start in range(len(words)):
                for end in range(start + 1, len(words) + 1):
                    i = self._names.get(".".join(words[start:end]))
                    if i is not None and (found is None or i < found):
                        found = i
            for i, pattern, _ in self._patterns:
                if (found is None or i < found) and pattern.match(name):
                    found = i
        return found


def _spelt(module: str, patterns: str) -> Iterator[str]:
    """Yield the names that checkpoints use for a module, where patterns hold such words."""
    names = [module]
    for word, ours, theirs in _SPELLINGS:
        if word in patterns:
            names += [n.replace(ours, theirs, 1) for n in names if ours in n]
    if ".mixer." in patterns:
        names += [_MIXER.sub("mixer", n) for n in names]
    leaf = module.rpartition(".")[2]
    for table in (_FUSED, _MIXTRAL):
        other = table.get(leaf)
        if other is not None and other in patterns:
            names += [f"{n.rpartition('.')[0]}.{other}" for n in names if n.endswith(f".{leaf}")]
    return iter(dict.fromkeys(names))


def online(method: str, file: Path) -> Quantization | None:
    """Return what an engine makes of weights that it shrinks while it loads them.

    Raises:
        InputError: naming the methods vLLM has.
    """
    name = method.lower().replace("_", "-")
    if name in ("fp8", "fp8-per-tensor", "ptpc-fp8", "fp8-per-block"):
        return Quantization(name, Scheme(8, 128 * 128 if "block" in name else -1))
    if name == "mxfp8":
        return Quantization(name, Scheme(8, 32, 1))
    if name == "mxfp4":
        return Quantization(name, Scheme(4, 32, 1), only_experts=True)
    if name == "bitsandbytes":
        return Quantization(name, Scheme(4, 64))
    if name in ("experts-int8", "int8"):
        return Quantization(name, Scheme(8, 0), only_experts=True)
    raise InputError(
        f"{file}: engine_args.quantization {method!r}: the checkpoint is not stored so, and an "
        "engine cannot make it while it loads; leave it out, or give a checkpoint that is"
    )
