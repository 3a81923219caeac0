"""Geometric keeps the contract of its kind, and is found by name."""

from samullm_geometric import Geometric

from samullm_plugin import PluginHost
from samullm_plugin.testing.length_contract import LengthEstimatorContract


class TestGeometric(LengthEstimatorContract):
    estimator_class = Geometric


def test_it_is_installed():
    found = PluginHost().resolve("length-estimator", "geometric")
    assert found.value is Geometric
