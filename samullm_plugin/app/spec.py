"""The fields of ``app.yaml``, checked when it is read; ``samullm schema`` prints their JSON Schema.

``docs/app-yaml.md`` explains them with one example per shape of application.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)


def _regular_expression(pattern: str) -> str:
    """Refuse a pattern Python's ``re`` does not understand."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_regular_expression)]
Probability = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """Base of all parts of the file: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ArchitectureSection(Section):
    """Figures of a transformer: :class:`~samullm_plugin.model.architecture.ModelArchitecture`."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    mlp: Literal["gated", "plain"] = "gated"
    num_experts: int = Field(default=0, ge=0)
    num_active_experts: int = Field(default=0, ge=0)
    dtype_bytes: float = Field(default=2.0, gt=0)


class ModelSection(Section):
    """A checkpoint and how its engines are started."""

    model: str = Field(
        min_length=1, description="Name, as latency and length profiles know it (hub id)."
    )
    path: str | None = Field(
        default=None, description="Local folder or hub id that is loaded; the name by default."
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
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


class SamplingSection(Section):
    """Sampling parameters by vLLM's names (``vllm/sampling_params.py``)."""

    max_tokens: int | None = Field(default=None, ge=1, description="Limit of the output.")
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    bad_words: list[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool | None = None
    extra: Mapping[str, JsonValue] = Field(
        default={}, description="Any other field of vLLM's SamplingParams, passed on unchecked."
    )

    def given(self) -> dict[str, object]:
        """Return the parameters that were set, by vLLM's names."""
        fields = self.model_dump(exclude_none=True, exclude={"extra"})
        return {**fields, **self.extra}


class InputSection(Section):
    """Which outputs of other nodes enter a request's prompt."""

    from_: str | list[str] = Field(
        alias="from", description="A node, a node with several models (all of them), or a list."
    )
    by: str = Field(
        default="item",
        description="Field of the upstream requests that is compared: `item` (the line's id; "
        "copies and chunks of a line share it), `id` (one request), or a field of the lines.",
    )
    key: str = Field(
        default="item", description="Field of this node's requests that it is compared with."
    )
    take: Literal["all", "first", "last"] = Field(
        default="all", description="Which of the upstream requests that match."
    )
    in_prompt: bool = Field(
        default=True, description="Whether the output enters the prompt; else it is waited for."
    )
    optional: bool = Field(
        default=False, description="Whether a request may find no upstream request that matches."
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the nodes named."""
        return (self.from_,) if isinstance(self.from_, str) else tuple(self.from_)


class BranchSection(Section):
    """One branch of a router."""

    when: Pattern | None = Field(
        default=None,
        description="Regular expression searched for in the router's output; the first branch "
        "that matches is taken. Without it: taken if no other matches.",
    )
    probability: Probability = Field(description="Share of requests expected to take it.")


class KeepSection(Section):
    """Which items a filter lets through."""

    when: Pattern = Field(
        description="Regular expression: items are kept whose output contains a match."
    )
    probability: Probability = Field(description="Share of items expected to be kept.")


class ChainSection(Section):
    """Requests of the node that wait for one another."""

    by: str = Field(default="item", description="Requests with equal values form one chain.")
    in_prompt: bool = Field(
        default=True, description="Whether the previous output enters the next prompt."
    )


class RequestsSection(Section):
    """A table of requests: one request per row."""

    file: str | None = Field(
        default=None,
        min_length=1,
        description="JSONL (plain, gzip, zstd), CSV, Parquet or Arrow file, or a folder of such "
        "files of one format, relative to this file.",
    )
    dataset: str | None = Field(
        default=None,
        min_length=1,
        description="Instead of file: a folder that Dataset.save_to_disk wrote, or the name of a "
        "Hugging Face dataset (needs the package datasets).",
    )
    split: str | None = Field(default=None, description="Split of the dataset.")
    format: Literal["jsonl", "csv", "parquet", "arrow"] | None = Field(
        default=None, description="Format of the file where its name does not tell it."
    )
    id: str | None = Field(
        default=None, description="Column that names the rows; default: id, else row numbers."
    )
    rename: Mapping[str, str] = Field(
        default={}, description="Columns to give other names, as old: new."
    )
    where: Mapping[str, JsonValue] = Field(
        default={},
        description="Take only rows whose fields have these values (a list: any of them).",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Take only so many rows, the first ones."
    )

    @property
    def name(self) -> str:
        """Return what to call the table in messages."""
        return self.file or self.dataset or ""

    @model_validator(mode="after")
    def _one_source(self) -> RequestsSection:
        """Refuse a table of no or two sources."""
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give file or dataset, one of them")
        if self.split is not None and self.dataset is None:
            raise ValueError("split belongs to dataset; there is none")
        if self.format is not None and self.file is None:
            raise ValueError("format belongs to file; there is none")
        names = list(self.rename.values())
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"rename: two columns would be named {twice[0]!r}")
        return self


class NodeSection(Section):
    """One use of a model: its requests, what they wait for, and how prompts are made."""

    model: Name | list[Name] = Field(
        description="Name under `models`; a list makes one node per model, named node.model."
    )
    requests: str | RequestsSection | None = Field(
        default=None,
        description="File of requests, relative to this file, one per line or row: JSONL, CSV, "
        "Parquet, Arrow, or a folder of one of them; or a mapping that says more about it.",
    )
    where: Mapping[str, JsonValue] = Field(
        default={},
        description="Take only the lines whose fields have these values (a list: any of them).",
    )
    for_each: str | None = Field(
        default=None,
        description="One request for each request of that node; `output` is its output.",
    )
    inputs: Mapping[Label, str | InputSection] = Field(
        default={},
        description="Outputs that enter the prompts, by the name the template uses. A plain node "
        "name joins by item. Without `requests` and `for_each`, there is one request per value "
        "of the first input's `by`.",
    )
    chain: bool | str | ChainSection = Field(
        default=False,
        description="Requests wait for the previous one: true (requests of one item), a field "
        "name, or a mapping.",
    )
    copies: int = Field(default=1, ge=1, description="How often each request is made.")
    route: Mapping[Name, BranchSection] = Field(
        default={},
        description="This node is a router: exactly one of these nodes answers each request.",
    )
    keep: KeepSection | None = Field(
        default=None, description="This node is a filter: what it drops goes no further."
    )
    prompt: str | None = Field(
        default=None,
        description="Jinja2 template of the prompt: fields of the line, inputs by name, "
        "`output` with for_each, `previous` in chains. Outputs it does not use are only "
        "waited for. Default: the line's prompt, then the inputs.",
    )
    chat: bool = Field(
        default=False, description="Send the prompt through the model's chat template."
    )
    template_tokens: int | None = Field(
        default=None, ge=0, description="Tokens that templates add; else they are counted."
    )
    prefix_tokens: int = Field(
        default=0, ge=0, description="Tokens at the start that all prompts of the node share."
    )
    sampling_params: SamplingSection = SamplingSection()
    task: str = Field(default="", description="Label that length estimators may tell apart.")

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of its models."""
        return (self.model,) if isinstance(self.model, str) else tuple(self.model)

    @property
    def table(self) -> RequestsSection | None:
        """Return the requests in their long form, or None."""
        if isinstance(self.requests, str):
            return RequestsSection(file=self.requests)
        return self.requests

    @property
    def edges(self) -> dict[str, InputSection]:
        """Return the inputs in their long form."""
        return {
            name: InputSection.model_validate({"from": edge}) if isinstance(edge, str) else edge
            for name, edge in self.inputs.items()
        }

    @property
    def chain_section(self) -> ChainSection | None:
        """Return the chain in its long form, or None."""
        if isinstance(self.chain, bool):
            return ChainSection() if self.chain else None
        return ChainSection(by=self.chain) if isinstance(self.chain, str) else self.chain

    @model_validator(mode="after")
    def _one_origin(self) -> NodeSection:
        """Refuse a node with two origins of its requests."""
        if self.requests and self.for_each:
            raise ValueError("give requests or for_each, not both")
        if self.where and not self.requests:
            raise ValueError("where picks lines of a requests file; there is no requests field")
        if self.route:
            total = sum(b.probability for b in self.route.values())
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"route: the probabilities add up to {total:g} instead of 1")
            if sum(b.when is None for b in self.route.values()) > 1:
                raise ValueError("route: only one branch may leave out `when`")
        if self.route and self.keep:
            raise ValueError("a node is a router (route) or a filter (keep), not both")
        return self


class GpuSection(Section):
    """Several GPUs of one kind."""

    gpu: str
    count: int = Field(ge=1)
    gpu_memory_gib: float | None = Field(default=None, gt=0)


class ClusterSection(Section):
    """The devices."""

    gpus: int | list[GpuSection] = Field(
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
    latency_model: Component = Component(type="linear")
    request_policy: Component | None = None
    fusion: bool = Field(
        default=True,
        description="Serve nodes of one model that follow one another with the same engines.",
    )
    scenarios: int = Field(default=4, ge=1, description="Independent length scenarios.")
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


class AppSpec(Section):
    """An application: models, nodes, and optionally the cluster and how to plan and run."""

    version: Literal[1] = Field(description="Version of this format.")
    name: Name
    models: Mapping[Name, ModelSection] = {}
    nodes: Mapping[Name, NodeSection] = {}
    applications: list[str] = Field(
        default=[],
        description="Instead of models and nodes: other app.yaml files, or bundled applications "
        "such as `ensembling:requests=1000`, planned and run together.",
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
