"""Templates of prompts and messages, and outputs as they see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from samullm_plugin.errors import InputError, suggest


class Output(str):
    """An output: its text, and what else is known of it.

    Attributes:
        value: what the text was parsed to, or what a function returned; None: it is only a text.
        fields: by name, what templates and expressions find under it: those of ``value``, if that
            is a mapping, before ``text``, ``value``, and what is known of the request.
    """

    __slots__ = ("fields", "value")

    value: Any
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, text: str | None, value: Any = None, **known: Any) -> Output:
        """Return an output.

        Args:
            text: None: that of the value.
            value: JSON.
            known: further fields; those that are None are left out.
        """
        new = cls(text_of(value) if text is None else text)
        new.value = value
        own = value if isinstance(value, Mapping) else {}
        rest = {k: v for k, v in known.items() if v is not None}
        new.fields = {**rest, "text": str(new), "value": value, **own}
        return new


class UnknownOutput(Output):
    """Stands for an output of which nothing is known: every field of it is one as well."""

    __slots__ = ()


def unknown_output() -> Output:
    """Return an output that templates can be tried with, whatever they take from it."""
    return UnknownOutput.of("")


def text_of(value: Any) -> str:
    """Return a value as a text: itself, or JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Finds the fields of outputs before the methods of texts."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return ``obj.attribute``."""
        if isinstance(obj, Output) and attribute in obj.fields:
            return obj.fields[attribute]
        return self._of_output(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return ``obj[argument]``."""
        if isinstance(obj, Output) and isinstance(argument, str) and argument in obj.fields:
            return obj.fields[argument]
        return self._of_output(obj, argument, super().getitem(obj, argument))

    @staticmethod
    def _of_output(obj: Any, name: Any, found: Any) -> Any:
        """Return what was found in an object; for an output that lacks it, what to say."""
        if not isinstance(found, jinja2.Undefined):
            return found
        if isinstance(obj, UnknownOutput):
            return unknown_output()
        if isinstance(obj, Output) and isinstance(name, str):
            hint = suggest(name, obj.fields) or f"; it has {', '.join(obj.fields) or 'none'}"
            return jinja2.StrictUndefined(f"an output has no field {name!r}{hint}")
        return found


_ENVIRONMENT = _Environment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)
_GLOBALS = dict(_ENVIRONMENT.globals)


def render(template: str, values: Mapping[str, Any], where: str) -> str:
    """Return a template with its variables in place.

    Args:
        template: Jinja2.
        values: of its variables.
        where: node and request, for messages.

    Raises:
        InputError: naming the template's node and what is wrong.
    """
    if (parts := plain_parts(template)) is not None:
        try:
            return "".join([values[part] if is_name else part for part, is_name in parts])
        except (KeyError, TypeError):  # one is missing, or no text: that is for Jinja
            pass
    made = _compiled(template)
    try:
        # as its method ``render``, which joins the globals anew each time: most of its time
        context = made.new_context({**_GLOBALS, **values}, shared=True)
        return "".join(made.root_render_func(context))
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: prompt template: {error}") from error


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


@lru_cache(maxsize=256)
def plain_parts(template: str) -> tuple[tuple[str, bool], ...] | None:
    """Return a template's texts and names, and which are names; None if there is more in it.

    Most templates are no more than that, and joining them takes a tenth of Jinja's time.
    """
    from jinja2 import nodes

    found: list[tuple[str, bool]] = []
    for output in _ENVIRONMENT.parse(template).body:
        if not isinstance(output, nodes.Output):
            return None
        for part in output.nodes:
            if isinstance(part, nodes.TemplateData):
                found.append((part.data, False))
            elif isinstance(part, nodes.Name) and part.name != "self":
                found.append((part.name, True))
            else:
                return None
    return tuple(found)


@lru_cache(maxsize=1024)
def referenced(template: str) -> frozenset[str]:
    """Return the variables a template uses, and ``inputs.x`` for each list of inputs it uses.

    Raises:
        InputError: if it is not Jinja2.
    """
    from jinja2 import meta, nodes

    try:
        tree = _ENVIRONMENT.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"line {error.lineno} of the template: {error}") from error
    lists = {
        f"inputs.{part.attr}"
        for part in tree.find_all(nodes.Getattr)
        if isinstance(part.node, nodes.Name) and part.node.name == "inputs"
    }
    return frozenset(meta.find_undeclared_variables(tree) | lists)
