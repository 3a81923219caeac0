"""LongestPrompt keeps the contract of its kind, and is found by name."""

from samullm_longest_prompt import LongestPrompt

from samullm_plugin import PluginHost
from samullm_plugin.testing.policy_contract import RequestPolicyContract


class TestLongestPrompt(RequestPolicyContract):
    policy_class = LongestPrompt


def test_it_is_installed():
    found = PluginHost().resolve("request-policy", "longest-prompt")
    assert found.value is LongestPrompt
