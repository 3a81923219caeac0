"""Engine arguments, sampling parameters and architectures against those of the installed vLLM.

Read of vLLM's source files: importing it takes seconds, and a check before anything starts should
take none.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from samullm_plugin import InputError, ModelSpec
from samullm_plugin.checkpoints.hf_config import (
    derived_max_model_len,
    has_defaults,
    load_json,
    read_config_file,
)
from samullm_plugin.checkpoints.weight_files import problem_of_weights
from samullm_plugin.errors import suggest

_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json",
    "tokenizer.model.v3", "spiece.model",
)  # fmt: skip
_WITH_FILES = (None, "auto", "hf", "safetensors", "fastsafetensors", "mistral")
"""Values of ``load_format`` by which vLLM reads files of weights in the folder."""

_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_PLAIN: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "None": (type(None),),
}  # fmt: skip


@cache
def _folder() -> Path | None:
    """Return where vLLM is installed."""
    spec = find_spec("vllm")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(place) for place in places), None)


@cache
def source_tree(name: str) -> ast.Module | None:
    """Return one of vLLM's files, parsed; None if it is not there."""
    folder = _folder()
    try:
        return None if folder is None else ast.parse((folder / name).read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


@cache
def class_fields(file: str, name: str) -> Mapping[str, ast.expr]:
    """Return the fields of one of vLLM's classes and their types; empty if it is not found."""
    tree = source_tree(file)
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                n.target.id: n.annotation
                for n in node.body
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            }
    return {}


@cache
def _choices() -> Mapping[str, tuple[object, ...]]:
    """Return the named lists of allowed values."""
    folder = _folder()
    found: dict[str, tuple[object, ...]] = {}
    for file in [] if folder is None else sorted((folder / "config").glob("*.py")):
        tree = source_tree(str(file.relative_to(folder)))  # type: ignore[arg-type]  # it is not None
        for node in [] if tree is None else tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(node, ast.Assign) and isinstance(target, ast.Name):
                values = _literal(node.value)
                found |= {} if values is None else {target.id: values}
    return found


