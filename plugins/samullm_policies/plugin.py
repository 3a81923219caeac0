"""The shipped request policies, each with its source.

A policy only orders and spreads; it is honoured alike by the simulator and by vLLM's own
``priority`` scheduling, where the lower number runs first.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import PolicyBatch, RequestPolicy, hookimpl
from samullm_plugin.model.types import Floats, Ints


def ranks(*keys: Ints | Floats) -> Ints:
    """Return each row's place in the order of the keys, the first key counting most."""
    order = np.lexsort(keys[::-1])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place


class Fcfs(RequestPolicy):
    """First come, first served; replicas in turn."""

    name = "fcfs"

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[None, None]:
        """Leave both to the host: as requests come, and in turn."""
        return None, None


class ShortestFirstOptions(BaseModel):
    """Options of ``shortest-first``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    aging_s_per_token: float = Field(
        default=float("inf"),
        gt=0,
        description="The key is arrival plus this times the predicted length; infinite: the length "
        "alone, without aging.",
    )


class ShortestFirst(RequestPolicy):
    """Shortest predicted output first (Qiu et al. 2024, speculative shortest-job-first)."""

    name = "shortest-first"
    Config: ClassVar[type[BaseModel]] = ShortestFirstOptions
    config: ShortestFirstOptions

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints]:
        """Return priorities by predicted length, aged by arrival, and replicas in that order."""
        weight = self.config.aging_s_per_token
        if np.isinf(weight):
            place = ranks(batch.predicted_tokens, batch.arrival_s)
        else:
            place = ranks(batch.arrival_s + weight * batch.predicted_tokens)
        return place, place % num_replicas


class LongestFirst(RequestPolicy):
    """Longest predicted output first, the classic rule for makespan (Graham 1969)."""

    name = "longest-first"

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints]:
        """Return priorities by falling predicted length, and replicas in that order."""
        place = ranks(-batch.predicted_tokens, batch.arrival_s)
        return place, place % num_replicas


class MultiBinOptions(BaseModel):
    """Options of ``multi-bin``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bins: int = Field(default=4, ge=1, description="Bins of equally many requests.")
    longest_bin_first: bool = Field(default=True, description="Serve the bin of long ones first.")


class MultiBin(RequestPolicy):
    """Requests of similar predicted length run together (Multi-Bin Batching, arXiv 2412.04504)."""

    name = "multi-bin"
    Config: ClassVar[type[BaseModel]] = MultiBinOptions
    config: MultiBinOptions

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints]:
        """Return the bin as priority; the requests of each bin go to replicas in turn."""
        place = ranks(batch.predicted_tokens)
        bins = place * self.config.bins // max(1, len(batch))
        priority = self.config.bins - 1 - bins if self.config.longest_bin_first else bins
        order = ranks(priority, batch.arrival_s, np.arange(len(batch)))
        return priority.astype(np.int64), order % num_replicas


class PrefixAffinity(RequestPolicy):
    """Requests that share a prefix run one after the other on one replica (Preble, 2407.00023).

    Groups are placed longest first on the replica with the least predicted work; a group with more
    than a replica's fair share is split evenly. Needs prefix caching to pay off.
    """

    name = "prefix-affinity"

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints]:
        """Return priorities that keep groups together, and balanced replicas."""
        if len(batch) == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        work = (batch.prompt_tokens + batch.predicted_tokens).astype(np.float64)
        alone = -2 - np.arange(len(batch))  # requests without a prefix are groups of one
        group = np.where(batch.prefix_id >= 0, batch.prefix_id, alone)
        _, index = np.unique(group, return_inverse=True)
        sums = np.bincount(index, weights=work)
        fair = work.sum() / num_replicas
        within = _place_within(index)
        parts = (
            np.maximum(1, np.ceil(sums / fair - 1e-9)).astype(np.int64) if fair else 1 + 0 * sums
        )
        parts = np.minimum(parts, num_replicas)[index].astype(np.int64)
        counts = np.bincount(index)
        piece = index * num_replicas + within * parts // counts[index]
        pieces, piece_index = np.unique(piece, return_inverse=True)
        loads = np.bincount(piece_index, weights=work)
        home = np.empty(len(pieces), np.int64)
        filled = np.zeros(num_replicas)
        for p in np.argsort(-loads, kind="stable"):
            home[p] = int(np.argmin(filled))
            filled[home[p]] += loads[p]
        return ranks(batch.arrival_s, piece_index, within), home[piece_index]


def _place_within(index: Ints) -> Ints:
    """Return each row's place among the rows of its group."""
    order = np.argsort(index, kind="stable")
    first = np.searchsorted(index[order], index[order])
    place = np.empty(len(index), np.int64)
    place[order] = np.arange(len(index)) - first
    return place


class ProgramAge(RequestPolicy):
    """Programs that have been served least run first (Autellix, arXiv 2502.13965).

    The service a program has had is that of the longest path of requests before this one, known
    from the application and the predicted lengths. A program stays on one replica.
    """

    name = "program-age"

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints]:
        """Return priorities by attained service, and a replica per program, in turn."""
        _, program = np.unique(batch.program_id, return_inverse=True)
        priority = ranks(batch.program_tokens, batch.arrival_s, program)
        return priority, np.asarray(program % num_replicas, dtype=np.int64)


class IsolateLongestOptions(BaseModel):
    """Options of ``isolate-longest``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Of a replica's even share of the requests, what the isolated replica gets at "
        "most; one chain at least. The default is the best of three (docs/policies.md).",
    )


class IsolateLongest(RequestPolicy):
    """The longest chains on a replica of their own, the others spread evenly over the rest.

    A chain's requests run one after the other, so the longest chain decides when its node ends. On
    a replica with few others its iterations are short, and not held up by their prefills. Longest
    are the chains with most requests, which is known before any length is. Where no request waits
    for another of its node, or there is one replica, requests run as they come.
    """

    name = "isolate-longest"
    Config: ClassVar[type[BaseModel]] = IsolateLongestOptions
    config: IsolateLongestOptions

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints | None]:
        """Return a replica per chain, and equal priorities: the order stays that of arrival."""
        if batch.chain_id is None or num_replicas == 1 or len(batch) == 0:
            return None, None
        _, first, chain = np.unique(batch.chain_id, return_index=True, return_inverse=True)
        requests = np.bincount(chain)
        place = ranks(-requests, first)  # the longest first, then as submitted
        if len(requests) <= num_replicas:
            return np.zeros(len(batch), np.int64), place[chain]
        most = self.config.share * len(batch) / num_replicas
        isolated = max(1, int((np.cumsum(-np.sort(-requests)) <= most).sum()))
        replica = np.where(place < isolated, 0, 1 + (place - isolated) % (num_replicas - 1))
        return np.zeros(len(batch), np.int64), np.asarray(replica[chain], dtype=np.int64)


@hookimpl
def register_request_policies(register: Any) -> None:
    """Offer the shipped request policies."""
    for policy in (
        Fcfs,
        ShortestFirst,
        LongestFirst,
        MultiBin,
        PrefixAffinity,
        ProgramAge,
        IsolateLongest,
    ):
        register(policy)
