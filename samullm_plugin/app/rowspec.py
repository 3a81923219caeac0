"""Fields of ``app.yaml`` about the rows of a node: where they come from and where they go on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from samullm_plugin.app.expressions import parsed
from samullm_plugin.app.fields import Count, Section


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
    config: str | None = Field(
        default=None, description="Configuration (subset) of a dataset of the hub."
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
    limit: Count | None = Field(default=None, description="Take only so many rows, the first ones.")

    @property
    def name(self) -> str:
        """Return what to call the table in messages."""
        return self.file or self.dataset or ""

    @model_validator(mode="after")
    def _one_source(self) -> RequestsSection:
        """Refuse a table of no or two sources."""
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give file or dataset, one of them")
        for name in ("config", "split"):
            if getattr(self, name) is not None and self.dataset is None:
                raise ValueError(f"{name} belongs to dataset; there is none")
        if self.format is not None and self.file is None:
            raise ValueError("format belongs to file; there is none")
        names = list(self.rename.values())
        if twice := [n for n in names if names.count(n) > 1]:
            raise ValueError(f"rename: two columns would be named {twice[0]!r}")
        return self


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
