"""The shipped request policies keep their contract."""

from __future__ import annotations

from samullm_policies import plugin as policies

from samullm_plugin.testing.policy_contract import RequestPolicyContract


class TestFcfs(RequestPolicyContract):
    policy_class = policies.Fcfs


class TestShortestFirst(RequestPolicyContract):
    policy_class = policies.ShortestFirst


class TestShortestFirstAged(RequestPolicyContract):
    policy_class = policies.ShortestFirst
    options = {"aging_s_per_token": 0.05}


class TestLongestFirst(RequestPolicyContract):
    policy_class = policies.LongestFirst


class TestMultiBin(RequestPolicyContract):
    policy_class = policies.MultiBin
    options = {"bins": 3}


class TestPrefixAffinity(RequestPolicyContract):
    policy_class = policies.PrefixAffinity


class TestProgramAge(RequestPolicyContract):
    policy_class = policies.ProgramAge
