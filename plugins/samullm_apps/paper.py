"""The applications of the paper.

Ensembling: every model answers every request. Routing: each request goes to the one model that a
router chose for it beforehand. Chain summary: long documents are summarised chunk by chunk, then
judged. Mixed: chain summary and ensembling as one application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samullm_apps.statistics import chunk_counts, lognormal_lengths, normal_lengths
from samullm_plugin import (
    Application,
    ApplicationSource,
    Cluster,
    InputError,
    ModelNode,
    ModelSpec,
    RequestTable,
    bundled_gpu,
    bundled_model,
    mix_applications,
)
from samullm_plugin.model.types import Ints

GPU = "A100-80GB"


class SourceOptions(BaseModel):
    """Options of every bundled application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int = Field(default=8, ge=1, description="A100-80GB GPUs, with NVLink between pairs.")
    seed: int = Field(default=0, ge=0, description="Seed of the lengths' order.")


class PaperApplication(ApplicationSource):
    """An application on the paper's machine: A100-80GB with NVLink between pairs."""

    config: SourceOptions
    Config = SourceOptions

    def cluster(self) -> Cluster | None:
        """Return the paper's machine with as many GPUs as asked for."""
        return Cluster.uniform(bundled_gpu(GPU), self.config.gpus, nvlink=2)


def short(model: ModelSpec) -> str:
    """Return a node name for a model."""
    return model.name.rsplit("/", 1)[-1]


