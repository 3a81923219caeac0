"""The fields of ``app.yaml``, checked when it is read; ``samullm schema`` prints their JSON Schema.

``docs/app-yaml.md`` explains them with one example per shape of application.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.app.section import Section


def _regular_expression(pattern: str) -> str:
    """Refuse a pattern Python's ``re`` does not understand."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


def _expression(text: str) -> str:
    """Refuse a text that is no expression (:mod:`samullm_plugin.app.expressions`)."""
    parsed(text)
    return text


Pattern = Annotated[str, AfterValidator(_regular_expression)]
Expr = Annotated[str, AfterValidator(_expression)]
Probability = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


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
    """One branch of a router: the first that matches is taken."""

    when: Pattern | None = Field(
        default=None, description="Regular expression searched for in the router's output."
    )
    expr: Expr | None = Field(
        default=None,
        description="Expression over the router's fields, such as `score < 7`. With neither: "
        "taken if no other branch matches.",
    )
    probability: Probability | None = Field(
        default=None,
        description="Share of requests expected to take it; by default an even part of the rest.",
    )

    @model_validator(mode="after")
    def _one_condition(self) -> BranchSection:
        """Refuse two conditions."""
        if self.when is not None and self.expr is not None:
            raise ValueError("give when or expr, not both")
        return self

    @property
    def is_rest(self) -> bool:
        """Whether it is taken if no other branch matches."""
        return self.when is None and self.expr is None


class KeepSection(Section):
    """Which items a filter lets through."""

    when: Pattern | None = Field(
        default=None,
        description="Regular expression: items are kept whose output contains a match.",
    )
    expr: Expr | None = Field(
        default=None,
        description="Expression over the node's fields: items are kept for which it is true.",
    )
    probability: Probability = Field(default=0.5, description="Share of items expected to be kept.")

    @model_validator(mode="after")
    def _one_condition(self) -> KeepSection:
        """Refuse no condition, or two."""
        if (self.when is None) == (self.expr is None):
            raise ValueError("give when or expr")
        return self


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


