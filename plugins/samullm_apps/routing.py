"""LLM routing: each request goes to the one model a router chose for it beforehand."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from samullm_apps.paper import PaperApplication, SourceOptions, short
from samullm_apps.statistics import lognormal_lengths, normal_lengths
from samullm_plugin import Application, ModelNode, RequestTable, bundled_model
from samullm_plugin.model.types import Ints

COUNTS = {
    "meta-llama/Llama-2-70b-chat-hf": 408,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 1267,
    "WizardLMTeam/WizardLM-13B-V1.2": 2068,
    "meta-llama/CodeLlama-34b-Instruct-hf": 456,
    "mistralai/Mistral-7B-Instruct-v0.2": 2657,
}
NOTES = (
    "prompt lengths: normal with the published extremes 9 and 577 and mean 310, standard deviation "
    "110; output lengths: log-normal with the published extremes 3 and 1585 and mean 199; both "
    "independent of the model and of each other, which the publication does not say",
    "max_model_len is each model's own (4096 to 32768), as in the measurements",
)


class RoutingOptions(SourceOptions):
    """Options of ``routing``."""

    known: bool = Field(
        default=False,
        description="Whether output lengths are known beforehand; else the limit is max_tokens.",
    )
    max_tokens: int = Field(default=4096, ge=1, description="Limit where lengths are not known.")
    share: float = Field(
        default=1.0, gt=0, le=1, description="Share of each model's requests to keep."
    )


def true_lengths(counts: dict[str, int], seed: int) -> tuple[list[Ints], list[Ints]]:
    """Return prompt and output lengths per model."""
    rng = np.random.default_rng([seed, 310])
    total = sum(counts.values())
    prompts = normal_lengths(total, 9, 577, 310.0, 110.0, rng)
    outputs = lognormal_lengths(total, 3, 1585, 199.0, 0.75, rng)
    ends = np.cumsum(list(counts.values()))[:-1]
    return np.split(prompts, ends), np.split(outputs, ends)


class Routing(PaperApplication):
    """Requests of a router benchmark over five models of 7 to 70 billion parameters."""

    name = "routing"
    Config = RoutingOptions
    config: RoutingOptions

    def _counts(self) -> dict[str, int]:
        return {m: max(round(n * self.config.share), 1) for m, n in COUNTS.items()}

    def build(self) -> Application:
        """Return one independent node per model, with its own requests."""
        counts = self._counts()
        prompts, outputs = true_lengths(counts, self.config.seed)
        nodes = []
        for model, own_prompts, own_outputs in zip(counts, prompts, outputs, strict=True):
            spec = bundled_model(model)
            limit = own_outputs if self.config.known else self.config.max_tokens
            table = RequestTable.of(own_prompts, limit)
            nodes.append(ModelNode(short(spec), spec, table, "benchmark"))
        return Application("routing", tuple(nodes), NOTES)

    def output_tokens(self) -> tuple[Ints, ...] | None:
        """Return the output lengths if they are known beforehand."""
        if not self.config.known:
            return None
        return tuple(true_lengths(self._counts(), self.config.seed)[1])
