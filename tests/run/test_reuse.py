"""Outputs of earlier runs are used again, on real engines: only what changed is asked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import samullm_plugin as sl
from samullm_plugin import Curve, LoadTimes, Provenance, StepLatency
from samullm_plugin.app.loaded import LoadedApplication
from samullm_plugin.app.loading import load_application
from samullm_plugin.host.interfaces.executor import EngineRequest, RequestOutput
from samullm_plugin.host.interfaces.observer import RunInfo
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.log import RunLog
from samullm_plugin.run.python_calls import WorkerCalls
from samullm_plugin.run.request_queue import RequestQueue
from samullm_plugin.run.reuse import Reuse, ReuseOptions, opened_reuse
from samullm_plugin.run.store import OutputStore, store_path
from samullm_plugin.run.text_prompts import TextPrompts
from tests.models import make_tiny_llama
from tests.run.worlds import Uniform

ROWS = 12


class Flat(sl.LatencyModel):
    """Every iteration takes the same."""

    name = "flat"

    def step_latency(self, *size: Any) -> Any:
        return StepLatency(Curve.constant(0.01))

    def kv_cache_tokens(self, *size: Any) -> int:
        return 4096

    def load_times(self, *size: Any) -> LoadTimes:
        return LoadTimes(1.5, 3.0)

    def provenance(self, *size: Any) -> Provenance:
        return Provenance("assumed", "a constant")


def application(
    folder: Path, rows: int = ROWS, judge: str = "w7", temperature: float = 0.0
) -> sl.App:
    """Two nodes of one checkpoint each: an answer, and what is made of it."""
    if not (folder / "one").exists():
        make_tiny_llama(folder / "one", tokenizer=True)
        make_tiny_llama(folder / "two", seed=1, tokenizer=True)
    args = {"dtype": "float32", "block_size": 32, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    models = {
        name: sl.Model(
            name, path=folder / name, max_model_len=1024, architecture=folder / name,
            engine_args=args,
        )
        for name in ("one", "two")
    }  # fmt: skip
    app = sl.App(
        "again",
        models,
        cluster={"gpus": 2, "gpu": "core", "gpu_memory_gib": 1},
        planner={"scheduler": "max-heuristic", "length_estimator": Uniform(20),
                 "latency_model": Flat(), "scenarios": 1},
        executor={"type": "vllm", "options": {"heartbeat_s": 0.05}},
        folder=folder,
    )  # fmt: skip
    data = [{"id": f"i{k}", "prompt": f"w{k + 10} w{k + 11} w{k + 12}"} for k in range(rows)]
    sampling = {"temperature": temperature, "ignore_eos": True, "max_tokens": 12}
    answer = app.llm("answer", model="one", data=data, sampling_params=sampling)
    app.llm(
        "judge", model="two", for_each=answer, prompt=f"{judge} {{{{ output }}}}",
        sampling_params={**sampling, "temperature": 0.0},
    )  # fmt: skip
    return app


def asked(run: sl.AppRun) -> dict[str, int]:
    """Return by node how many requests engines really answered."""
    counts = {"answer": 0, "judge": 0}
    for event in run.events():
        if event.kind == "finished" and not event.fields.get("reused"):
            counts[str(event.fields["node"])] += 1
    return counts


@pytest.mark.vllm
def test_only_what_changed_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = application(tmp_path).host.resolve("executor", "vllm").value
    with executor.kept_warm():
        first = application(tmp_path).run(output_dir=tmp_path / "1")
        assert asked(first) == {"answer": ROWS, "judge": ROWS}

        changed = application(tmp_path, judge="w8")
        plan = changed.plan()
        assert plan.known is not None
        assert plan.known.counts == {"answer": ROWS}
        assert f"{ROWS} of {2 * ROWS} requests are known" in repr(plan)
        everything = changed.plan(reuse="off")
        assert everything.known is None
        assert plan.makespan_s < everything.makespan_s
        second = changed.run(plan, tmp_path / "2")
        assert asked(second) == {"answer": 0, "judge": ROWS}
        assert second.to_pandas()["answer"].equals(first.to_pandas()["answer"])
        started = {e.fields["node"] for e in second.events() if e.kind == "engine_started"}
        assert started == {"judge"}  # no engine for what is there

        grown = application(tmp_path, rows=ROWS + 3, judge="w8").run(output_dir=tmp_path / "3")
        assert asked(grown) == {"answer": 3, "judge": 3}

        again = application(tmp_path, judge="w8")
        third = again.run(output_dir=tmp_path / "4")
        assert asked(third) == {"answer": 0, "judge": 0}
        assert third.to_arrow().equals(second.to_arrow())
        fresh = again.run(output_dir=tmp_path / "5", fresh=["judge"])
        assert asked(fresh) == {"answer": 0, "judge": ROWS}
        assert fresh.to_arrow().equals(second.to_arrow())

        store_path().unlink()
        other = again.run(output_dir=tmp_path / "6", reuse=first)
        assert asked(other) == {"answer": 0, "judge": ROWS}
        with pytest.raises(sl.InputError, match=r"--fresh: there is no node 'judg' .*'judge'"):
            again.plan(fresh=["judg"])
        with pytest.raises(sl.InputError, match=r"--reuse .*none: holds no run"):
            again.plan(reuse=tmp_path / "none")

        store_path().write_bytes(b"damaged" * 999)
        with caplog.at_level(logging.WARNING):
            last = application(tmp_path, rows=2).run(output_dir=tmp_path / "7")
        assert asked(last) == {"answer": 2, "judge": 2}
        assert "run with --reuse off" in caplog.text


def reuse_of(loaded: Any, engine: str = "vllm 1") -> Reuse:
    return Reuse(loaded.app, engine, [], unique_id=lambda node, index: f"i{index}")


def test_keys(tmp_path: Path) -> None:
    """What changes an output changes the key, what changes its time does not."""
    loaded = application(tmp_path).load()
    asked_for = EngineRequest(3, None, 9, 12, sampling={"temperature": 0.0}, prompt="w3 w4")
    key = reuse_of(loaded).key((0, 3), asked_for)
    same = [
        reuse_of(loaded).key((0, 5), replace(asked_for, request=5, priority=4, prompt_tokens=8)),
        reuse_of(application(tmp_path, rows=30, judge="w9").load()).key((0, 3), asked_for),
    ]
    assert set(same) == {key}
    drawn = replace(asked_for, sampling={"temperature": 0.7})
    seeded = replace(asked_for, sampling={"temperature": 0.7, "seed": 3})
    others = [
        reuse_of(loaded, "vllm 2").key((0, 3), asked_for),
        reuse_of(loaded).key((1, 3), asked_for),
        reuse_of(loaded).key((0, 3), replace(asked_for, prompt="w3 w5")),
        reuse_of(loaded).key((0, 3), replace(asked_for, max_tokens=13)),
        reuse_of(loaded).key((0, 3), drawn),
        reuse_of(loaded).key((0, 4), drawn),
        reuse_of(loaded).key((0, 3), seeded),
    ]
    assert len({key, *others}) == len(others) + 1
    assert reuse_of(loaded).key((0, 3), seeded) == reuse_of(loaded).key((0, 4), seeded)
    (tmp_path / "one" / "config.json").write_text(
        (tmp_path / "one" / "config.json").read_text() + " "
    )
    assert reuse_of(loaded).key((0, 3), asked_for) != key  # another checkpoint


def texts(folder: Path) -> LoadedApplication:
    """A function, a model behind it, and another whose prompts are all the same."""
    (folder / "steps.py").write_text("def twice(row):\n    return row['prompt'] * 2\n")
    (folder / "r.jsonl").write_text(
        "".join(f'{{"id": "i{k}", "prompt": "w{k}"}}\n' for k in range(2))
    )
    (folder / "app.yaml").write_text(
        dedent("""
            version: 1
            name: equal
            models: {m: {model: THUDM/chatglm3-6b, max_model_len: 1024}}
            nodes:
              made: {python: "steps.py:twice", requests: r.jsonl}
              first: {model: m, requests: r.jsonl, sampling_params: {max_tokens: 5}}
              second:
                model: m
                for_each: first
                prompt: always the same
                sampling_params: {max_tokens: 5, temperature: 0}
            cluster: {gpus: 1, gpu: A100-80GB}
            planner: {scheduler: max-heuristic, scenarios: 1}
        """)
    )
    return load_application(folder / "app.yaml")


def test_equal_requests_of_one_run_are_asked_once(tmp_path: Path) -> None:
    """Also if nothing was kept when the run began."""
    loaded = texts(tmp_path)
    source, log = TextPrompts(loaded), RunLog(RunInfo("r", "a", "", tmp_path))
    with opened_reuse(ReuseOptions(), "vllm 1", loaded, loaded.app) as reuse:
        assert reuse is not None
        assert not reuse.hopeful
        queue = RequestQueue(Ledger(loaded.app), source, log, {}, reuse)
        first, second = (loaded.app.index(n) for n in ("first", "second"))
        for end in queue.ledger.first():
            if end[0] == first:
                queue._admit([end], 0.0)
        done = RequestOutput(0, 3, finish_reason="stop", text="yes")
        queue.take_given(first, 0.0)
        queue.finish((first, 0), done, 1.0)
        assert len(queue.take_given(second, 1.0)) == 1
        queue.finish((second, 0), done, 2.0)
        queue.finish((first, 1), replace(done, request=1), 3.0)
        assert queue.take_given(second, 3.0) == []
        assert queue.ledger.results[second, 1].text == "yes"
        assert reuse.counts == {"second": 1}


@pytest.mark.vllm
def test_looking_for_outputs_calls_no_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts(tmp_path)
    store = OutputStore(store_path())
    store.put(bytes(16), b"{}", "THUDM/chatglm3-6b")
    store.close()
    called: list[object] = []
    monkeypatch.setattr(WorkerCalls, "submit", lambda self, request, *rest: called.append(request))
    assert sl.App.from_yaml(tmp_path / "app.yaml").plan(executor="vllm").makespan_s > 0
    assert called == []
