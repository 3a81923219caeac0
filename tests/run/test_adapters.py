"""Adapters of nodes: several on one engine, and those of another model refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from samullm_plugin.app.loading import load_application, read_spec
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.profiling.memory import adapter_bytes, weight_bytes_on_device
from samullm_plugin.rules.fusion import fuse_chains
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.run import start_run
from tests.models import make_tiny_adapter, make_tiny_llama
from tests.run.test_pipelines import ENGINE, outputs, setup_of

ROWS = [{"id": f"r{i}", "prompt": p} for i, p in enumerate(["good day", "what now", "a b c"])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters of it, and rows to ask."""
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_llama(folder / "base", characters=True, vocab_size=104)
    make_tiny_adapter(folder / "one", seed=1)
    make_tiny_adapter(folder / "two", seed=2, rank=12)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return folder


def write(place: Path, nodes: dict[str, Any], **args: Any) -> Path:
    """Write an app.yaml of the model."""
    engine = {k: v for k, v in ENGINE.items() if "structured" not in k}
    model = {"model": "base", "path": str(place / "base"), "engine_args": engine | args}
    app = {
        "version": 1,
        "name": "adapters",
        "models": {"m": model},
        "nodes": nodes,
        "cluster": {"gpus": 2, "gpu": "core", "gpu_memory_gib": 1, "nvlink": 2},
    }
    path = place / "app.yaml"
    path.write_text(json.dumps(app))
    return path


def chain(*adapters: str | None) -> dict[str, Any]:
    """Return nodes one after another, each with an adapter or none."""
    found: dict[str, Any] = {}
    for k, adapter in enumerate(adapters):
        origin = {"for_each": f"n{k - 1}"} if k else {"requests": "rows.jsonl"}
        lora = {} if adapter is None else {"lora": adapter}
        sampling = {"max_tokens": 6, "temperature": 0}
        node = {"model": "m", "prompt": "{{ prompt }}", "sampling_params": sampling}
        found[f"n{k}"] = {**node, **origin, **lora}
    return found


