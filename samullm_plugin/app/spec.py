"""The fields of ``app.yaml``, checked when it is read; ``samullm schema`` prints their JSON Schema.

``docs/app-yaml.md`` explains them with one example per shape of application. Fields of nodes are in
:mod:`samullm_plugin.app.nodespec`, those of their rows in :mod:`samullm_plugin.app.rowspec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from samullm_plugin.app.fields import Count, Natural, NumGpus, Section
from samullm_plugin.app.nodespec import AnyNode, MessageSection
from samullm_plugin.app.rowspec import Name


class ArchitectureSection(Section):
    """Figures of a transformer: :class:`~samullm_plugin.model.architecture.ModelArchitecture`."""

    num_layers: Count
    hidden_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    intermediate_size: Count
    vocab_size: Count
    mlp: Literal["gated", "plain"] = "gated"
    num_experts: Natural = 0
    num_active_experts: Natural = 0
    dtype_bytes: float = Field(default=2.0, gt=0)


class ModelSection(Section):
    """A checkpoint and how its engines are started."""

    model: str = Field(
        min_length=1, description="Name, as latency and length profiles know it (hub id)."
    )
    path: str | None = Field(
        default=None, description="Local folder or hub id that is loaded; the name by default."
    )
    max_model_len: Count | None = Field(
        default=None,
        description="Longest prompt plus output in tokens; by default that of the bundled figures "
        "or of the configuration file.",
    )
    architecture: str | ArchitectureSection | None = Field(
        default=None,
        description="Figures; or a Hugging Face config.json (or its folder), relative to this "
        "file; or the name of a bundled model to take them from. By default the bundled figures "
        "of the model's name, or config.json in `path`.",
    )
    engine_args: Mapping[str, JsonValue] = Field(
        default={},
        description="Engine arguments by vLLM's names. Parallel sizes are the planner's.",
    )


class SharedSection(Section):
    """How engines share GPUs."""

    engines_per_gpu: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Engines that may be on one GPU at once, each with an equal part of its "
        "memory.",
    )
    slowdown: float | None = Field(
        default=None,
        ge=1,
        le=1000,
        allow_inf_nan=False,
        description="Factor on iteration times where engines share a GPU, as `samullm profile "
        "slowdown` measures it; needed with more than one.",
    )


class GpuSection(SharedSection):
    """Several GPUs of one kind."""

    gpu: str
    count: NumGpus = Field(ge=1)
    gpu_memory_gib: float | None = Field(default=None, gt=0)


NETWORK_GBIT_S = 100.0
"""What Google gives its machines of eight A100 (a2-highgpu-8g); AWS gives 400, Azure 1600."""

NETWORK_LATENCY_US = 50.0
"""**Assumed**: TCP inside a data centre; InfiniBand has a tenth of it."""


class ClusterSection(SharedSection):
    """The devices."""

    gpus: NumGpus | list[GpuSection] = Field(
        description="Number of GPUs, or a list of kinds for clusters of several."
    )
    gpu: str = Field(default="A100-80GB", description="Kind of GPU, as latency profiles name it.")
    gpu_memory_gib: float | None = Field(
        default=None, gt=0, description="Memory of one; known for common kinds."
    )
    nvlink: int | list[list[int]] = Field(
        default=1, description="GPUs per NVLink group (neighbours), or the groups themselves."
    )
    machines: int | list[list[int]] = Field(
        default=1, description="Number of machines with equally many GPUs, or the GPUs of each."
    )
    replicas_across_machines: bool = Field(
        default=False,
        description="Whether the pipeline stages of a replica that fits on no machine may lie on "
        "several; tensor parallelism stays inside a machine.",
    )
    network_gbit_s: float | None = Field(
        default=None,
        gt=0,
        description="Gigabits per second from one machine to another, for replicas across "
        f"machines; {NETWORK_GBIT_S:g} if not given.",
    )
    network_latency_us: float | None = Field(
        default=None,
        ge=0,
        description="Microseconds until the first byte is there, for replicas across machines; "
        f"{NETWORK_LATENCY_US:g} if not given.",
    )
    host_memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="Memory of each machine, within which engines are prepared ahead and sleep; as "
        "much as its GPUs have together if not given.",
    )

    @field_validator("gpus")
    @classmethod
    def _some(cls, value: int | list[GpuSection]) -> int | list[GpuSection]:
        """Refuse a cluster without GPUs."""
        if (isinstance(value, int) and value < 1) or value == []:
            raise ValueError("at least one GPU is needed")
        return value


class Component(Section):
    """A plugin and its options."""

    type: str = Field(min_length=1, description="Its name, as `samullm plugins` lists it.")
    options: Mapping[str, JsonValue] = {}


def _component(value: object) -> object:
    """Accept a plain name for a component without options."""
    return {"type": value} if isinstance(value, str) else value


class PlannerSection(Section):
    """How a plan is made."""

    scheduler: Component = Component(type="auto")
    length_estimator: Component = Component(type="ecdf")
    latency_model: Component | None = Field(
        default=None,
        description="Where iteration times come from. By default the best that is known of each "
        "model and GPU: measured by runs on this machine, by a profile, transferred from other "
        "models, operator tables, and else assumed from data sheets.",
    )
    request_policy: Component | None = None
    fusion: bool = Field(
        default=True,
        description="Serve nodes of one model that follow one another with the same engines, those "
        "side by side where that is shorter, and let nodes that start take over engines of nodes "
        "that have finished.",
    )
    prepared_starts: bool = Field(
        default=False,
        description="Do what an engine start needs no device for while others still compute.",
    )
    sleeping_engines: bool = Field(
        default=False,
        description="Let engines sleep that a later node needs again on the same devices in the "
        "same sizes: waking takes less than a start.",
    )
    pipeline_parallel_sizes: list[Count] | None = Field(
        default=None,
        min_length=1,
        description="Groups of layers to consider for a replica, such as [1, 2, 4]. By default 1, "
        "and more only for models that fit no GPU or NVLink group whole.",
    )
    scenarios: Count = Field(default=4, description="Independent length scenarios.")
    seed: int = Field(default=0, ge=0)
    page_cache: Literal["warm", "cold"] = Field(
        default="warm", description="Whether engine starts find their files in the page cache."
    )
    budget_s: float | None = Field(
        default=None, gt=0, description="Seconds a scheduler may search; its own default if unset."
    )

    _names = field_validator(
        "scheduler", "length_estimator", "latency_model", "request_policy", mode="before"
    )(_component)


class OutputSection(Section):
    """The joined table of a run: one row per item, with its inputs and all outputs."""

    file: str = Field(
        min_length=1,
        description="File in the run's directory; .parquet, .csv or .jsonl says its format.",
    )
    columns: list[str] = Field(
        default=[],
        description="id, fields of the input, nodes, and node.field of outputs with fields; also "
        "node.error, .finish_reason, .prompt_tokens, .completion_tokens. Empty: everything.",
    )
    rows: str | None = Field(
        default=None, description="A node: one row per request of it; default: one per item."
    )


class AppSpec(Section):
    """An application: models, nodes, and optionally the cluster and how to plan and run."""

    version: Literal[1] = Field(description="Version of this format.")
    name: Name
    models: Mapping[Name, ModelSection] = {}
    nodes: Mapping[Name, AnyNode] = {}
    messages: Mapping[Name, list[MessageSection]] = Field(
        default={},
        description="Turns declared once, such as examples, that nodes `include`.",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail",
        description="Rows that cannot be asked (no JSON, an empty or too long prompt, a field that "
        "is not supported): fail lists them all and starts nothing; skip runs the others and "
        "writes these to the outputs as errors.",
    )
    applications: list[str] = Field(
        default=[],
        description="Instead of models and nodes: other app.yaml files, or bundled applications "
        "such as `ensembling:requests=1000`, planned and run together.",
    )
    output: OutputSection | None = Field(
        default=None, description="Write a joined table while the application runs."
    )
    cluster: ClusterSection | None = None
    planner: PlannerSection = PlannerSection()
    executor: Component = Component(type="simulated")

    _names = field_validator("executor", mode="before")(_component)

    @model_validator(mode="after")
    def _some_content(self) -> AppSpec:
        """Refuse a file with nothing to run, or with both forms."""
        if self.applications and (self.nodes or self.models):
            raise ValueError("give models and nodes, or applications, not both")
        if not self.applications and not self.nodes:
            raise ValueError("it has no nodes; an application needs at least one")
        return self
