"""Longest prompts first, on the replica with the least work."""

import numpy as np

from samullm_plugin import PolicyBatch, RequestPolicy, hookimpl

samullm_interface = 1


class LongestPrompt(RequestPolicy):
    """The longest prompts first; each request to the replica with the least predicted work."""

    name = "longest-prompt"

    def assign(self, batch: PolicyBatch, num_replicas: int) -> tuple[np.ndarray, np.ndarray]:
        """Return priorities (the lower number first) and replicas."""
        order = np.argsort(-batch.prompt_tokens, kind="stable")
        priority = np.empty(len(batch), np.int64)
        priority[order] = np.arange(len(batch))
        work = batch.prompt_tokens + batch.predicted_tokens
        load = np.zeros(num_replicas, np.int64)
        replica = np.zeros(len(batch), np.int64)
        for request in order:
            replica[request] = int(np.argmin(load))
            load[replica[request]] += work[request]
        return priority, replica


@hookimpl
def register_request_policies(register):
    """Offer the policy."""
    register(LongestPrompt)