UNMEASURED = "stabilityai/stablelm-tuned-alpha-7b"
MODELS = (
    "lmsys/vicuna-13b-v1.5",
    "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5",
    "chavinlo/alpaca-13b",
    "project-baize/baize-v2-13b",
    "TheBloke/koala-13B-HF",
    "databricks/dolly-v2-12b",
    "mosaicml/mpt-7b-chat",
    "THUDM/chatglm3-6b",
    UNMEASURED,
)
ENSEMBLING_NOTES = (
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


def ensembling_nodes(
    specs: Mapping[str, ModelSpec], requests: int, max_tokens: int, seed: int
) -> tuple[ModelNode, ...]:
    """Return a node per model, all with the same requests, and no edges."""
    rng = np.random.default_rng([seed, 21])
    prompts = lognormal_lengths(requests, 5, 127, 21.0, 0.55, rng)
    table = RequestTable.of(prompts, max_tokens)
    return tuple(ModelNode(name, spec, table, "instruction") for name, spec in specs.items())


def ensembling(
    requests: int, max_tokens: int, models: tuple[str, ...], seed: int, name: str = "ensembling"
) -> Application:
    """Return the application."""
    specs = {short(spec): spec for spec in map(bundled_model, models)}
    notes = ENSEMBLING_NOTES if UNMEASURED in models else ENSEMBLING_NOTES[:-1]
    return Application(name, ensembling_nodes(specs, requests, max_tokens, seed), notes)


class Ensembling(PaperApplication):
    """Nine chat models answer the same requests (paper: 1000, 5000 or 10000; limit 256 or 512)."""

    name = "ensembling"
    Config = EnsemblingOptions
    config: EnsemblingOptions

    def build(self) -> Application:
        """Return one independent node per model."""
        config = self.config
        return ensembling(config.requests, config.max_tokens, MODELS[: config.models], config.seed)


ROUTED = {
    "meta-llama/Llama-2-70b-chat-hf": 408,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 1267,
    "WizardLMTeam/WizardLM-13B-V1.2": 2068,
    "meta-llama/CodeLlama-34b-Instruct-hf": 456,
    "mistralai/Mistral-7B-Instruct-v0.2": 2657,
}
ROUTING_NOTES = (
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


def routed_lengths(counts: dict[str, int], seed: int) -> tuple[list[Ints], list[Ints]]:
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
        return {m: max(round(n * self.config.share), 1) for m, n in ROUTED.items()}

    def build(self) -> Application:
        """Return one independent node per model, with its own requests."""
        counts = self._counts()
        prompts, outputs = routed_lengths(counts, self.config.seed)
        nodes = []
        for model, own_prompts, own_outputs in zip(counts, prompts, outputs, strict=True):
            spec = bundled_model(model)
            limit = own_outputs if self.config.known else self.config.max_tokens
            table = RequestTable.of(own_prompts, limit)
            nodes.append(ModelNode(short(spec), spec, table, "benchmark"))
        return Application("routing", tuple(nodes), ROUTING_NOTES)

    def output_tokens(self) -> tuple[Ints, ...] | None:
        """Return the output lengths if they are known beforehand."""
        if not self.config.known:
            return None
        return tuple(routed_lengths(self._counts(), self.config.seed)[1])


SUMMARISERS = {
    "vicuna": "lmsys/vicuna-13b-v1.5",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
}
JUDGE = "meta-llama/Llama-2-70b-chat-hf"
CHUNK_TOKENS = 2048
SUMMARY_TEMPLATE_TOKENS = 60
JUDGE_TEMPLATE_TOKENS = 150
CHAIN_NOTES = (
    "chunks per document: log-normal with the published median 3 and maximum (60 for 100 "
    "documents, 201 for 300); for other numbers of documents the maximum is interpolated in the "
    "logarithm, and 201 beyond 300",
    "the last chunk of a document is uniformly 1 to 2048 tokens long; templates add 60 tokens to a "
    "chunk and 150 to a summary that is judged",
    "judges read the final summary only; their outputs have the same limit as summaries",
)


class ChainSummaryOptions(SourceOptions):
    """Options of ``chain-summary``."""

    documents: int = Field(default=100, ge=1, description="Documents (paper: 100, 300 or 500).")
    judges: int = Field(default=1, ge=1, description="Judgements of each summary (paper: 1 to 8).")
    summariser: Literal["vicuna", "mixtral"] = Field(default="vicuna")
    max_tokens: int = Field(default=900, ge=1, description="Limit of every output.")


def most_chunks(documents: int) -> int:
    """Return the longest document's chunks."""
    if documents >= 300:
        return 201
    low, high = np.log(60.0), np.log(201.0)
    at = (np.log(documents) - np.log(100)) / (np.log(300) - np.log(100))
    return max(3, round(float(np.exp(low + (high - low) * at))))


@dataclass(frozen=True, slots=True)
class ChainTokens:
    """Tokens of what a chain summary reads: of a chunk, and of the templates around it."""

    chunk: int = CHUNK_TOKENS
    template: int = SUMMARY_TEMPLATE_TOKENS
    judge_template: int = JUDGE_TEMPLATE_TOKENS


def chain_nodes(
    chunks: Ints,
    summariser: ModelSpec,
    judges: Mapping[str, ModelSpec],
    judgements: int,
    max_tokens: int,
    rng: np.random.Generator,
    tokens: ChainTokens,
) -> tuple[ModelNode, ...]:
    """Return a summariser that waits for itself, and the judges of its last summaries.

    Its requests are every document's first chunk, then the second chunks, and so on: the order in
    which they can start.

    Args:
        chunks: of each document, shape ``(documents,)``.
        summariser: its model.
        judges: by the name of their node.
        judgements: of each summary by each judge.
        max_tokens: limit of every output.
        rng: gives the length of each document's last chunk.
        tokens: of chunks and templates.
    """
    last_tokens = rng.integers(1, tokens.chunk + 1, len(chunks))
    last = np.full(len(chunks), -1, np.int64)
    prompts: list[int] = []
    inputs: list[list[tuple[int, int]]] = []
    for k in range(int(chunks.max())):
        for document in np.flatnonzero(chunks > k):
            own = tokens.chunk if k + 1 < chunks[document] else int(last_tokens[document])
            inputs.append([(0, int(last[document]))] if k else [])
            last[document] = len(prompts)
            prompts.append(own + tokens.template)
    judged = [[(0, int(r))] for r in np.repeat(last, judgements)]
    judging = RequestTable.of([tokens.judge_template] * len(judged), max_tokens, judged)
    return (
        ModelNode("summarise", summariser, RequestTable.of(prompts, max_tokens, inputs), "summary"),
        *(ModelNode(name, spec, judging, "judgement") for name, spec in judges.items()),
    )


def chain_summary(
    documents: int,
    judges: int,
    summariser: str,
    max_tokens: int,
    seed: int,
    name: str = "chain-summary",
) -> Application:
    """Return the application: a summariser and a judge.

    Raises:
        InputError: if a chunk, the summary so far and a new one are too long for the summariser.
    """
    rng = np.random.default_rng([seed, 2048])
    chunks = chunk_counts(documents, 3, most_chunks(documents))
    spec, judge = bundled_model(SUMMARISERS[summariser]), {"judge": bundled_model(JUDGE)}
    if max_tokens * 2 + CHUNK_TOKENS + SUMMARY_TEMPLATE_TOKENS > spec.max_model_len:
        raise InputError(
            f"application chain-summary: max_tokens {max_tokens} is too much: a chunk, the summary "
            f"so far and a new one must fit in {spec.max_model_len} tokens"
        )
    nodes = chain_nodes(chunks, spec, judge, judges, max_tokens, rng, ChainTokens())
    return Application(name, nodes, CHAIN_NOTES)


class ChainSummary(PaperApplication):
    """Documents summarised chunk after chunk by one model, the summaries judged by another."""

    name = "chain-summary"
    Config = ChainSummaryOptions
    config: ChainSummaryOptions

    def build(self) -> Application:
        """Return the summariser and its judge."""
        config = self.config
        return chain_summary(
            config.documents, config.judges, config.summariser, config.max_tokens, config.seed
        )


class MixedOptions(ChainSummaryOptions):
    """Options of ``mixed``."""

    requests: int = Field(default=5000, ge=1, description="Requests of the ensembling part.")
    ensembling_max_tokens: int = Field(
        default=256, ge=1, description="Limit of the ensembling part's outputs."
    )


class Mixed(PaperApplication):
    """Chain summary (100 to 500 documents) and ensembling (5000 requests) planned together."""

    name = "mixed"
    Config = MixedOptions
    config: MixedOptions

    def build(self) -> Application:
        """Return the eleven nodes of both."""
        config = self.config
        chain = chain_summary(
            config.documents, config.judges, config.summariser, config.max_tokens, config.seed
        )
        ensemble = ensembling(config.requests, config.ensembling_max_tokens, MODELS, config.seed)
        return mix_applications("mixed", (chain, ensemble))


PAPER: tuple[type[PaperApplication], ...] = (Ensembling, Routing, ChainSummary, Mixed)
"""These applications."""
