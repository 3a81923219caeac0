"""The nodes of a file: what their names mean, who decides for whom, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from samullm_plugin.app.adapters import Adapter, adapted_model, adapter_folder, read_adapter
from samullm_plugin.app.drafts import NodeDraft
from samullm_plugin.app.nodespec import NodeSection, PythonSection
from samullm_plugin.app.pooling import check_generates, pooling_model
from samullm_plugin.app.spec import AppSpec
from samullm_plugin.errors import InputError, suggest
from samullm_plugin.model.application import ModelSpec


class NodeGraph:
    """The nodes of one file.

    Args:
        spec: the checked file.
        path: where it is.
        models: by name.

    Attributes:
        nodes: those with models first, one per model; then Python nodes.
        members: nodes by their name in the file.
        routers: by branch, its router and the position of the branch in it.
        before: per node, all nodes it comes after; known after :meth:`order`.

    Raises:
        InputError: naming file and field.
    """

    def __init__(self, spec: AppSpec, path: Path, models: Mapping[str, ModelSpec]) -> None:
        """Expand nodes with several models."""
        self.path = path
        models = _adapted(spec, path, models)
        self.nodes: list[NodeDraft] = []
        self.members: dict[str, list[int]] = {}
        for name, section in spec.nodes.items():
            if isinstance(section, PythonSection):
                continue
            for model in section.models:
                if model not in models:
                    hint = suggest(model, models) or f"; models: {', '.join(models) or 'none'}"
                    raise InputError(f"{path}: nodes.{name}.model: no model {model!r}{hint}")
                full = name if isinstance(section.model, str) else f"{name}.{model}"
                self.members.setdefault(name, []).append(len(self.nodes))
                served, given = models[model], spec.models[model].engine_args
                where = f"{path}: nodes.{name}"
                if section.pools:
                    served = pooling_model(served, section.task, given, f"{where}.task")
                else:
                    check_generates(served, given, where)
                self.nodes.append(NodeDraft(full, name, section, served))
        for name, section in spec.nodes.items():
            if isinstance(section, PythonSection):
                self.members[name] = [len(self.nodes)]
                self.nodes.append(NodeDraft(name, name, section, None))
        names = [n.name for n in self.nodes]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise InputError(f"{path}: nodes: two nodes are named {twice!r}; rename one")
        self.routers = self._find_routers()
        self.before: list[set[int]] = [set() for _ in self.nodes]

    def where(self, node: NodeDraft) -> str:
        """Return file and field of a node, for messages."""
        return f"{self.path}: nodes.{node.section_name}"

    def resolve(self, names: Sequence[str], where: str) -> list[int]:
        """Return the nodes that names in the file mean."""
        found = []
        full = {n.name: i for i, n in enumerate(self.nodes)}
        for name in names:
            if name in self.members:
                found += self.members[name]
            elif name in full:
                found.append(full[name])
            else:
                hint = suggest(name, self.members) or f"; nodes: {', '.join(self.members)}"
                raise InputError(f"{where}: there is no node {name!r}{hint}")
        return found

    def _find_routers(self) -> dict[int, tuple[int, int]]:
        """Return, by branch, its router and the position of the branch in it."""
        routers: dict[int, tuple[int, int]] = {}
        for index, node in enumerate(self.nodes):
            where = f"{self.where(node)}.route"
            if node.section.route and len(self.members[node.section_name]) > 1:
                raise InputError(f"{where}: a router has one model")
            for position, name in enumerate(node.section.route):
                branches = self.resolve([name], where)
                if len(branches) != 1:
                    raise InputError(f"{where}: {name!r} has several models; name one of them")
                if branches[0] in routers:
                    raise InputError(f"{where}: {name!r} is a branch of another router already")
                routers[branches[0]] = (index, position)
        return routers

    def order(self, named: Callable[[NodeDraft], Iterable[str]]) -> list[int]:
        """Return the nodes, upstream ones first, and note what each comes after.

        Args:
            named: nodes that the lines of a node name themselves.

        Raises:
            InputError: naming a cycle, or a node whose requests come from nowhere.
        """
        graph = {i: self._upstreams(i, named) for i in range(len(self.nodes))}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            cycle = " -> ".join(self.nodes[i].name for i in error.args[1])
            raise InputError(
                f"{self.path}: nodes: they form a cycle: {cycle}; requests of one node that wait "
                "for earlier ones of the same node are written with `chain`"
            ) from error
        for index in order:
            self.before[index] = graph[index].union(*(self.before[u] for u in graph[index]))
        for index, node in enumerate(self.nodes):
            if not node.section.requests and not graph[index]:
                raise InputError(
                    f"{self.where(node)}: it has no requests: give requests (a JSONL file), "
                    "for_each (a node), or inputs"
                )
        return order

    def _upstreams(self, index: int, named: Callable[[NodeDraft], Iterable[str]]) -> set[int]:
        """Return the nodes that must be filled before a node."""
        node, where = self.nodes[index], self.where(self.nodes[index])
        found: set[int] = set()
        if node.section.for_each:
            found.update(self.resolve([node.section.for_each], f"{where}.for_each"))
        for name, edge in node.section.edges.items():
            found.update(self.resolve(edge.sources, f"{where}.inputs.{name}.from"))
        if index in self.routers:
            found.add(self.routers[index][0])
        by_name = {n.name: i for i, n in enumerate(self.nodes)}
        found.update(by_name[n] for n in named(node) if n in by_name)
        return found


def _adapted(spec: AppSpec, path: Path, models: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """Return the models, those that nodes use with adapters holding all of theirs.

    Raises:
        InputError: naming the node whose adapter its model cannot have.
    """
    adapters: dict[str, list[Adapter]] = {}
    for name, section in spec.nodes.items():
        if isinstance(section, NodeSection) and section.lora is not None:
            folder, where = adapter_folder(section.lora, path), f"{path}: nodes.{name}.lora"
            for model in (m for m in section.models if m in models):
                adapters.setdefault(model, []).append(read_adapter(folder, models[model], where))
    found = dict(models)
    for name, mine in adapters.items():
        given, where = spec.models[name].engine_args, f"{path}: models.{name}"
        found[name] = adapted_model(models[name], mine, given, where)
    return found
