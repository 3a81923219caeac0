"""The contract of request policies.

Subclass it in a test module, and every rule becomes a test::

    class TestMine(RequestPolicyContract):
        policy_class = MyPolicy
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from samullm_plugin.host.interfaces.policy import PolicyBatch, RequestPolicy
from samullm_plugin.testing.rules import require


def policy_batch(count: int, seed: int = 0) -> PolicyBatch:
    """Return requests with mixed lengths, arrivals, prefixes and programs."""
    rng = np.random.default_rng(seed)
    return PolicyBatch(
        node="node",
        prompt_tokens=rng.integers(1, 500, count),
        predicted_tokens=rng.integers(1, 400, count),
        arrival_s=np.round(rng.exponential(5.0, count), 3) * (rng.random(count) < 0.5),
        prefix_id=rng.integers(-1, 4, count),
        prefix_tokens=rng.integers(0, 100, count),
        program_id=rng.integers(0, max(1, count // 3), count),
        program_tokens=rng.integers(0, 2000, count),
        chain_id=rng.integers(0, max(1, count // 3), count),
    )


class RequestPolicyContract:
    """Rules every request policy keeps.

    Attributes:
        policy_class: the class under test.
        options: its options.
    """

    policy_class: ClassVar[type[RequestPolicy]]
    options: ClassVar[dict[str, object]] = {}

    def make(self) -> RequestPolicy:
        """Return a new instance."""
        return self.policy_class(self.policy_class.Config.model_validate(self.options))

    def test_shapes_and_ranges(self) -> None:
        """Priorities and replicas are whole numbers, one per request; replicas exist."""
        for count in (0, 1, 7, 100):
            for replicas in (1, 2, 5):
                priority, replica = self.make().assign(policy_batch(count), replicas)
                found = np.zeros(count, np.int64) if replica is None else np.asarray(replica)
                require(found.shape == (count,), "shape", f"{found.shape} replicas for {count}")
                whole = np.issubdtype(found.dtype, np.integer) or count == 0
                require(whole, "whole-numbers", f"replicas are {found.dtype}")
                inside = count == 0 or (found.min() >= 0 and found.max() < replicas)
                require(inside, "replica-range", f"replicas {set(found.tolist())} of {replicas}")
                if priority is not None:
                    ranks = np.asarray(priority)
                    require(ranks.shape == (count,), "shape", f"{ranks.shape} priorities")
                    whole = np.issubdtype(ranks.dtype, np.integer) or count == 0
                    require(whole, "whole-numbers", f"priorities are {ranks.dtype}")

    def test_equal_batches(self) -> None:
        """Equal batches get equal answers."""
        first, second = (self.make().assign(policy_batch(50), 3) for _ in range(2))
        same = all(
            (a is None and b is None) or np.array_equal(np.asarray(a), np.asarray(b))
            for a, b in zip(first, second, strict=True)
        )
        require(same, "deterministic", "equal batches got different answers")

    def test_batch_is_left_alone(self) -> None:
        """The batch's arrays are not changed."""
        batch, untouched = policy_batch(40), policy_batch(40)
        self.make().assign(batch, 3)
        for field in (
            "prompt_tokens",
            "predicted_tokens",
            "arrival_s",
            "prefix_id",
            "program_id",
            "chain_id",
        ):
            same = np.array_equal(getattr(batch, field), getattr(untouched, field))
            require(same, "leaves-batch", f"{field} was changed")