def _literal(node: ast.expr) -> tuple[object, ...] | None:
    """Return the values of ``Literal[...]``, None for anything else."""
    if not (isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal"):
        return None
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if not all(isinstance(p, ast.Constant) for p in parts):
        return None
    return tuple(p.value for p in parts if isinstance(p, ast.Constant))


def _fits(value: object, kind: ast.expr) -> bool | None:
    """Return whether a value is of a type; None if this cannot tell."""
    if isinstance(kind, ast.BinOp):
        found = [_fits(value, kind.left), _fits(value, kind.right)]
        return True if True in found else None if None in found else False
    if isinstance(kind, ast.Constant):
        return value is None if kind.value is None else None
    if (values := _literal(kind)) is not None:
        return value in values
    if isinstance(kind, ast.Subscript):
        outer = getattr(kind.value, "id", "")
        known = {"list": list | tuple, "dict": Mapping, "tuple": list | tuple, "set": list}
        return isinstance(value, known[outer]) if outer in known else None
    name = getattr(kind, "id", "")
    if name in _choices():
        return value in _choices()[name]
    if name not in _PLAIN:
        return None
    return isinstance(value, _PLAIN[name]) and (name == "bool" or not isinstance(value, bool))


def _said(kind: ast.expr) -> str:
    """Return a type for people, named lists written out."""
    name = getattr(kind, "id", "")
    if name in _choices():
        return ", ".join(str(v) for v in _choices()[name])
    return ast.unparse(kind)


def _check(given: Mapping[str, object], known: Mapping[str, ast.expr], where: str) -> None:
    """Refuse names that vLLM does not have, and values of other types.

    Raises:
        InputError: naming the field, what it is and what it must be.
    """
    for name, value in given.items() if known else ():
        if name not in known:
            raise InputError(
                f"{where}.{name}: the installed vLLM has no such field{suggest(name, known)}"
            )
        if _fits(value, known[name]) is False:
            raise InputError(f"{where}.{name}: {value!r} is not one of: {_said(known[name])}")


def check_model(model: ModelSpec) -> None:
    """Refuse a model that vLLM would refuse to start, as far as its files tell.

    Raises:
        InputError: naming the model, the argument or the file.
    """
    where = f"model {model.name}: engine_args"
    given = {n: list(v) if isinstance(v, tuple) else v for n, v in model.engine.extra}
    given["dtype"] = model.engine.dtype
    _check(given, class_fields("engine/arg_utils.py", "EngineArgs"), where)
    engine = model.engine
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise InputError(
            f"{where}.max_num_batched_tokens: {engine.max_num_batched_tokens} is below "
            f"max_num_seqs {engine.max_num_seqs}: each sequence needs a token of the batch"
        )
    folder = Path(model.path or model.name)
    if not (folder / "config.json").is_file():
        return
    config = load_json(folder / "config.json", "a model's config.json")
    names = [str(n) for n in config.get("architectures") or ()]
    served = architectures()
    if (
        names
        and served
        and not served.keys() & names
        and not config.get("auto_map")
        and (not has_defaults(str(config.get("model_type"))))
    ):
        raise InputError(
            f"model {model.name}: {folder / 'config.json'} names the architecture {names[0]}, "
            "which the installed vLLM does not serve; upgrade vLLM, or take another model"
        )
    _check_length(model, folder, given)


def looks_local(reference: str) -> bool:
    """Return whether a reference can only be a path here, and is no name of the hub's."""
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1


def check_weights(model: ModelSpec) -> None:
    """Refuse a folder whose files of weights are not all there, before anything starts.

    Raises:
        InputError: naming the file and the remedy.
    """
    folder = Path(model.path or model.name)
    if not folder.is_dir() or model.engine.given("load_format") not in _WITH_FILES:
        return
    if problem := problem_of_weights(folder):
        raise InputError(
            f"model {model.name}: {folder}: {problem}; download it again, or set "
            "engine_args.load_format: dummy to run with random weights"
        )


def _check_length(model: ModelSpec, folder: Path, given: Mapping[str, object]) -> None:
    """Refuse sequences longer than the model's configuration allows.

    Raises:
        InputError: naming the field and the limit.
    """
    if "hf_overrides" in given or os.environ.get(_LONGER, "").lower() in ("1", "true"):
        return
    longest = derived_max_model_len(read_config_file(folder))
    if model.max_model_len > longest:
        raise InputError(
            f"model {model.name}: max_model_len: {model.max_model_len} is more than {longest}, "
            f"what {folder / 'config.json'} allows; lower it, or set {_LONGER}=1 if the model can "
            "do it"
        )


def _check_template(folder: Path) -> None:
    """Refuse a chat template that is no template.

    Raises:
        InputError: naming the file and the line.
    """
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return
    parser = Environment(extensions=["jinja2.ext.loopcontrols"])  # nothing is rendered
    try:
        parser.parse(file.read_text("utf-8"))
    except (TemplateSyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        if "generation" not in str(error):  # a tag of transformers' own
            where = file if line is None else f"{file}:{line}"
            raise InputError(f"{where}: no chat template: {error}") from error


def check_tokenizer(model: ModelSpec, *, chat: bool) -> None:
    """Refuse a model whose texts no tokenizer can read, or whose conversations no template can.

    Args:
        model: the model.
        chat: whether it is asked conversations.

    Raises:
        InputError: naming the folder and the remedy.
    """
    given = model.engine.given
    place = str(given("tokenizer") or model.path or model.name)
    folder = Path(place)
    if given("skip_tokenizer_init") is True:
        return
    if not folder.is_dir():
        if given("tokenizer") and looks_local(place):
            raise InputError(
                f"model {model.name}: engine_args.tokenizer: there is no folder {place}; correct it"
            )
        return
    if not any((folder / n).is_file() for n in _TOKENIZERS) and not any(folder.glob("*.tiktoken")):
        raise InputError(
            f"model {model.name}: there is no tokenizer in {folder}; give the folder that holds it "
            "as engine_args.tokenizer, or prompt_token_ids instead of texts"
        )
    if (folder / "tokenizer.json").is_file() and given("tokenizer_mode") != "mistral":
        load_json(folder / "tokenizer.json", "a tokenizer")  # half of a download, a pointer
    if not chat or given("tokenizer_mode") == "mistral" or given("chat_template"):
        return
    config = folder / "tokenizer_config.json"
    has = any((folder / n).is_file() for n in ("chat_template.jinja", "chat_template.json",
                                                "tekken.json"))  # fmt: skip
    if not has and config.is_file():
        has = bool(load_json(config, "a tokenizer's configuration").get("chat_template"))
    if not has:
        raise InputError(
            f"model {model.name}: {folder} holds no chat template, so it cannot be asked messages; "
            "give texts as prompt, or put a chat_template.jinja into the folder"
        )
    _check_template(folder)


@cache
def architectures() -> Mapping[str, tuple[str, str]]:
    """Return the architectures that the installed vLLM serves, with module and class of each.

    Empty if that cannot be read.
    """
    tree = source_tree("model_executor/models/registry.py")
    found: dict[str, tuple[str, str]] = {}
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Dict):
            found |= {
                key.value: (names[0], names[1])
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
                and isinstance(value, ast.Tuple) and len(names := _strings(value)) == 2
            }  # fmt: skip
    return found


def _strings(node: ast.Tuple) -> list[str]:
    """Return the texts of a tuple."""
    return [str(e.value) for e in node.elts if isinstance(e, ast.Constant)]


def check_sampling(given: Mapping[str, object], where: str) -> None:
    """Refuse sampling parameters that the installed vLLM does not have.

    Raises:
        InputError: naming the parameter.
    """
    _check(given, class_fields("sampling_params.py", "SamplingParams"), where)
    least, most = given.get("min_tokens"), given.get("max_tokens")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        raise InputError(f"{where}.min_tokens: {least} is above max_tokens {most}")
