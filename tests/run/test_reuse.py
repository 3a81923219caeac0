"""Outputs of earlier runs are used again, on real engines: only what changed is asked."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import samullm_plugin as sl
from samullm_plugin import Curve, LoadTimes, Provenance, StepLatency
from samullm_plugin.host.interfaces.executor import EngineRequest
from samullm_plugin.run.reuse import Reuse
from samullm_plugin.run.store import store_path
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
