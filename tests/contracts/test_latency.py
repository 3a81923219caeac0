"""The shipped latency models keep the contract of their kind."""

from __future__ import annotations

from samullm_linear.assumed import Assumed
from samullm_linear.plugin import Linear, Transfer

from samullm_plugin.testing.latency_contract import LatencyModelContract


class TestLinear(LatencyModelContract):
    latency_class = Linear


class TestTransfer(LatencyModelContract):
    latency_class = Transfer


class TestAssumed(LatencyModelContract):
    latency_class = Assumed
