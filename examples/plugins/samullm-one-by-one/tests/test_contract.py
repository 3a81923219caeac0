"""OneByOne keeps the contract of its kind, and is found by name."""

from samullm_one_by_one import OneByOne

from samullm_plugin import PluginHost
from samullm_plugin.testing.scheduler_contract import SchedulerContract


class TestOneByOne(SchedulerContract):
    scheduler_class = OneByOne


def test_it_is_installed():
    found = PluginHost().resolve("scheduler", "one-by-one")
    assert found.value is OneByOne
