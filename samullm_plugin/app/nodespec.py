"""Fields of ``app.yaml`` about what a node does: ask a model, or call a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.fields import Count, Natural, Section
from samullm_plugin.app.rowspec import ChainSection, Label, Name, NodeBase, Pattern, Probability
from samullm_plugin.app.sampling import SamplingSection


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
    image: Label | None = Field(
        default=None,
        description="Field of the row that holds an image, or a list of them, for the user's turn "
        "that follows: files relative to this one, or data URLs.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> MessageSection:
        """Refuse a turn that is none or several."""
        if len(self.model_fields_set) != 1:
            raise ValueError("give one of system, user, assistant, include, history and image")
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
    copies: Count = Field(
        default=1,
        description="How often each request is made; templates see which as `copy`, from 1.",
    )
    n: Count = Field(
        default=1,
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
        description="Variables passed to the chat template, such as `enable_thinking: false`; a "
        "line's own come first.",
    )
    template_tokens: Natural | None = Field(
        default=None, description="Tokens that templates add; else they are counted."
    )
    prefix_tokens: Natural = Field(
        default=0, description="Tokens at the start that all prompts of the node share."
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
    retries: Natural = Field(
        default=0,
        description="How often a request is asked again whose output does not follow the schema "
        "or is rejected by `check`, each time with another seed.",
    )
    retry_temperature: float = Field(
        default=0.2, ge=0, description="What each retry adds to the temperature."
    )
    reject_rate: Probability = Field(
        default=0.0,
        description="Share of outputs expected to be rejected by the schema or `check`, each time "
        "they are asked for; what is rejected more than `retries` times fails, and the plan "
        "expects as much less of what waits for it.",
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
    def accept_rate(self) -> float:
        """Return the share of requests expected to have an accepted output in the end."""
        if self.output_schema is None and self.check is None:
            return 1.0
        return float(1.0 - self.reject_rate ** (self.retries + 1))

    @property
    def pools(self) -> bool:
        """Whether the model gives numbers instead of text."""
        return self.task in POOLING_TASKS

    @property
    def asks_logprobs(self) -> bool:
        """Whether log probabilities of all outputs are asked for, here or by an expression."""
        written = [self.keep.expr] if self.keep else []
        written += [b.expr for b in self.route.values()]
        wanted = any(text is not None and "logprob" in parsed(text).names for text in written)
        return not self.pools and (wanted or self.sampling_params.logprobs is not None)

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
        if "reject_rate" in self.model_fields_set and not (self.output_schema or self.check):
            raise ValueError("reject_rate: nothing is rejected without output_schema or check")
        if self.pair is not None and self.task != "score":
            raise ValueError("pair: only nodes of `task: score` compare two texts")
        if self.task == "score" and self.pair is None:
            raise ValueError("pair: missing; `task: score` compares two texts, prompt and pair")
        if self.pools and self.lora is not None:
            raise ValueError("lora: adapters of pooling models are not served; merge it into them")
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
    max: Count | None = Field(
        default=None,
        description="It returns a list per row, of at most so many; each becomes a row.",
    )
    expected: float | None = Field(
        default=None,
        ge=0,
        description="Rows expected per row (with scope all: share of rows that go on); the plan "
        "counts on them. Default: `max`, or 1.",
    )
    batch_size: Count = Field(default=32, description="Rows per call, with scope batch.")
    options: Mapping[str, JsonValue] = Field(
        default={}, description="Further arguments of the function, by name."
    )
    timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds a row may take (with scope all: the whole call)."
    )
    workers: Count = Field(default=1, description="Processes that call it side by side.")
    seconds: float = Field(
        default=0.001, ge=0, description="Seconds a row is expected to take, until it is measured."
    )
    tokens: Count | None = Field(
        default=None,
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