def generated(place: Path, adapter: str | None) -> dict[str, str]:
    """Return what transformers generates for the rows, the adapter's products added to weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    if adapter is not None:
        rest = load_file(place / adapter / "adapter_model.safetensors")
        for name in [n for n in rest if "lora_A" in n]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = rest[name.replace("lora_A", "lora_B")] @ rest[name]
            model.get_submodule(module).weight.data += 2.0 * delta
    found = {}
    for row in ROWS:
        asked = torch.tensor([tokenizer.encode(row["prompt"])])
        made = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=2,
        )
        found[row["id"]] = tokenizer.decode(made[0, asked.shape[1] :], skip_special_tokens=True)
    return found


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_adapters_share_an_engine(place: Path, tmp_path: Path) -> None:
    """Two adapters and none, on one engine that is started once; each answers as it should."""
    path = write(place, chain("one", "two", None, "one"))
    spec = read_spec(path)
    ready = setup_of(spec, spec.models, path, tmp_path / "r", fused=True)
    plan = make_plan(ready.host, ready.instance.problem, "min-heuristic").plan
    outcome = start_run(ready, plan)
    assert outcome.failed == ()
    started = [r for r in read_journal(tmp_path / "r/events.jsonl") if r["kind"] == "engine_ready"]
    assert {r["node"] for r in started} == {"n0..n3"}
    for node, adapter in (("n0", "one"), ("n1", "two"), ("n2", None), ("n3", "one")):
        given = {k: v or "" for k, v in outputs(tmp_path / "r", node).items()}
        assert given == generated(place, adapter), node


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("executor", ["simulated", "emulated"])
def test_executors_that_model_engines(place: Path, tmp_path: Path, executor: str) -> None:
    path = write(place, chain("one", "two", None))
    spec = read_spec(path)
    made = setup_of(spec, spec.models, path, tmp_path / "r", fused=True)
    truth = made.instance.problem
    ready = replace(made, executor=executor, executor_options={}, truth=truth)
    outcome = start_run(ready, make_plan(ready.host, truth, "min-heuristic").plan)
    assert outcome.failed == ()
    finished = {n: c["requests"]["finished"] for n, c in outcome.metrics["nodes"].items()}
    assert finished == dict.fromkeys(("n0", "n1", "n2"), len(ROWS))


def test_engines_hold_all_adapters(place: Path) -> None:
    loaded = load_application(write(place, chain("one", None, "two", "one")))
    engines = {n.model.engine for n in loaded.app.nodes}
    assert len(engines) == 1
    (engine,) = engines
    assert engine.given("enable_lora") is True
    assert (engine.given("max_loras"), engine.given("max_lora_rank")) == (2, 16)
    assert len(fuse_chains(loaded.app, 1).app.nodes) == 1  # one model in the plan
    assert any("take as long with adapters" in note for note in loaded.app.notes)
    assert loaded.sources is not None
    given = [s.lora for s in loaded.sources]
    assert given == [str(place / "one"), None, str(place / "two"), str(place / "one")]


def test_memory_of_adapters() -> None:
    """Llama-3.1-8B with rank 16: 41,943,040 numbers an adapter, as PEFT counts all matrices."""
    sizes = ModelArchitecture(32, 4096, 32, 8, 128, 14336, 128256)
    plain = EngineOptions()
    lora = (("enable_lora", True), ("max_loras", 3), ("max_lora_rank", 16))
    adapted = replace(plain, extra=lora)
    assert adapter_bytes(sizes, plain, 1) == 0
    assert adapter_bytes(sizes, adapted, 1) == 3 * 2 * 41_943_040
    more = weight_bytes_on_device(sizes, adapted, 2) - weight_bytes_on_device(sizes, plain, 2)
    assert 0.5 < more / (3 * 2 * 41_943_040) < 1.0
    # On one of 2 devices: halves of what q, k, v, gate and up write, and of what o and down read.
    mine = 6144 + 2 * 4608 + (2048 + 4096) + 2 * 11264 + (7168 + 4096)
    assert adapter_bytes(sizes, adapted, 2) == 3 * 2 * 32 * 16 * mine
    experts = replace(sizes, num_experts=4, num_active_experts=2)
    mlps = 2 * 11264 + (7168 + 4096)
    assert adapter_bytes(experts, adapted, 2) == 3 * 2 * 32 * 16 * (mine + 3 * mlps)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"hidden_size": 128},
            "of another model: its down_proj of layer 0 writes 128",
        ),
        ({"num_hidden_layers": 3}, "another model: it has down_proj of layer 2, and base has 2 l"),
        (
            {"intermediate_size": 100},
            "down_proj of layer 0 reads 100 numbers, that of base 128",
        ),
    ],
)
def test_adapters_of_other_models(place: Path, tmp_path: Path, change: Any, why: str) -> None:
    make_tiny_adapter(tmp_path / "other", **change)
    with pytest.raises(InputError, match=why) as found:
        load_application(write(place, chain("one", str(tmp_path / "other"))))
    assert f"{place / 'app.yaml'}: nodes.n1.lora" in str(found.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"use_dora": True}, "use_dora is True, and vLLM serves plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 1024}, "r is 1024; vLLM serves up to 512"),
        ({"r": "many"}, "r is 'many'"),
    ],
)
def test_adapters_that_are_not_served(
    place: Path, tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    folder = make_tiny_adapter(tmp_path / "odd")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(InputError, match=re.escape(why)):
        load_application(write(place, chain(str(folder))))


def test_other_wrong_adapters(place: Path) -> None:
    with pytest.raises(InputError, match=r"nodes.n0.lora: there is no adapter in .*nowhere"):
        load_application(write(place, chain("nowhere")))
    with pytest.raises(InputError, match=r"max_loras: 1 is too small: its nodes use 2 adapters"):
        load_application(write(place, chain("one", "two"), max_loras=1))
    with pytest.raises(InputError, match=r"max_lora_rank: 8 is too small: .*two has rank 12"):
        load_application(write(place, chain("two"), max_lora_rank=8))
    node = {"model": "m", "requests": "rows.jsonl", "task": "embed", "lora": "one"}
    with pytest.raises(InputError, match="lora: adapters of pooling models are not served"):
        load_application(write(place, {"n": node}))
