"""FixedRate keeps the contract of its kind, and is found by name."""

from samullm_fixed_rate import FixedRate

from samullm_plugin import PluginHost
from samullm_plugin.testing.executor_contract import ExecutorContract


class TestFixedRate(ExecutorContract):
    executor_class = FixedRate


def test_it_is_installed():
    found = PluginHost().resolve("executor", "fixed-rate")
    assert found.value is FixedRate
