"""Chain summary: long documents are summarised chunk by chunk, then judged.

It is here alone, and as one application with ensembling (``mixed``).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from samullm_apps.ensembling import MODELS, ensembling
from samullm_apps.paper import PaperApplication, SourceOptions
from samullm_apps.statistics import chunk_counts
from samullm_plugin import (
    Application,
    InputError,
    ModelNode,
    RequestTable,
    bundled_model,
    mix_applications,
)
from samullm_plugin.model.types import Ints

SUMMARISERS = {
    "vicuna": "lmsys/vicuna-13b-v1.5",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
}
JUDGE = "meta-llama/Llama-2-70b-chat-hf"
CHUNK_TOKENS = 2048
SUMMARY_TEMPLATE_TOKENS = 60
JUDGE_TEMPLATE_TOKENS = 150
NOTES = (
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


def chain_requests(
    chunks: Ints,
    max_tokens: int,
    rng: np.random.Generator,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    template_tokens: int = SUMMARY_TEMPLATE_TOKENS,
) -> tuple[RequestTable, Ints]:
    """Return the summariser's requests and, per document, the index of its last one.

    First every document's first chunk, then the second chunks, and so on: the order in which they
    can start.
    """
    last_tokens = rng.integers(1, chunk_tokens + 1, len(chunks))
    previous = np.full(len(chunks), -1, np.int64)
    prompts: list[int] = []
    inputs: list[list[tuple[int, int]]] = []
    for k in range(int(chunks.max())):
        for document in np.flatnonzero(chunks > k):
            own = chunk_tokens if k + 1 < chunks[document] else int(last_tokens[document])
            inputs.append([(0, int(previous[document]))] if k else [])
            previous[document] = len(prompts)
            prompts.append(own + template_tokens)
    return RequestTable.of(prompts, max_tokens, inputs), previous


def chain_summary(
    documents: int, judges: int, summariser: str, max_tokens: int, seed: int
) -> Application:
    """Return the application: a summariser that waits for itself, and a judge."""
    rng = np.random.default_rng([seed, 2048])
    chunks = chunk_counts(documents, 3, most_chunks(documents))
    table, last = chain_requests(chunks, max_tokens, rng)
    summarise = bundled_model(SUMMARISERS[summariser])
    judge = bundled_model(JUDGE)
    if max_tokens * 2 + CHUNK_TOKENS + SUMMARY_TEMPLATE_TOKENS > summarise.max_model_len:
        raise InputError(
            f"application chain-summary: max_tokens {max_tokens} is too much: a chunk, the summary "
            f"so far and a new one must fit in {summarise.max_model_len} tokens"
        )
    judged = [[(0, int(r))] for r in np.repeat(last, judges)]
    return Application(
        "chain-summary",
        (
            ModelNode("summarise", summarise, table, "summary"),
            ModelNode(
                "judge",
                judge,
                RequestTable.of([JUDGE_TEMPLATE_TOKENS] * len(judged), max_tokens, judged),
                "judgement",
            ),
        ),
        NOTES,
    )


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
