"""Weights of a folder by the headers of its safetensors files, which are read and nothing else."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError

_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_SIDE = re.compile(r"\.(qzeros|scales|g_idx|.*_scale(_inv|_2)?|.*absmax|.*quant_map.*|"
                   r"weight_shape|.*_zero_point|.*_scales|quant_state.*)$")  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NOT_LOADED = ("mtp.", "talker.", "token2wav.", "code2wav.")
_LONGEST_HEADER = 100_000_000
_POINTER = b"version "
"""How the file begins that Git LFS has in place of a large one."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""How the names of files of weights end, in the order in which engines look for them."""

_PART = re.compile(r"-\d+-of-(\d+)$")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What the safetensors files of a folder hold, parts that are not loaded left out.

    Attributes:
        stored_bytes: bytes of all tensors.
        float_bytes: of these in floating-point types of 16 bits and more.
        float_numbers: numbers of these.
        numbers: all numbers, packed ones counted as stored; equals the parameters unless some are
            packed.
        packed: whether several weights are packed in one number.
        has_head: whether a head of its own is among them.
    """

    stored_bytes: int
    float_bytes: int
    float_numbers: int
    numbers: int
    packed: bool
    has_head: bool


def indexed_files(index: Path) -> list[Path]:
    """Return the files of weights that an index names, there or not.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: cannot be read as an index of weights: {error}") from error


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Return the files of weights that a folder should hold, there or not, and their index.

    Of several indices the first whose files are all there; one that cannot be read is passed over
    if another can. Without an index the files of the first kind that is there.

    Raises:
        InputError: if no index can be read.
    """
    candidates: list[tuple[list[Path], Path | None]] = []
    wrong: InputError | None = None
    for index in sorted(folder.glob("*.index.json"), key=lambda i: "safetensors" not in i.name):
        try:
            candidates.append((indexed_files(index), index))
        except InputError as error:
            wrong = error
    if not candidates and wrong is not None:
        raise wrong
    if not candidates:
        found = (sorted(folder.glob(f"*{suffix}")) for suffix in WEIGHT_SUFFIXES)
        return next((f for f in found if f), []), None
    return next((c for c in candidates if all(f.is_file() for f in c[0])), candidates[0])


def problem_of_weights(folder: Path) -> str | None:
    """Return what is wrong with the files of weights in a folder; None if they are all there.

    Only names, sizes and the headers of safetensors files are looked at.

    Raises:
        InputError: if an index or a header cannot be read.
    """
    files, index = weight_files(folder)
    if not files:
        return "there are no files of weights"
    if missing := [f.name for f in files if not f.is_file()]:
        name = "" if index is None else index.name
        return f"{name} names {missing[0]}, which is not there"
    parts = [m for f in files if (m := _PART.search(f.stem))] if index is None else []
    if parts and len(parts) < int(parts[0][1]):
        return f"there are {len(parts)} of {int(parts[0][1])} files of weights"
    for file in files:
        if file.suffix == ".safetensors":
            size, whole = file.stat().st_size, _whole_bytes(file)
            if size < whole:
                return f"{file.name} is cut off: it has {size} of {whole} bytes"
    return None


def read_weights(folder: Path, num_layers: int) -> StoredWeights | None:
    """Return what a folder's safetensors files hold; None without any, or with some missing.

    Args:
        folder: of the model.
        num_layers: layers with this index and above predict further tokens: engines leave them out.

    Raises:
        InputError: naming a file whose header cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = indexed_files(index)
    elif len(files) > 1:
        files = [f for f in files if f.name != "consolidated.safetensors"]
    if not files or not all(f.is_file() for f in files):
        return None
    total = floats = float_numbers = numbers = 0
    packed = head = False
    for file in files:
        for name, bits, count in _tensors(file):
            layer = _LAYER.search(name)
            if name.startswith(_NOT_LOADED) or (
                layer and int(layer[1]) >= num_layers and "vision" not in name
            ):
                continue
            size = count * bits // 8
            total += size
            head |= name.endswith("lm_head.weight")
            if _SIDE.search(name):
                continue
            numbers += count
            packed |= name.endswith(("qweight", "weight_packed", "_blocks")) or bits < 8
            if bits >= 16 and not name.endswith("qweight"):
                floats += size
                float_numbers += count
    return StoredWeights(total, floats, float_numbers, numbers, packed, head)


def _tensors(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, bits of a number and numbers of each tensor of a file.

    Raises:
        InputError: if it is no safetensors file.
    """
    for name, entry in _header(file)[0].items():
        bits = _BITS.get(str(entry.get("dtype")))
        if bits is None:
            raise InputError(f"{file}: tensor {name} has the unknown type {entry.get('dtype')!r}")
        yield name, bits, math.prod(entry["shape"])


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a safetensors file, by name.

    Raises:
        InputError: if it is none.
    """
    return {name: tuple(entry["shape"]) for name, entry in _header(file)[0].items()}


def _whole_bytes(file: Path) -> int:
    """Return how many bytes a safetensors file has by its header."""
    entries, start = _header(file)
    try:
        return start + max((int(e["data_offsets"][1]) for e in entries.values()), default=0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{file}: its header does not say where tensors are") from error


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return what the header of a safetensors file says of each tensor, and where it ends."""
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == _POINTER:
                raise ValueError("Git LFS has put a pointer in its place; run git lfs pull")
            (length,) = struct.unpack("<Q", first)
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file}: cannot be read as a safetensors file: {error}") from error
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return entries, 8 + int(length)
