"""Questions on documents: requests about one document share it as the prefix of their prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from samullm_apps.paper import PaperApplication, SourceOptions, short
from samullm_apps.statistics import normal_lengths
from samullm_plugin import Application, EngineOptions, ModelNode, RequestTable, bundled_model

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
