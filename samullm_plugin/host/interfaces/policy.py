"""Request policies: in which order and on which replica the requests of a node run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from samullm_plugin.host.interfaces.plugin import Plugin
from samullm_plugin.model.types import Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class PolicyBatch:
    """Requests that a policy orders and spreads, one row each, in submission order.

    Attributes:
        node: name of the node.
        prompt_tokens: shape ``(n,)``.
        predicted_tokens: predicted output lengths, shape ``(n,)``.
        arrival_s: 0 for those that can be served when the first of them can, 1e9 for those whose
            inputs of other nodes come later: a run knows no more, and plans assume no more.
        prefix_id: shared-prefix ids, -1: none, shape ``(n,)``.
        prefix_tokens: lengths of the shared prefixes.
        program_id: requests of one document or item of the application, shape ``(n,)``.
        program_tokens: tokens that program has been served so far and is predicted to need before
            this request, shape ``(n,)``.
        chain_id: requests of this node that wait for each other, directly or through others of the
            node, have the same, shape ``(n,)``; None: none waits for another.
    """

    node: str
    prompt_tokens: Ints
    predicted_tokens: Ints
    arrival_s: Floats
    prefix_id: Ints
    prefix_tokens: Ints
    program_id: Ints
    program_tokens: Ints
    chain_id: Ints | None = None

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.prompt_tokens)


class RequestPolicy(Plugin, ABC):
    """Gives every request a priority and a replica.

    A complete plugin::

        import numpy as np
        from samullm_plugin import RequestPolicy, hookimpl


        class LongestPrompt(RequestPolicy):
            '''The longest prompts first, replicas in turn.'''

            name = "longest-prompt"

            def assign(self, batch, num_replicas):
                return -batch.prompt_tokens, np.arange(len(batch)) % num_replicas


        @hookimpl
        def register_request_policies(register):
            register(LongestPrompt)
    """

    @abstractmethod
    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[Ints | None, Ints | None]:
        """Return priorities and replicas.

        Requests that wait for an earlier request of the same node go to that one's replica,
        whatever is returned for them.

        Args:
            batch: the requests.
            num_replicas: data-parallel size.

        Returns:
            Priorities (the lower number first, as vLLM's ``priority`` scheduling has it; None:
            first come, first served) and replicas (0 to ``num_replicas - 1``; None: in turn, as
            they can be served), both of shape ``(len(batch),)``.
        """
