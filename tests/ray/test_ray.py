"""The executor ``ray`` on a real Ray cluster: two raylets of this machine, each with one core.

What fails on such a cluster is in ``chaos.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from samullm_plugin import (
    Cluster,
    EngineOptions,
    EngineRequest,
    EngineSpec,
    Gpu,
    InputError,
    ModelSpec,
)
from samullm_plugin.model.cluster import Network
from samullm_plugin.model.parallel import ParallelConfig
from samullm_plugin.model.plan import Assignment, Plan, Stage
from samullm_plugin.run.run import start_run
from samullm_plugin.run.setup import RunSetup
from samullm_plugin.testing.executor_contract import ExecutorContract
from tests.models import make_tiny_adapter, make_tiny_encoder, make_tiny_llama
from tests.ray.machines import Machines
from tests.run.real_app import make_files, plan, run_setup

pytest.importorskip("ray")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

from samullm_ray.executor import RayExecutor, RayOptions  # noqa: E402  # needs Ray

soak = pytest.mark.skipif(
    "SOAK_RAY" not in os.environ, reason="wrong input on a real cluster: make soak-ray"
)
GPU = Gpu("core", 1 << 30)
TWO_MACHINES = Cluster((GPU, GPU), (), ((0,), (1,)))


@pytest.fixture(scope="module")
def machines(undisturbed_texts: dict[str, str]) -> Iterator[Machines]:
    # Agents that are kept hold their cores: the local run that gave the texts came before.
    assert undisturbed_texts
    made = Machines()
    with RayExecutor.kept_warm():
        yield made
    import ray

    assert not ray.is_initialized()  # an executor joined the cluster, so the last one has left it
    made.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed_texts(app: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the application says on local engines."""
    directory = tmp_path_factory.mktemp("local") / "run"
    outcome = start_run(run_setup(app, directory), plan())
    assert not outcome.failed
    return texts(directory)


