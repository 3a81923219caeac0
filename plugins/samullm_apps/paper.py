"""Options and helpers that the applications of the paper share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import ApplicationSource, Cluster, ModelSpec, bundled_gpu

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
