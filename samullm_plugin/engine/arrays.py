"""Type of the arrays of the compiled functions.

Their element types are left open to the type checker: compiled code computes with machine
integers, for which neither ``int`` nor ``numpy.int64`` would be right in every expression.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
