"""Types of the arrays that the whole project shares."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SmallInts = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

STORED: Final = {"extra": "forbid"}
"""Pydantic's settings of dataclasses that are kept in files: an unknown field is an error."""
