"""The shipped request policies do what their sources say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samullm_policies import plugin as policies

from samullm_plugin import PluginError, PolicyBatch, RequestPolicy
from samullm_plugin.planning.policies import checked_assignment


def batch(
    predicted, prefix=None, program=None, before=None, arrival=None, chain=None
) -> PolicyBatch:
    n = len(predicted)
    return PolicyBatch(
        node="n",
        prompt_tokens=np.full(n, 100),
        predicted_tokens=np.array(predicted, dtype=np.int64),
        arrival_s=np.zeros(n) if arrival is None else np.array(arrival, float),
        prefix_id=np.full(n, -1) if prefix is None else np.array(prefix, dtype=np.int64),
        prefix_tokens=np.zeros(n, np.int64),
        program_id=np.arange(n) if program is None else np.array(program),
        program_tokens=np.zeros(n, np.int64) if before is None else np.array(before),
        chain_id=None if chain is None else np.array(chain, dtype=np.int64),
    )


ALL = [
    policies.Fcfs,
    policies.ShortestFirst,
    policies.LongestFirst,
    policies.MultiBin,
    policies.PrefixAffinity,
    policies.ProgramAge,
    policies.IsolateLongest,
]


@given(
    st.sampled_from(ALL),
    st.lists(st.integers(1, 500), max_size=40),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_policy_answers_within_the_rules(cls, predicted, replicas, groups):
    prefix = [i % groups if groups else -1 for i in range(len(predicted))]
    priority, replica = checked_assignment(cls(), batch(predicted, prefix, prefix), replicas)
    assert (replica is None) == (cls in (policies.Fcfs, policies.IsolateLongest))  # no chains
    assert replica is None or len(replica) == len(predicted)
    if len(predicted) >= 3 * replicas and cls is policies.LongestFirst:
        counts = np.bincount(replica, minlength=replicas)
        assert counts.max() - counts.min() <= 1
    if priority is not None:
        assert len(priority) == len(predicted)


def test_shortest_and_longest_first_order_by_prediction():
    b = batch([30, 10, 20])
    assert policies.ShortestFirst().assign(b, 1)[0].tolist() == [2, 0, 1]
    assert policies.LongestFirst().assign(b, 1)[0].tolist() == [0, 2, 1]


def test_aging_lets_an_early_long_request_pass_a_late_short_one():
    b = batch([100, 10], arrival=[0.0, 50.0])
    assert policies.ShortestFirst().assign(b, 1)[0].tolist() == [1, 0]
    aged = policies.ShortestFirst(policies.ShortestFirstOptions(aging_s_per_token=0.1))
    assert aged.assign(b, 1)[0].tolist() == [0, 1]


def test_multi_bin_serves_the_long_bin_first_and_groups_equal_lengths():
    b = batch([5, 400, 6, 410, 7, 420, 8, 430])
    policy = policies.MultiBin(policies.MultiBinOptions(bins=2))
    priority, replica = policy.assign(b, 2)
    assert priority.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    for bin_ in (0, 1):
        assert sorted(replica[priority == bin_].tolist()) == [0, 0, 1, 1]


def test_prefix_affinity_keeps_a_group_on_one_replica_unless_it_is_too_large():
    b = batch([10] * 6, prefix=[0, 1, 0, 1, 0, 1])
    priority, replica = policies.PrefixAffinity().assign(b, 2)
    assert len({replica[0], replica[2], replica[4]}) == 1
    assert replica[0] != replica[1]
    assert sorted(priority[[0, 2, 4]].tolist()) in ([0, 1, 2], [3, 4, 5])
    one_group = policies.PrefixAffinity().assign(batch([10] * 8, prefix=[0] * 8), 2)[1]
    assert np.bincount(one_group).tolist() == [4, 4]


def test_program_age_serves_the_least_served_program_first_and_keeps_it_on_its_replica():
    b = batch([10] * 4, program=[7, 7, 9, 9], before=[0, 300, 100, 0])
    priority, replica = policies.ProgramAge().assign(b, 2)
    assert np.argsort(priority).tolist()[-2:] == [2, 1]
    assert replica[0] == replica[1] != replica[2] == replica[3]


def chains_of_sizes(*sizes: int) -> PolicyBatch:
    """First every chain's first request, then the second ones, as documents are read."""
    chain = [c for k in range(max(sizes)) for c, size in enumerate(sizes) if size > k]
    return batch([1000 - c for c in chain], chain=chain)  # predictions do not matter


def replica_of_chains(sizes, replicas, share=0.5):
    b = chains_of_sizes(*sizes)
    policy = policies.IsolateLongest(policies.IsolateLongestOptions(share=share))
    priority, replica = checked_assignment(policy, b, replicas)
    assert not priority.any()
    found = [set(replica[b.chain_id == c].tolist()) for c in range(len(sizes))]
    assert all(len(r) == 1 for r in found)  # chains stay whole
    return [r.pop() for r in found]


