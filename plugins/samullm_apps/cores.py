"""The shapes of the paper's applications at a size that real engines on a few CPU cores can run.

Three Llama-style models of 29, 85 and 206 million parameters in their layers, of which nothing but
the sizes exists: engines load them with random weights. An iteration takes some 5 to 65 ms on a
core, so that what an engine does besides computing (about 2 ms) does not rule.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from samullm_apps.paper import ChainTokens, SourceOptions, chain_nodes, ensembling_nodes
from samullm_apps.statistics import chunk_counts, normal_lengths
from samullm_plugin import (
    Application,
    ApplicationSource,
    Cluster,
    EngineOptions,
    Gpu,
    ModelArchitecture,
    ModelNode,
    ModelSpec,
    RequestTable,
    mix_applications,
)

DEVICE = "cpu-core"
MEMORY_BYTES = 4 << 30
"""What a core is taken to have; nothing is planned by it, KV capacities are given."""

MAX_MODEL_LEN = 1024
TOKENS = ChainTokens(chunk=256, template=20, judge_template=50)
LONGEST_DOCUMENT = 10
NOTES = (
    "three models of random weights (29, 85 and 206 million parameters in their layers); their "
    "output lengths are those of chatglm3-6b, mpt-7b-chat and vicuna-13b-v1.5, within the limits",
)


def model(name: str, layers: int, hidden: int, inner: int, heads: int) -> ModelSpec:
    """Return a Llama-style model with a quarter as many key-value heads."""
    architecture = ModelArchitecture(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads // 4,
        head_dim=hidden // heads,
        intermediate_size=inner,
        vocab_size=8192,
    )
    engine = EngineOptions(
        max_num_seqs=32, max_num_batched_tokens=256, block_size=32, async_scheduling=False
    )
    return ModelSpec(name, MAX_MODEL_LEN, architecture, engine=engine)


SMALL = model("cores-small", layers=6, hidden=640, inner=1728, heads=8)
MEDIUM = model("cores-medium", layers=12, hidden=768, inner=2304, heads=8)
LARGE = model("cores-large", layers=16, hidden=1024, inner=3072, heads=16)


def _models() -> dict[str, ModelSpec]:
    """Return the models by the names of their nodes."""
    return {"small": SMALL, "medium": MEDIUM, "large": LARGE}


class CoreOptions(SourceOptions):
    """Options of every application for CPU cores."""

    gpus: int = Field(default=2, ge=1, description="CPU cores; any of them can share a model.")


class CoreApplication(ApplicationSource):
    """An application on a few CPU cores."""

    config: CoreOptions
    Config = CoreOptions

    def cluster(self) -> Cluster | None:
        """Return as many cores as asked for, all joined."""
        cores = self.config.gpus
        return Cluster.uniform(Gpu(DEVICE, MEMORY_BYTES), cores, nvlink=cores)


class CoresEnsemblingOptions(CoreOptions):
    """Options of ``cores-ensembling``."""

    requests: int = Field(default=120, ge=1, description="Requests to every model.")
    max_tokens: int = Field(default=128, ge=1, description="Limit of every output.")


def ensembling(requests: int, max_tokens: int, seed: int) -> Application:
    """Return three models with the same requests."""
    nodes = ensembling_nodes(_models(), requests, max_tokens, seed)
    return Application("cores-ensembling", nodes, NOTES)


class CoresEnsembling(CoreApplication):
    """Three models of random weights answer the same requests on two CPU cores."""

    name = "cores-ensembling"
    Config = CoresEnsemblingOptions
    config: CoresEnsemblingOptions

    def build(self) -> Application:
        """Return one independent node per model."""
        return ensembling(self.config.requests, self.config.max_tokens, self.config.seed)


class CoresRoutingOptions(CoreOptions):
    """Options of ``cores-routing``."""

    requests: int = Field(default=288, ge=6, description="Requests to all models together.")
    max_tokens: int = Field(default=256, ge=1, description="Limit of every output.")


class CoresRouting(CoreApplication):
    """Requests spread unevenly over three models of random weights on two CPU cores."""

    name = "cores-routing"
    Config = CoresRoutingOptions
    config: CoresRoutingOptions

    def build(self) -> Application:
        """Return one independent node per model, with its own requests."""
        config = self.config
        rng = np.random.default_rng([config.seed, 310])
        large = config.requests // 6
        small = config.requests * 5 // 9
        prompts = normal_lengths(config.requests, 9, 300, 120.0, 60.0, rng)
        parts = np.split(prompts, [small, config.requests - large])
        nodes = tuple(
            ModelNode(name, spec, RequestTable.of(part, config.max_tokens), "benchmark")
            for (name, spec), part in zip(_models().items(), parts, strict=True)
        )
        return Application(self.name, nodes, NOTES)


class CoresChainSummaryOptions(CoreOptions):
    """Options of ``cores-chain-summary``."""

    documents: int = Field(default=20, ge=1, description="Documents of 1 to 10 chunks.")
    judges: int = Field(default=2, ge=1, description="Judgements of each summary per judge.")
    max_tokens: int = Field(default=128, ge=1, le=512, description="Limit of every output.")


def chain_summary(documents: int, judges: int, max_tokens: int, seed: int) -> Application:
    """Return a summariser that waits for itself, and two judges of its last summaries."""
    rng = np.random.default_rng([seed, TOKENS.chunk])
    chunks = rng.permutation(chunk_counts(documents, 3, LONGEST_DOCUMENT))
    judging = {"judge.large": LARGE, "judge.small": SMALL}
    nodes = chain_nodes(chunks, MEDIUM, judging, judges, max_tokens, rng, TOKENS)
    notes = (
        *NOTES,
        f"documents of 1 to {LONGEST_DOCUMENT} chunks of {TOKENS.chunk} tokens, median 3; "
        f"templates add {TOKENS.template} tokens to a chunk and {TOKENS.judge_template} to "
        "a summary that is judged",
    )
    return Application("cores-chain-summary", nodes, notes)


class CoresChainSummary(CoreApplication):
    """Documents summarised chunk after chunk, judged by two models, on two CPU cores."""

    name = "cores-chain-summary"
    Config = CoresChainSummaryOptions
    config: CoresChainSummaryOptions

    def build(self) -> Application:
        """Return the summariser and its two judges."""
        config = self.config
        return chain_summary(config.documents, config.judges, config.max_tokens, config.seed)


class CoresMixedOptions(CoresChainSummaryOptions):
    """Options of ``cores-mixed``."""

    documents: int = Field(default=12, ge=1, description="Documents of 1 to 10 chunks.")
    requests: int = Field(default=80, ge=1, description="Requests of the ensembling part.")


class CoresMixed(CoreApplication):
    """Chain summary and ensembling planned together on two CPU cores."""

    name = "cores-mixed"
    Config = CoresMixedOptions
    config: CoresMixedOptions

    def build(self) -> Application:
        """Return the six nodes of both."""
        config = self.config
        chain = chain_summary(config.documents, config.judges, config.max_tokens, config.seed)
        ensemble = ensembling(config.requests, config.max_tokens, config.seed)
        return mix_applications(self.name, (chain, ensemble))


CORES: tuple[type[CoreApplication], ...] = (
    CoresEnsembling,
    CoresRouting,
    CoresChainSummary,
    CoresMixed,
)
"""The applications for CPU cores."""