class MessageSection(Section):
    """One turn of a conversation, or several that are written elsewhere: exactly one field."""

    system: str | None = Field(default=None, description="Template of a system turn.")
    user: str | None = Field(default=None, description="Template of a user turn.")
    assistant: str | None = Field(default=None, description="Template of an assistant turn.")
    include: Name | None = Field(
        default=None, description="Turns declared once under the application's `messages`."
    )
    history: Label | None = Field(
        default=None,
        description="Field of the row that holds earlier turns (role and content); they stay "
        "turns of their own.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> MessageSection:
        """Refuse a turn that is none or several."""
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of system, user, assistant, include and history")
        return self

    @property
    def turn(self) -> tuple[str, str] | None:
        """Return role and template; None for turns written elsewhere."""
        for role in ("system", "user", "assistant"):
            if (template := getattr(self, role)) is not None:
                return role, str(template)
        return None


class RegexSection(Section):
    """Outputs that match a regular expression; its named groups become fields."""

    regex: Pattern


class ChoiceSection(Section):
    """Outputs that are one of some texts."""

    choice: list[str] = Field(min_length=1)


def _kind_of_schema(value: object) -> str:
    """Return in which of its forms a schema is written."""
    if isinstance(value, RegexSection | ChoiceSection):
        return type(value).__name__
    if isinstance(value, Mapping):
        forms = {"regex": "RegexSection", "choice": "ChoiceSection"}
        return next((kind for key, kind in forms.items() if key in value), "dict")
    return "class"


OutputSchema = Annotated[
    Annotated[RegexSection, Tag("RegexSection")]
    | Annotated[ChoiceSection, Tag("ChoiceSection")]
    | Annotated[Mapping[str, JsonValue], Tag("dict")]
    | Annotated[str | SkipJsonSchema[type[BaseModel]], Tag("class")],
    Discriminator(_kind_of_schema),
]
"""A regular expression, a choice, a JSON schema, or the place of a pydantic model (or itself)."""


class NodeBase(Section):
    """What nodes of all kinds have in common: their rows, and what follows from the outputs."""

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
    route: Mapping[Name, BranchSection] = Field(
        default={},
        description="This node is a router: exactly one of these nodes answers each request.",
    )
    keep: KeepSection | None = Field(
        default=None, description="This node is a filter: what it drops goes no further."
    )
    otherwise: Literal["drop", "pass"] = Field(
        default="drop",
        description="What becomes of an output that a filter does not keep or no branch of a "
        "router matches. pass: an input that takes it together with the nodes behind (`from: "
        "[small, large]`) has this output where theirs is missing.",
    )
    sample: JsonValue = Field(
        default=None,
        description="An output as the node may give it (a text or a mapping of fields); templates "
        "and expressions that use it are tried with it.",
    )

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

    @model_validator(mode="after")
    def _one_origin(self) -> NodeBase:
        """Refuse a node with two origins of its requests, or two ways to decide."""
        if self.requests and self.for_each:
            raise ValueError("give requests or for_each, not both")
        if self.where and not self.requests:
            raise ValueError("where picks lines of a requests file; there is no requests field")
        if self.route:
            given = [b.probability for b in self.route.values() if b.probability is not None]
            total, whole = sum(given), len(given) == len(self.route) and self.otherwise == "drop"
            if (whole and abs(total - 1.0) > 1e-6) or total > 1.0 + 1e-6:
                raise ValueError(f"route: the probabilities add up to {total:g} instead of 1")
            if sum(b.is_rest for b in self.route.values()) > 1:
                raise ValueError("route: only one branch may leave out `when` and `expr`")
        if self.route and self.keep:
            raise ValueError("a node is a router (route) or a filter (keep), not both")
        if self.otherwise == "pass" and not (self.route or self.keep):
            raise ValueError("otherwise: only a router or a filter lets pass what it does not take")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of requests that each branch of a router is expected to take."""
        given = {n: b.probability for n, b in self.route.items() if b.probability is not None}
        open_ = [n for n in self.route if n not in given]
        parts = len(open_) + (self.otherwise == "pass" and not any(
            b.is_rest for b in self.route.values()
        ))  # fmt: skip
        rest = max(0.0, 1.0 - sum(given.values())) / max(parts, 1)
        return {n: given.get(n, rest) for n in self.route}


POOLING_TASKS = ("embed", "score", "classify", "reward")
"""What a pooling model's node may be asked for; any other task is a label of generated outputs."""


class NodeSection(NodeBase):
    """One use of a model: its requests, what they wait for, and how prompts are made."""

    model: Name | list[Name] = Field(
        description="Name under `models`; a list makes one node per model, named node.model."
    )
    chain: bool | str | ChainSection = Field(
        default=False,
        description="Requests wait for the previous one: true (requests of one item), a field "
        "name, or a mapping.",
    )
    copies: int = Field(
        default=1,
        ge=1,
        description="How often each request is made; templates see which as `copy`, from 1.",
    )
    n: int = Field(
        default=1,
        ge=1,
        description="Samples per request, as vLLM's n: requests with one prompt and other seeds, "
        "seen by others as copies are.",
    )
    prompt: str | None = Field(
        default=None,
        description="Jinja2 template of the prompt: fields of the line, inputs and nodes before "
        "by name (`{{ rate.score }}`), `output` with for_each, `previous` in chains. Outputs it "
        "does not use are only waited for. Default: the line's prompt, then the inputs.",
    )
    messages: list[MessageSection] = Field(
        default=[],
        description="Instead of prompt: turns of a conversation, each a template of its own.",
    )
    chat: bool = Field(
        default=False, description="Send the prompt through the model's chat template."
    )
    chat_template: str | None = Field(
        default=None, description="Chat template (Jinja2) instead of the model's own."
    )
    chat_template_kwargs: Mapping[str, JsonValue] = Field(
        default={},
        description="What the chat template is told, such as `enable_thinking: false`; a line's "
        "own come first.",
    )
    template_tokens: int | None = Field(
        default=None, ge=0, description="Tokens that templates add; else they are counted."
    )
    prefix_tokens: int = Field(
        default=0, ge=0, description="Tokens at the start that all prompts of the node share."
    )
    sampling_params: SamplingSection = SamplingSection()
    output_schema: OutputSchema | None = Field(
        default=None,
        description="What every output must be: a JSON schema, `module:Class` or `file.py:Class` "
        "of a pydantic model, `{regex: ...}` or `{choice: [...]}`. The engine generates nothing "
        "else, and the parsed value is a field: `{{ rate.score }}`.",
    )
    check: str | SkipJsonSchema[Callable[..., Any]] | None = Field(
        default=None,
        description="Function (`file.py:name`) that is given the row with this node's output; it "
        "may raise Reject, or return the node's value.",
    )
    retries: int = Field(
        default=0,
        ge=0,
        description="How often a request is asked again whose output does not follow the schema "
        "or is rejected by `check`, each time with another seed.",
    )
    retry_temperature: float = Field(
        default=0.2, ge=0, description="What each retry adds to the temperature."
    )
    reject_rate: Probability = Field(
        default=0.05, description="Share of outputs expected to be rejected."
    )
    lora: str | None = Field(
        default=None,
        description="Folder of an adapter of the model, relative to this file; nodes of one model "
        "with other adapters, or none, share its engines.",
    )
    pair: str | None = Field(
        default=None,
        description="Template of the second text, for `task: score` of models that compare two.",
    )
    task: str = Field(
        default="",
        description="embed, score, classify or reward: the model is a pooling model, and outputs "
        "are numbers. Any other: label that length estimators may tell apart.",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of its models."""
        return (self.model,) if isinstance(self.model, str) else tuple(self.model)

    @property
    def pools(self) -> bool:
        """Whether the model gives numbers instead of text."""
        return self.task in POOLING_TASKS

    @property
    def chain_section(self) -> ChainSection | None:
        """Return the chain in its long form, or None."""
        if isinstance(self.chain, bool):
            return ChainSection() if self.chain else None
        return ChainSection(by=self.chain) if isinstance(self.chain, str) else self.chain

    @model_validator(mode="after")
    def _consistent(self) -> NodeSection:
        """Refuse fields that say two things, or that have no meaning together."""
        if self.prompt is not None and self.messages:
            raise ValueError("give prompt or messages, not both")
        if self.copies > 1 and self.n > 1:
            raise ValueError("give copies or n, not both")
        if self.retries and self.output_schema is None and self.check is None:
            raise ValueError("retries: nothing can be rejected without output_schema or check")
        if "retry_temperature" in self.model_fields_set and not self.retries:
            raise ValueError("retry_temperature: there are no retries")
        if self.pair is not None and self.task != "score":
            raise ValueError("pair: only nodes of `task: score` compare two texts")
        if self.pools:
            given = {"output_schema", "check", "retries", "n", "chain"} & self.model_fields_set
            given |= {"sampling_params"} if self.sampling_params.given() else set()
            if given:
                names = ", ".join(sorted(given))
                raise ValueError(f"{names}: a node of `task: {self.task}` generates no text")
        return self


class PythonSection(NodeBase):
    """A function of rows: it runs on CPUs beside the engines and takes no device."""

    python: str | SkipJsonSchema[Callable[..., Any]] = Field(
        description="The function: `file.py:name` (relative to this file), `module:name` of what "
        "is installed, or a bundled one: `best by FIELD`, `vote by FIELD`. From Python, the "
        "function itself."
    )
    scope: Literal["row", "batch", "all"] = Field(
        default="row",
        description="What it is given: one row; a list of rows, for which it returns a list as "
        "long; or all rows at once, of which it returns those that go on.",
    )
    max: int | None = Field(
        default=None,
        ge=1,
        description="It returns a list per row, of at most so many; each becomes a row.",
    )
    expected: float | None = Field(
        default=None,
        ge=0,
        description="Rows expected per row (with scope all: share of rows that go on); the plan "
        "counts on them. Default: `max`, or 1.",
    )
    batch_size: int = Field(default=32, ge=1, description="Rows per call, with scope batch.")
    options: Mapping[str, JsonValue] = Field(
        default={}, description="Further arguments of the function, by name."
    )
    timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds a row may take (with scope all: the whole call)."
    )
    workers: int = Field(default=1, ge=1, description="Processes that call it side by side.")
    seconds: float = Field(
        default=0.001, ge=0, description="Seconds a row is expected to take, until it is measured."
    )
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens its value is expected to have in later prompts. Default: those of the "
        "outputs it is given, shared among the rows it returns.",
    )

    @model_validator(mode="after")
    def _expected_within(self) -> PythonSection:
        """Refuse figures that cannot be together."""
        if self.expected is not None and self.expected > (self.max or 1):
            limit = f"max {self.max}" if self.max else "1 row per row; set `max` for lists"
            raise ValueError(f"expected {self.expected:g} is more than {limit}")
        if self.max is not None and self.scope == "all":
            raise ValueError("max: with scope all every row goes on once at most; leave it out")
        return self

    @property
    def rate(self) -> float:
        """Return the share of the rows there may be that are expected."""
        return 1.0 if self.expected is None else self.expected / (self.max or 1)


def _kind_of_node(value: object) -> str:
    """Return which section a node's fields are meant for."""
    if isinstance(value, NodeBase):
        return type(value).__name__
    return "PythonSection" if isinstance(value, Mapping) and "python" in value else "NodeSection"


AnyNode = Annotated[
    Annotated[NodeSection, Tag("NodeSection")] | Annotated[PythonSection, Tag("PythonSection")],
    Discriminator(_kind_of_node),
]
"""A node: of a model, or a Python function."""


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
    host_memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="Memory of each machine, within which engines are prepared ahead; as much as "
        "its GPUs have together if not given.",
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
        description="Serve nodes of one model that follow one another with the same engines.",
    )
    prepared_starts: bool = Field(
        default=False,
        description="Do what an engine start needs no device for while others still compute.",
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
