"""Two applications at once: chain summary and ensembling."""

from __future__ import annotations

from pydantic import Field

from samullm_apps.chain_summary import ChainSummaryOptions, chain_summary
from samullm_apps.ensembling import MODELS, ensembling
from samullm_apps.paper import PaperApplication
from samullm_plugin import Application, mix_applications


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
