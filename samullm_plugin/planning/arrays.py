"""Arrays in JSON: short ones as lists, equal values once, others compressed.

An array of numbers is one of

* a list, up to 16 long (floats: infinities and NaN as strings);
* ``{"count": n, "all": value}``: ``n`` equal values;
* ``{"count": n, "delta-int32": text}``: the first value and then differences, little endian 32-bit
  (``delta-int64``: 64-bit), compressed with zlib and written in base64;
* ``{"count": n, "float64": text}``: little endian doubles, compressed and written alike;
* ``{"count": n, "bits": text}``: truth values, eight to a byte (the first is the highest bit),
  compressed and written alike.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samullm_plugin.errors import InputError

_SHORT = 16
_MOST_BYTES_PER_ENTRY = 8


def encode_array(values: NDArray[Any]) -> object:
    """Return the JSON form of a one-dimensional array of whole numbers, floats or truth values."""
    if values.ndim != 1:
        raise ValueError(f"arrays of {values.ndim} dimensions have no JSON form")
    count = len(values)
    if count <= _SHORT:
        return [_number(v) for v in values.tolist()]
    if (values == values[0]).all():
        return {"count": count, "all": _number(values[0].item())}
    if values.dtype == np.bool_:
        return {"count": count, "bits": _pack(np.packbits(values).tobytes())}
    if np.issubdtype(values.dtype, np.floating):
        return {"count": count, "float64": _pack(values.astype("<f8").tobytes())}
    deltas = np.diff(values.astype(np.int64), prepend=0)
    small = deltas.min() > -(2**31) and deltas.max() < 2**31
    name, kind = ("delta-int32", "<i4") if small else ("delta-int64", "<i8")
    return {"count": count, name: _pack(deltas.astype(kind).tobytes())}


def decode_array(record: object, kind: np.dtype[Any], where: str) -> NDArray[Any]:
    """Return an array from its JSON form.

    Args:
        record: what was read.
        kind: the type of number wanted.
        where: file and path in it, for messages.

    Raises:
        InputError: if it is no array of that type.
    """
    if isinstance(record, list):
        return _from_list(record, kind, where)
    if not isinstance(record, dict) or not isinstance(record.get("count"), int):
        raise InputError(f"{where}: is not an array")
    count = record["count"]
    form = next((name for name in record if name != "count"), None)
    if form == "all" and len(record) == 2:
        return np.repeat(_from_list([record["all"]], kind, where), count)
    forms = {"delta-int32": "<i4", "delta-int64": "<i8", "float64": "<f8", "bits": "u1"}
    if form not in forms or len(record) != 2 or (form == "float64") != (kind.kind == "f"):
        raise InputError(f"{where}: is not an array of {kind.name}")
    if (form == "bits") != (kind.kind == "b"):
        raise InputError(f"{where}: is not an array of {kind.name}")
    raw = np.frombuffer(_unpack(record[form], count, where), forms[form])
    if form == "bits":
        raw = np.unpackbits(raw, count=count) if len(raw) * 8 >= count else raw
    if len(raw) != count:
        raise InputError(f"{where}: holds {len(raw)} values instead of {count}")
    if form.startswith("delta"):
        return np.cumsum(raw, dtype=np.int64).astype(kind)
    return raw.astype(kind)


def _from_list(values: list[object], kind: np.dtype[Any], where: str) -> NDArray[Any]:
    """Return a list of numbers as an array, after checking each."""
    plain: list[object] = []
    for k, value in enumerate(values):
        if kind.kind == "b":
            good = isinstance(value, bool)
        elif kind.kind == "f":
            value = read_float(value)  # noqa: PLW2901  # the checked value takes its place
            good = value is not None
        else:
            good = isinstance(value, int) and not isinstance(value, bool)
        if not good:
            raise InputError(f"{where}.{k}: is not a {kind.name}")
        plain.append(value)
    return np.array(plain, dtype=kind)


def read_float(value: object) -> float | None:
    """Return a number of a JSON file, ``"inf"``, ``"-inf"`` and ``"nan"`` included, else None."""
    if value in ("inf", "-inf", "nan"):
        return float(str(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def _number(value: bool | float) -> bool | float | str:
    """Return a number as JSON has it; infinities and NaN as strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def _unpack(text: object, count: int, where: str) -> bytes:
    """Return decompressed bytes, never many more than ``count`` values need."""
    if not isinstance(text, str):
        raise InputError(f"{where}: is not an array")
    try:
        packed = base64.b64decode(text, validate=True)
        return zlib.decompressobj().decompress(packed, count * _MOST_BYTES_PER_ENTRY + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise InputError(f"{where}: cannot be unpacked: {error}") from error
