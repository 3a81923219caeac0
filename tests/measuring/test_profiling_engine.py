"""Sizes that ``profile latency`` takes."""

from __future__ import annotations

import pytest

from samullm_plugin import InputError
from samullm_plugin.cli.profile_latency import _sizes


def test_sizes_are_checked() -> None:
    assert _sizes("1,2") == [1, 2]
    for wrong in ("", "0", "1,1", "two"):
        with pytest.raises(InputError, match="--tp"):
            _sizes(wrong)
