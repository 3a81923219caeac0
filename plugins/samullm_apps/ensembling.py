"""LLM ensembling: every model answers every request."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from samullm_apps.paper import PaperApplication, SourceOptions, short
from samullm_apps.statistics import lognormal_lengths
from samullm_plugin import Application, ModelNode, RequestTable, bundled_model

MODELS = (
    "lmsys/vicuna-13b-v1.5",
    "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5",
    "chavinlo/alpaca-13b",
    "project-baize/baize-v2-13b",
    "TheBloke/koala-13B-HF",
    "databricks/dolly-v2-12b",
    "mosaicml/mpt-7b-chat",
    "THUDM/chatglm3-6b",
    "stabilityai/stablelm-tuned-alpha-7b",
)
NOTES = (
    "prompt lengths: log-normal with the published extremes 5 and 127 and mean 21; the requests "
    "themselves (MixInstruct) are not part of the publication",
    "every model sees the same prompt lengths; templates are taken to be included in them",
    "stablelm-tuned-alpha-7b has no measured output lengths: mpt-7b-chat's stand in",
)


class EnsemblingOptions(SourceOptions):
    """Options of ``ensembling``."""

    requests: int = Field(default=1000, ge=1, description="Requests to every model.")
    max_tokens: int = Field(default=256, ge=1, description="Limit of every output.")
    models: int = Field(default=9, ge=1, le=9, description="The first so many of the nine models.")


def ensembling(requests: int, max_tokens: int, models: tuple[str, ...], seed: int) -> Application:
    """Return the application: one node per model, no edges."""
    rng = np.random.default_rng([seed, 21])
    prompts = lognormal_lengths(requests, 5, 127, 21.0, 0.55, rng)
    specs = [bundled_model(name) for name in models]
    nodes = tuple(
        ModelNode(short(spec), spec, RequestTable.of(prompts, max_tokens), "instruction")
        for spec in specs
    )
    notes = NOTES if "stabilityai/stablelm-tuned-alpha-7b" in models else NOTES[:-1]
    return Application("ensembling", nodes, notes)


class Ensembling(PaperApplication):
    """Nine chat models answer the same requests (paper: 1000, 5000 or 10000; limit 256 or 512)."""

    name = "ensembling"
    Config = EnsemblingOptions
    config: EnsemblingOptions

    def build(self) -> Application:
        """Return one independent node per model."""
        config = self.config
        return ensembling(config.requests, config.max_tokens, MODELS[: config.models], config.seed)
