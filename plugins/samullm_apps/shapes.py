"""Shapes beyond the paper: shared documents, map-reduce, vote and filter-vote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from samullm_apps.paper import CHUNK_TOKENS, JUDGE, PaperApplication, SourceOptions, short
from samullm_apps.statistics import chunk_counts, normal_lengths
from samullm_plugin import Application, EngineOptions, ModelNode, RequestTable, bundled_model
from samullm_plugin.model.types import Ints

MODELS = ("mistralai/Mistral-7B-Instruct-v0.2", "lmsys/vicuna-13b-v1.5")
QUESTION_TOKENS = (9, 120, 40.0, 20.0)
DOCUMENT_TOKENS = (500, 2500, 1500.0, 400.0)


class DocumentQuestionsOptions(SourceOptions):
    """Options of ``document-questions``."""

    gpus: int = Field(default=2, ge=1, description="A100-80GB GPUs, with NVLink between pairs.")
    documents: int = Field(default=150, ge=1, description="Documents.")
    questions: int = Field(default=10, ge=1, description="Questions on each document.")
    max_tokens: int = Field(default=128, ge=1, description="Limit of an answer.")
    prefix_caching: bool = Field(default=True, description="Engines keep the KV of prefixes.")


class DocumentQuestions(PaperApplication):
    """Two models answer questions on documents; prompts on one document share it as a prefix."""

    name = "document-questions"
    Config = DocumentQuestionsOptions
    config: DocumentQuestionsOptions

    def build(self) -> Application:
        """Return two nodes with the same requests, in an order that mixes the documents."""
        config = self.config
        rng = np.random.default_rng([config.seed, 12])
        documents = normal_lengths(config.documents, *DOCUMENT_TOKENS, rng)
        count = config.documents * config.questions
        asked = normal_lengths(count, *QUESTION_TOKENS, rng)
        document = rng.permutation(np.repeat(np.arange(config.documents), config.questions))
        engine = EngineOptions(enable_prefix_caching=config.prefix_caching)
        table = RequestTable.of(
            documents[document] + asked,
            config.max_tokens,
            prefix_id=document,
            prefix_tokens=documents[document],
        )
        nodes = []
        for name in MODELS:
            spec = replace(bundled_model(name), engine=engine)
            nodes.append(ModelNode(short(spec), spec, table, "answer"))
        notes = (
            "documents of 500 to 2500 tokens (mean 1500), questions of 9 to 120 (mean 40), in an "
            "order that mixes the documents; the size is this project's choice",
        )
        return Application("document-questions", tuple(nodes), notes)


ANSWERERS = (
    "mistralai/Mistral-7B-Instruct-v0.2",
    "WizardLMTeam/WizardLM-13B-V1.2",
    "lmsys/vicuna-13b-v1.5",
)
FILTER = "THUDM/chatglm3-6b"
TEMPLATE_TOKENS = 80


class MapReduceOptions(SourceOptions):
    """Options of ``map-reduce``."""

    documents: int = Field(default=300, ge=1, description="Documents.")
    map_max_tokens: int = Field(default=300, ge=1, description="Limit of a chunk's summary.")
    reduce_max_tokens: int = Field(default=900, ge=1, description="Limit of a document's summary.")


class MapReduce(PaperApplication):
    """Chunks summarised independently by one model, joined per document by a larger one."""

    name = "map-reduce"
    Config = MapReduceOptions
    config: MapReduceOptions

    def build(self) -> Application:
        """Return the map and the reduce node."""
        config = self.config
        rng = np.random.default_rng([config.seed, 10])
        chunks = rng.permutation(chunk_counts(config.documents, 4, 10))
        ends = np.cumsum(chunks)
        prompts = np.full(int(ends[-1]), CHUNK_TOKENS + TEMPLATE_TOKENS)
        prompts[ends - 1] = rng.integers(1, CHUNK_TOKENS + 1, len(chunks)) + TEMPLATE_TOKENS
        joined = [[(0, r) for r in range(e - c, e)] for c, e in zip(chunks, ends, strict=True)]
        notes = (
            "documents of 1 to 10 chunks of 2048 tokens, median 4, log-normal; templates add 80 "
            "tokens; the size is this project's choice",
        )
        return Application(
            "map-reduce",
            (
                ModelNode(
                    "map",
                    bundled_model(ANSWERERS[0]),
                    RequestTable.of(prompts, config.map_max_tokens),
                    "summary",
                ),
                ModelNode(
                    "reduce",
                    bundled_model(JUDGE),
                    RequestTable.of(
                        [TEMPLATE_TOKENS] * len(joined), config.reduce_max_tokens, joined
                    ),
                    "summary",
                ),
            ),
            notes,
        )


class VoteOptions(SourceOptions):
    """Options of ``vote``."""

    requests: int = Field(default=2000, ge=1, description="Questions.")
    max_tokens: int = Field(default=512, ge=1, description="Limit of an answer.")
    vote_max_tokens: int = Field(default=256, ge=1, description="Limit of the vote.")


class Vote(PaperApplication):
    """Three models answer each question, a larger one reads the answers and votes."""

    name = "vote"
    Config = VoteOptions
    config: VoteOptions

    def build(self) -> Application:
        """Return three answering nodes and the voter that joins them."""
        config = self.config
        rng = np.random.default_rng([config.seed, 3])
        prompts = normal_lengths(config.requests, 9, 577, 310.0, 110.0, rng)
        table = RequestTable.of(prompts, config.max_tokens)
        nodes = [*_answerers(table), _voter(prompts, config.vote_max_tokens, first=0)]
        notes = (
            "questions as long as the router benchmark's (9 to 577 tokens, mean 310); the voter's "
            "template adds 80 tokens; the size is this project's choice",
        )
        return Application("vote", tuple(nodes), notes)


class FilterVoteOptions(VoteOptions):
    """Options of ``filter-vote``."""

    requests: int = Field(default=3000, ge=1, description="Items before the filter.")
    keep: float = Field(default=0.4, gt=0, le=1, description="Share of items the filter keeps.")
    filter_max_tokens: int = Field(default=16, ge=1, description="Limit of the filter's verdict.")


class FilterVote(PaperApplication):
    """A small model filters items; three models answer those it keeps, a larger one votes."""

    name = "filter-vote"
    Config = FilterVoteOptions
    config: FilterVoteOptions

    def build(self) -> Application:
        """Return the filter, three answering nodes behind it and the voter."""
        config = self.config
        count = config.requests
        rng = np.random.default_rng([config.seed, 4])
        prompts = normal_lengths(count, 9, 577, 310.0, 110.0, rng)
        verdicts = RequestTable.of(prompts + TEMPLATE_TOKENS, config.filter_max_tokens)
        table = RequestTable.of(
            prompts,
            config.max_tokens,
            [[(0, r)] for r in range(count)],
            in_prompt=False,
            probability=np.full(count, config.keep),
            gate=np.arange(count, dtype=np.int64),
        )
        nodes = [
            ModelNode("filter", bundled_model(FILTER), verdicts, "filter"),
            *_answerers(table),
            _voter(prompts, config.vote_max_tokens, first=1),
        ]
        notes = (
            f"the filter keeps {config.keep:g} of the items, each independently; items as long as "
            "the router benchmark's prompts; the size is this project's choice",
        )
        return Application("filter-vote", tuple(nodes), notes)


def _answerers(table: RequestTable) -> list[ModelNode]:
    """Return a node per answering model, all with the same requests."""
    specs = [bundled_model(name) for name in ANSWERERS]
    return [ModelNode(short(spec), spec, table, "answer") for spec in specs]


def _voter(prompts: Ints, max_tokens: int, first: int) -> ModelNode:
    """Return the node that reads all answers to each question, those of node ``first`` and on."""
    joined = [[(first + i, r) for i in range(len(ANSWERERS))] for r in range(len(prompts))]
    table = RequestTable.of(prompts + TEMPLATE_TOKENS, max_tokens, joined)
    return ModelNode("vote", bundled_model(JUDGE), table, "vote")


SHAPES: tuple[type[PaperApplication], ...] = (MapReduce, Vote, FilterVote, DocumentQuestions)
"""These applications."""