def texts(directory: Path) -> dict[str, str]:
    """Return the texts of a run by request; every request is there once."""
    found: dict[str, str] = {}
    for path in sorted((directory / "outputs").rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = f"{path.stem}:{record['custom_id']}"
            assert key not in found
            choice = record["response"]["body"]["choices"][0]
            found[key] = choice["message"]["content"] if "message" in choice else choice["text"]
    return found


def on_ray(app: Path, directory: Path, address: str, **changes: object) -> RunSetup:
    # A busy machine may be silent for some seconds.
    options = {"address": address, "heartbeat_s": 0.05, "lost_timeout_s": 10.0}
    ready = run_setup(app, directory, executor="ray", executor_options=options, **changes)
    problem = replace(ready.instance.problem, cluster=TWO_MACHINES)
    return replace(ready, instance=replace(ready.instance, problem=problem))


@soak
@pytest.mark.usefixtures("machines")
def test_no_cluster_at_the_address() -> None:
    with pytest.raises(InputError, match=r"no cluster at 127\.0\.0\.1:1.*ray start"):
        RayExecutor(RayOptions(address="127.0.0.1:1")).open(TWO_MACHINES, None)


@pytest.fixture(scope="module")
def contract(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    engine = EngineOptions(
        max_num_seqs=8, max_num_batched_tokens=512, block_size=32, dtype="float32"
    )
    TestRay.options = {"address": machines.address, "stop_timeout_s": 10.0}
    TestRay.model = ModelSpec("tiny", 512, path=str(folder), engine=engine)


@pytest.mark.usefixtures("contract")
class TestRay(ExecutorContract):
    executor_class = RayExecutor
    cluster = TWO_MACHINES
    limit_s = 180.0


@pytest.mark.usefixtures("contract")
def test_an_engine_on_both_machines_says_what_one_on_a_core_says(machines: Machines) -> None:
    cluster = replace(TWO_MACHINES, network=Network(1e9, 1e-4))
    greedy = {"ignore_eos": True, "temperature": 0.0}
    requests = [
        EngineRequest(i, tuple(range(3 + i, 9 + 2 * i)), 6 + i, 12, sampling=greedy)
        for i in range(6)
    ]
    executor = RayExecutor(RayOptions(address=machines.address, stop_timeout_s=10.0))
    told: list[dict[int, tuple[int, ...]]] = []
    try:
        executor.open(cluster, None)
        for devices in (0, 1), (1,):
            spec = EngineSpec("engine", 0, TestRay.model, devices, 1, len(devices), 8192)
            executor.start_engine(spec)
            executor.submit(spec.key, requests)
            told.append({})
            while len(told[-1]) < len(requests):
                events = executor.poll(1.0)
                assert not [e for e in events if e.kind in ("failed", "lost")]
                told[-1] |= {o.request: o.token_ids or () for e in events for o in e.outputs}
            assert executor.stop_engine(spec.key) == []
    finally:
        executor.close()
    assert told[0] == told[1]
    assert all(len(tokens) == 12 for tokens in told[0].values())


def test_texts_are_those_of_local_engines(
    machines: Machines, app: Path, undisturbed_texts: dict[str, str], tmp_path: Path
) -> None:
    outcome = start_run(on_ray(app, tmp_path / "run", machines.address), plan())
    assert not outcome.failed
    assert texts(tmp_path / "run") == undisturbed_texts
    assert outcome.metrics["executor"]["ray_polls"] > 0


def test_pooling_and_adapters(machines: Machines, tmp_path: Path) -> None:
    """Numbers and adapters come from agents as from local engines."""
    make_tiny_encoder(tmp_path / "embedder")
    make_tiny_llama(tmp_path / "base", characters=True, vocab_size=104)
    make_tiny_adapter(tmp_path / "adapter", seed=1)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "good day"}\n')
    engine = {"dtype": "float32", "block_size": 32, "max_num_seqs": 4}
    engine["max_num_batched_tokens"] = 512

    def model(name: str) -> dict[str, object]:
        return {"model": name, "path": name, "max_model_len": 256, "engine_args": engine}

    limit = {"sampling_params": {"max_tokens": 6, "temperature": 0}}
    text = {"model": "base", "prompt": "{{ prompt }}", **limit}
    nodes = {
        "plain": {**text, "requests": "rows.jsonl"},
        "adapted": {**text, "for_each": "plain", "lora": "adapter"},
        "vector": {
            "model": "embedder", "task": "embed", "for_each": "adapted", "prompt": "{{ prompt }}",
        },
    }  # fmt: skip
    models = {name: model(name) for name in ("base", "embedder")}
    app = {"version": 1, "name": "kinds", "models": models, "nodes": nodes}
    cluster = {"gpus": 2, "gpu": "core", "gpu_memory_gib": 1, "nvlink": 1}
    (tmp_path / "app.yaml").write_text(json.dumps(app | {"cluster": cluster}))
    ready = on_ray(tmp_path, tmp_path / "run", machines.address)
    one = ParallelConfig()
    stages = (
        Stage((Assignment("plain", one, (0,)),)),
        Stage((Assignment("adapted", one, (0,)), Assignment("vector", one, (1,)))),
    )
    outcome = start_run(ready, Plan(stages))
    assert outcome.failed == ()
    found = {n: json.loads((tmp_path / f"run/outputs/{n}.jsonl").read_text()) for n in nodes}
    bodies = {n: line["response"]["body"] for n, line in found.items()}
    assert all(bodies[n]["usage"]["completion_tokens"] for n in ("plain", "adapted"))
    assert all(isinstance(v, float) for v in bodies["vector"]["data"][0]["embedding"])


@soak
def test_more_machines_than_there_are(machines: Machines) -> None:
    RayExecutor.end_kept()
    executor = RayExecutor(RayOptions(address=machines.address, join_timeout_s=2.0))
    try:
        with pytest.raises(InputError, match=r"needs 3 machine.*the cluster has 2 machine"):
            executor.open(Cluster((GPU,) * 3, (), ((0,), (1,), (2,))), None)
    finally:
        executor.close()


@soak
def test_one_process_is_in_one_cluster(machines: Machines) -> None:
    with pytest.raises(InputError, match="this process belongs to the cluster at"):
        RayExecutor(RayOptions(address="127.0.0.1:1")).open(TWO_MACHINES, None)


@soak
def test_a_model_that_is_not_there_is_named_with_its_machine(machines: Machines) -> None:
    executor = RayExecutor(RayOptions(address=machines.address))
    executor.check([ModelSpec("gone", 512, path="/nowhere/gone")])
    try:
        with pytest.raises(InputError, match="has no folder /nowhere/gone"):
            executor.open(TWO_MACHINES, None)
    finally:
        executor.close()