def test_the_longest_chains_get_a_replica_of_their_own_up_to_its_share():
    sizes = [2, 2, 9, 2, 2, 7, 2, 2, 2, 2]  # 32 requests: even shares are 16 of 2 replicas
    assert replica_of_chains(sizes, 2) == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]  # 9 and 7 are over 8
    assert replica_of_chains(sizes, 2, share=1.0) == [1, 1, 0, 1, 1, 0, 1, 1, 1, 1]
    assert replica_of_chains([20, 3, 3, 3], 2, share=0.1) == [0, 1, 1, 1]  # one at least


def test_other_chains_are_spread_evenly_the_longer_ones_apart():
    replica = replica_of_chains([9, 4, 4, 3, 3, 2, 2], 3)
    assert replica[0] == 0
    assert replica[1:] == [1, 2, 1, 2, 1, 2]
    assert replica_of_chains([3, 5, 4], 3) == [2, 0, 1]  # one each


def test_nothing_is_isolated_without_chains_or_on_one_replica():
    policy = policies.IsolateLongest()
    assert policy.assign(batch([5, 6, 7]), 2) == (None, None)
    assert policy.assign(chains_of_sizes(3, 2, 1), 1) == (None, None)


def test_a_long_chain_alone_finishes_sooner():
    """Its requests wait for no others."""
    from samullm_plugin.model.application import EngineOptions
    from samullm_plugin.testing.factories import TestNode

    two = EngineOptions(max_num_seqs=2)

    sizes = [12, *[3] * 12]
    chain, inputs, last = [], [], {}
    for k in range(max(sizes)):
        for c, size in enumerate(sizes):
            if size > k:
                inputs.append([(0, last[c])] if k else [])
                last[c] = len(chain)
                chain.append(c)
    n = len(chain)
    nodes = [TestNode("a", [4] * n, [20] * n, inputs=inputs, in_prompt=False, engine=two)]
    together, alone = (simulated(nodes, p, 2) for p in (None, policies.IsolateLongest()))
    assert alone.max() < 0.95 * together.max()


class _Wrong(RequestPolicy):
    """Answers with whatever the test gives it."""

    name = "wrong"
    answer = (None, np.array([0]))

    def assign(self, batch, num_replicas):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ((None, np.array([0])), "replicas must be 2 whole numbers"),
        ((None, np.array([0, 3])), "from 0 to 1"),
        ((None, np.array([0.0, 1.0])), "whole numbers"),
        ((np.array([1.5, 2.0]), np.array([0, 1])), "priorities must be 2 whole numbers"),
    ],
)
def test_a_wrong_answer_is_named(answer, rule):
    policy = _Wrong()
    policy.answer = answer
    with pytest.raises(PluginError, match=rule) as error:
        checked_assignment(policy, batch([1, 2]), 2)
    assert "wrong" in str(error.value)


@pytest.mark.parametrize("cause", ["raises", "changes"])
def test_a_policy_that_raises_or_changes_its_batch_is_named(cause, capsys):
    class Bad(_Wrong):
        def assign(self, batch, num_replicas):
            print("for people")
            if cause == "changes":
                batch.predicted_tokens[:] = 1
            raise KeyError("no idea")

    with pytest.raises(PluginError, match="request policy wrong raised") as error:
        checked_assignment(Bad(), batch([1, 2]), 2)
    assert ("read-only" if cause == "changes" else "no idea") in str(error.value)
    assert capsys.readouterr().out == ""


def simulated(app_nodes, policy, parallel):
    from samullm_plugin import Assignment, ParallelConfig, Plan, Stage
    from samullm_plugin.planning.policies import policy_call
    from samullm_plugin.simulator import PlanSimulator
    from samullm_plugin.testing.factories import make_problem

    problem = make_problem(app_nodes, parallel)
    call = None if policy is None else policy_call(problem.app, policy, problem.scenarios)
    name = problem.app.nodes[0].name
    replicas = Assignment(name, ParallelConfig(parallel, 1, 1), tuple(range(parallel)))
    simulator = PlanSimulator(problem, policy=call)
    return simulator.simulate(Plan((Stage((replicas,)),)))[0].finish_s[0]


def chains():
    from samullm_plugin.testing.factories import TestNode

    inputs = [[(0, r - 1)] if r % 3 else [] for r in range(12)]
    return [TestNode("a", [5] * 12, [9, 30, 14] * 4, inputs=inputs, in_prompt=False)]


@pytest.mark.parametrize("cls", ALL)
def test_requests_of_a_chain_follow_each_other_under_every_policy(cls):
    finish = simulated(chains(), cls(), 2).reshape(4, 3)
    assert (np.diff(finish, axis=1) > 0).all()


def test_fcfs_is_what_happens_without_a_policy():
    assert np.array_equal(simulated(chains(), policies.Fcfs(), 2), simulated(chains(), None, 2))
