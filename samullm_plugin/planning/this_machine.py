"""What this machine offers to an application that names neither devices nor an executor."""

from __future__ import annotations

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import PlannerSection
from samullm_plugin.checkpoints.hub import can_download, has_weights, is_hub_id
from samullm_plugin.checkpoints.models import checkpoint_of
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster
from samullm_plugin.model.problem import Problem


def local_devices(host: PluginHost) -> tuple[str, Cluster] | None:
    """Return the first executor that has real engines here, and its devices; None without any."""
    for name in sorted(host.names("executor"), key=lambda n: n != "vllm"):
        cluster = host.resolve("executor", name).value.local_cluster()
        if cluster is not None:
            return name, cluster
    return None


def usual_executor(host: PluginHost, loaded: LoadedApplication) -> str:
    """Return how an application runs that does not say: on real engines, if it can here."""
    if loaded.executor_given or loaded.sources is None:
        return loaded.executor.type
    if not all(_loadable(n.model) for n in loaded.app.nodes):
        return loaded.executor.type
    found = local_devices(host)
    return loaded.executor.type if found is None else found[0]


def check_here(host: PluginHost, loaded: LoadedApplication) -> None:
    """Refuse what could not run, where this machine has the models' files to tell by.

    Raises:
        InputError: naming the model, the field and the remedy.
    """
    if loaded.sources is not None and all(_loadable(n.model) for n in loaded.app.nodes):
        name = usual_executor(host, loaded)
        options = loaded.executor.options if name == loaded.executor.type else {}
        check_runnable(host.create("executor", name, options), loaded)


def _loadable(model: ModelSpec) -> bool:
    """Return whether an engine can load a model: from this machine, or from the hub.

    What was read of a hub id is in the hub's cache; an engine downloads its weights.
    """
    folder = checkpoint_of(model)
    if folder is None or not folder.is_dir():
        return False
    if model.engine.given("load_format") == "dummy" or has_weights(folder):
        return True
    return is_hub_id(model.path or model.name) and can_download()


def check_stages(executor: Executor, problem: Problem, planner: PlannerSection) -> None:
    """Refuse pipeline stages that a plan may use and engines do not have, before planning.

    Raises:
        InputError: naming the node, the field and the remedy.
    """
    for i, node in enumerate(problem.app.nodes):
        stages = [k.pipeline_parallel_size for k in problem.costs[i] if problem.fits(i, k)]
        if max(stages) == 1:
            continue
        try:
            executor.check_pipeline(node.model)
        except InputError as error:
            if planner.pipeline_parallel_sizes is not None and min(stages) == 1:
                remedy = "planner.pipeline_parallel_sizes must be [1] or left out"
            else:
                remedy = (
                    "without stages it fits on no GPU or NVLink group; give the cluster larger "
                    "ones (nvlink), lower max_model_len, or take another executor"
                )
            raise InputError(f"node {node.name}: {error}; {remedy}") from error


def check_runnable(executor: Executor, loaded: LoadedApplication) -> None:
    """Refuse what an executor cannot run here, before anything is started.

    Raises:
        InputError: naming the model, the field and the remedy.
    """
    nodes = loaded.app.nodes
    executor.check([n.model for n in nodes])
    for node, source in zip(nodes, loaded.sources or (), strict=False):
        first = source.fields[0] if source.fields else {}
        given = bool(source.prompt_token_ids) and len(source.prompt_token_ids) == len(source.ids)
        own_template = any("chat_template" in c for c in source.request_chat.values())
        chat = (source.chat or "messages" in first) and not own_template
        try:
            executor.check_node(node.model, source.sampling, texts=not given, chat=chat)
        except InputError as error:
            raise InputError(f"node {node.name}: {error}") from error
