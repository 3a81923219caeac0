"""Which models the installed vLLM can divide into pipeline stages.

vLLM tells by its interface ``SupportsPP``, from which the classes of such models are derived. That
is read of its source files, as importing a model's class takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from samullm_plugin import InputError, ModelSpec
from samullm_plugin.checkpoints.hf_config import load_json
from samullm_vllm.arguments import architectures, source_tree

_MODELS = "vllm.model_executor.models"
_INTERFACE = "SupportsPP"


def check_stages(model: ModelSpec) -> None:
    """Refuse a model that vLLM would refuse to start in several pipeline stages.

    Raises:
        InputError: naming the model and its architecture.
    """
    file = Path(model.path or model.name) / "config.json"
    if not file.is_file():
        return
    named = load_json(file, "a model's config.json").get("architectures") or ()
    for name in map(str, named):
        if divides(name) is False:
            raise InputError(
                f"model {model.name}: the installed vLLM cannot divide {name} into pipeline stages"
            )


def divides(architecture: str) -> bool | None:
    """Return whether vLLM can divide an architecture into stages; None if this cannot tell."""
    place = architectures().get(architecture)
    if place is None:
        return None
    module, name = place
    return _derived(module if module.startswith("vllm.") else f"{_MODELS}.{module}", name, set())


def _derived(module: str, name: str, seen: set[tuple[str, str]]) -> bool | None:
    """Return whether a class is derived from the interface; None if a base is not found."""
    if name == _INTERFACE:
        return True
    if (module, name) in seen:
        return False
    seen.add((module, name))
    if not module.startswith("vllm."):
        return False  # PyTorch's or transformers' own
    path = module.removeprefix("vllm.").replace(".", "/")
    tree, package = source_tree(f"{path}.py"), module.rpartition(".")[0]
    if tree is None:
        tree, package = source_tree(f"{path}/__init__.py"), module
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = [_derived(*_place(tree, module, package, b), seen) for b in _bases(node)]
            return True if True in found else None if None in found else False
    origin, original = _place(tree, module, package, name)
    return None if origin == module else _derived(origin, original, seen)


def _bases(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names of a class's bases; of ``module.Class`` the class alone."""
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name):
            yield plain.id
        elif isinstance(plain, ast.Attribute) and plain.attr == _INTERFACE:
            yield _INTERFACE


def _place(tree: ast.Module, module: str, package: str, name: str) -> tuple[str, str]:
    """Return the module that a name of a module comes from, and its name there."""
    for node in ast.walk(tree):
        for given in node.names if isinstance(node, ast.ImportFrom) else ():
            if (given.asname or given.name) == name and isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level]
                start = ".".join(above) if node.level else ""
                return ".".join(p for p in (start, node.module) if p), given.name
    return module, name
