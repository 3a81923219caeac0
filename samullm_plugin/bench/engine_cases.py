"""What a bench on engines runs: applications as an executor can load them, and hidden lengths.

Executors that load models get folders without weights: engines that fill them with random numbers
run at full cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.spec import Component
from samullm_plugin.bench.engine_profiles import Measurement, ProfileStore
from samullm_plugin.checkpoints.models import short_name, sizes_of
from samullm_plugin.errors import InputError
from samullm_plugin.host.interfaces.executor import Executor
from samullm_plugin.host.manager import PluginHost
from samullm_plugin.model.application import Application, ModelSpec
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.problem import Problem
from samullm_plugin.planning.applications import find_application
from samullm_plugin.planning.building import sample_scenarios
from samullm_plugin.planning.instances import Instance, cluster_of, make_instance
from samullm_plugin.run.identity import identity_of
from samullm_plugin.run.setup import imitates


@dataclass(frozen=True, slots=True)
class EngineBenchSettings:
    """How plans are made and carried out.

    Attributes:
        executor: name of the executor.
        executor_options: its options.
        rounds: hidden length draws per application; each scheduler's plan runs once in each.
        scenarios: length scenarios that schedulers see.
        seed: of everything.
        gpus: overrides the applications' own number of devices.
        estimator: name of the length estimator; None: the application's own.
        latency_model: name of the latency model; None: the application's own, or ``linear`` with
            the measured or given profile.
        profile: latency profile of the devices; None: measured where engines compute.
        replan: plans may be replaced while they run.
        time_limit_s: seconds that schedulers with such an option may search.
    """

    executor: str
    executor_options: Mapping[str, object] = field(default_factory=dict)
    rounds: int = 3
    scenarios: int = 4
    seed: int = 0
    gpus: int | None = None
    estimator: str | None = None
    latency_model: str | None = None
    profile: Path | None = None
    replan: bool = False
    time_limit_s: float = 6.0


@dataclass(frozen=True, slots=True, eq=False)
class EngineCase:
    """One application on one cluster.

    Attributes:
        application: as it was asked for.
        loaded: the application, its models as the executor loads them.
        instance: what schedulers see.
        truths: per round, the lengths that are imposed; None: engines decide.
        key: hash of all that its plans and runs depend on.
    """

    application: str
    loaded: LoadedApplication
    instance: Instance
    truths: tuple[Problem | None, ...]
    key: str


class CaseBuilder:
    """Builds cases, measuring what is not known of their models.

    Attributes:
        host: the plugins.
        settings: how to plan and run.
        work_dir: models and profiles are kept there.
        tell: called with lines of progress, for people.
        measurements: how the latency profiles in use were measured, by model.
    """

    def __init__(
        self,
        host: PluginHost,
        settings: EngineBenchSettings,
        work_dir: Path,
        machine: str,
        tell: Callable[[str], None],
    ) -> None:
        """Prepare; the arguments but one are the attributes.

        Args:
            host: see above.
            settings: see above.
            work_dir: it must exist.
            machine: what profiles hold for: processor and versions.
            tell: see above.
        """
        self.measurements: dict[str, Measurement] = {}
        self.host, self.settings, self.work_dir, self.tell = host, settings, work_dir, tell
        self._store = ProfileStore(work_dir / "profiles", settings.executor, machine)

    def build(self, text: str) -> EngineCase:
        """Build a case; latency profiles that are missing are measured.

        Raises:
            InputError: for unknown names, wrong options or unknown sizes.
            RunError: if an engine fails while it is profiled.
        """
        settings = self.settings
        loaded = find_application(self.host, text)
        cluster = cluster_of(loaded, settings.gpus)
        executor = self._new_executor()
        computes = not imitates(executor)
        if computes and loaded.sources is None:
            loaded = replace(loaded, app=_with_random_models(loaded.app, self.work_dir / "models"))
        models = [n.model for n in loaded.app.nodes]
        executor.check(models)
        planner = loaded.planner
        profile = settings.profile
        if computes and profile is None and settings.latency_model in (None, "linear"):
            profile, facts = self._store.profile(self._new_executor, models, cluster, self.tell)
            self.measurements |= {m.model: m for m in facts}
        changes: dict[str, Any] = {"scenarios": settings.scenarios, "seed": settings.seed}
        if profile is not None:
            options = {"profile": str(profile)}
            changes["latency_model"] = Component(type="linear", options=options)
        elif settings.latency_model is not None:
            changes["latency_model"] = Component(type=settings.latency_model)
        if settings.estimator is not None:
            changes["length_estimator"] = Component(type=settings.estimator)
        planner = planner.model_copy(update=changes)
        instance = make_instance(self.host, loaded, planner, gpus=settings.gpus)
        key = digest(
            text,
            identity_of(loaded),
            asdict(replace(settings, rounds=0, profile=None)),
            planner.model_dump(exclude={"latency_model"}),
            instance.problem.app.fused,
            None if profile is None else profile.read_text(encoding="utf-8"),
        )
        imposed = not computes or loaded.sources is None
        return EngineCase(text, loaded, instance, self._truths(loaded, instance, imposed), key)

    def _new_executor(self) -> Executor:
        made: Executor = self.host.create(
            "executor", self.settings.executor, dict(self.settings.executor_options)
        )
        return made

    def _truths(
        self, loaded: LoadedApplication, instance: Instance, imposed: bool
    ) -> tuple[Problem | None, ...]:
        """Return the hidden draws; one more round does not change the others."""
        problem, rounds = instance.problem, self.settings.rounds
        if not imposed:
            return (None,) * rounds
        if loaded.output_tokens is not None:
            return (problem.with_scenarios(problem.scenarios[:1]),) * rounds
        rng = np.random.default_rng([self.settings.seed, 37])
        draws = sample_scenarios(problem.app, instance.estimator, rng, rounds)
        return tuple(problem.with_scenarios((d,)) for d in draws)


def _with_random_models(app: Application, folder: Path) -> Application:
    nodes = tuple(replace(n, model=random_model(n.model, folder)) for n in app.nodes)
    return replace(app, nodes=nodes)


def digest(*parts: object) -> str:
    """Return a hash of what can be written as JSON, or at least as text."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def random_model(model: ModelSpec, folder: Path) -> ModelSpec:
    """Write a ``config.json`` of a model's sizes; return the model to be loaded from there.

    The stand-in is of the most common kind of these sizes (Llama, Mixtral with experts, OPT without
    gated MLPs); engines fill its weights with random numbers (vLLM's ``load_format: dummy``).

    Args:
        model: the model; its own weights are not looked for.
        folder: a folder named after the model is made in it.

    Raises:
        InputError: if its sizes are not known, or no such kind has them.
    """
    architecture = sizes_of(model)
    path = folder / short_name(model.name)
    path.mkdir(parents=True, exist_ok=True)
    config = _config(model, architecture)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    engine = model.engine
    extra = tuple((k, v) for k, v in engine.extra if k != "load_format")
    engine = replace(engine, extra=(*extra, ("load_format", "dummy")))
    return replace(model, architecture=architecture, path=str(path), engine=engine)


def _config(model: ModelSpec, sizes: ModelArchitecture) -> Mapping[str, Any]:
    """Return what Hugging Face's library reads."""
    common = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": sizes.hidden_size,
        "max_position_embeddings": model.max_model_len,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16" if model.engine.dtype == "auto" else model.engine.dtype,
        "vocab_size": sizes.vocab_size,
    }
    if sizes.mlp == "plain":
        if sizes.num_experts or sizes.num_kv_heads != sizes.num_heads:
            raise InputError(
                f"model {model.name}: there is no stand-in with plain MLPs and "
                f"{'experts' if sizes.num_experts else 'fewer key-value than query heads'}"
            )
        return common | {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "do_layer_norm_before": True,
            "ffn_dim": sizes.intermediate_size,
            "word_embed_proj_dim": sizes.hidden_size,
        }
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if sizes.num_experts:
        kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        common |= {
            "num_experts_per_tok": sizes.num_active_experts,
            "num_local_experts": sizes.num_experts,
        }
    return common | kind | {
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.intermediate_size,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
