"""Roofline keeps the contract of its kind, and is found by name."""

from samullm_roofline import Roofline

from samullm_plugin import PluginHost
from samullm_plugin.testing.latency_contract import LatencyModelContract


class TestRoofline(LatencyModelContract):
    latency_class = Roofline


def test_it_is_installed():
    found = PluginHost().resolve("latency-model", "roofline")
    assert found.value is Roofline
