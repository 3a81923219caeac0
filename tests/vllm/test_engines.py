"""Real engines: fed while they run, stopped, moved, shared by two cores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from samullm_vllm.devices import cpu_cores
from samullm_vllm.fork_launching import _ForkServer
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import Cluster, EngineRequest, Gpu, ModelSpec
from samullm_plugin.host.interfaces.executor import WINDOW
from samullm_plugin.host.interfaces.moving import continued
from samullm_plugin.model.shared_gpus import Sharing, share_gpus
from samullm_plugin.testing.executor_contract import ExecutorContract
from tests.models import make_tiny_llama
from tests.vllm.conftest import CLUSTER, GREEDY, Bench, request, spec

pytestmark = pytest.mark.vllm


def undisturbed(bench: Bench, model: Path, requests: list[EngineRequest]) -> list[tuple[int, ...]]:
    """Return the tokens of requests that run on one engine to their end."""
    bench.start(spec("undisturbed", model))
    bench.executor.submit("undisturbed", requests)
    outputs = bench.gather(len(requests))
    bench.executor.stop_engine("undisturbed")
    tokens = [outputs[r.request].token_ids or () for r in requests]
    bench.outputs.clear()
    return tokens


def test_requests_stream_in_and_out(bench: Bench, tiny: Path) -> None:
    """Requests given while the engine starts and while it runs finish, short ones first."""
    bench.executor.start_engine(spec("a", tiny))
    bench.executor.submit("a", [request(0, 400), request(1, 5)])
    bench.until(lambda: 1 in bench.outputs)
    assert 0 not in bench.outputs  # the short one came out while the long one ran
    bench.executor.submit("a", [request(2, 7)])
    outputs = bench.gather(3)
    assert [outputs[i].num_tokens for i in range(3)] == [400, 5, 7]
    assert all(len(o.token_ids or ()) == o.num_tokens for o in outputs.values())
    assert {o.finish_reason for o in outputs.values()} == {"length"}
    kinds = [e.kind for e in bench.events]
    assert kinds[0] == "ready"
    assert [e.time_s for e in bench.events] == sorted(e.time_s for e in bench.events)
    steps, seconds = bench.executor.take_steps("a") or (None, None)
    assert steps is not None
    assert seconds is not None
    assert steps.prefill_tokens.sum() == 3 * 17
    assert steps.num_tokens.sum() == 3 * 17 + 399 + 4 + 6
    assert (seconds > 0).all()
    assert bench.executor.stop_engine("a") == []


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_window_changes_neither_texts_nor_order(bench: Bench, tiny: Path, policy: str) -> None:
    """Given a few at a time, requests finish as if the engine had all of them from the start."""
    few = replace(spec("all", tiny), scheduling_policy=policy)
    engine = replace(few.model.engine, max_num_seqs=2)
    few = replace(few, model=replace(few.model, engine=engine))
    lengths = [3 + 7 * i % 23 for i in range(24)]
    order = lengths if policy == "priority" else [0] * 24
    requests = [
        replace(request(i, n), priority=p)
        for i, (n, p) in enumerate(zip(lengths, order, strict=True))
    ]
    bench.executor.start_engine(few)
    bench.executor.submit("all", requests)
    expected = {r: o.token_ids for r, o in bench.gather(24).items()}
    bench.executor.stop_engine("all")
    bench.outputs.clear()
    bench.executor.start_engine(replace(few, key="window"))
    window = bench.executor.window(few.model)
    assert window == WINDOW * 2
    waiting = sorted(requests, key=lambda r: r.priority)
    bench.executor.submit("window", waiting[:window])
    given = window
    while len(bench.outputs) < 24:
        bench.poll(1.0)
        more = waiting[given : len(bench.outputs) + window]
        given += len(more)
        if more:
            bench.executor.submit("window", more)
    assert {r: o.token_ids for r, o in bench.outputs.items()} == expected
    assert list(bench.outputs) == list(expected)


def test_stopped_and_moved_is_as_undisturbed(bench: Bench, tiny: Path) -> None:
    """With a float32 model at temperature 0 a moved request ends with the same tokens."""
    requests = [request(i, 120 + 10 * i) for i in range(6)]
    expected = undisturbed(bench, tiny, requests)
    bench.start(spec("a", tiny, (0,)))
    bench.start(spec("b", tiny, (1,)))
    bench.executor.submit("a", requests)
    bench.until(lambda: sum(bench.executor.progress("a").values()) >= 60)
    cut = {o.request: o for o in bench.executor.stop_engine("a")}
    bench.poll(0.0)
    assert cut
    assert all(0 < o.num_tokens < r.max_tokens for r in requests if (o := cut.get(r.request)))
    bench.executor.submit("b", [continued(r, cut[r.request]) for r in requests if r.request in cut])
    outputs = bench.gather(len(requests))
    for r, tokens in zip(requests, expected, strict=True):
        before = cut[r.request].token_ids or () if r.request in cut else ()
        assert (*before, *(outputs[r.request].token_ids or ())) == tokens


def test_two_cores_for_one_engine(bench: Bench, tiny: Path) -> None:
    """Tensor parallelism over both cores computes the same, and is stopped and moved alike."""
    requests = [request(i, 60) for i in range(5)]
    expected = undisturbed(bench, tiny, requests)
    bench.start(spec("pair", tiny, (0, 1)))
    assert len(bench.pids("pair")) == 2
    bench.executor.submit("pair", requests[:3])
    bench.poll(0.01)
    bench.executor.submit("pair", requests[3:])
    bench.until(lambda: sum(bench.executor.progress("pair").values()) > 0)
    cut = {o.request: o for o in bench.executor.stop_engine("pair")}
    bench.poll(0.0)
    bench.start(spec("single", tiny, (1,)))
    bench.executor.submit("single", [continued(requests[i], o) for i, o in cut.items()])
    outputs = bench.gather(5)
    for r, tokens in zip(requests, expected, strict=True):
        before = cut[r.request].token_ids or () if r.request in cut else ()
        assert (*before, *(outputs[r.request].token_ids or ())) == tokens


def test_layers_split_over_two_cores(bench: Bench, tiny: Path) -> None:
    """Pipeline parallelism computes the same."""
    requests = [request(i, 30) for i in range(3)]
    expected = undisturbed(bench, tiny, requests)
    split = replace(spec("pp", tiny, (0, 1)), tensor_parallel_size=1, pipeline_parallel_size=2)
    bench.start(split)
    bench.executor.submit("pp", requests)
    outputs = bench.gather(3)
    assert [outputs[r.request].token_ids for r in requests] == expected


def test_engines_side_by_side(bench: Bench, tiny: Path) -> None:
    """Two engines, each on its own core, run at the same time and keep their requests apart."""
    bench.executor.start_engine(spec("a", tiny, (0,)))
    bench.executor.start_engine(spec("b", tiny, (1,)))
    bench.executor.submit("a", [request(i, 30) for i in range(0, 8, 2)])
    bench.executor.submit("b", [request(i, 30) for i in range(1, 8, 2)])
    bench.gather(8)
    cores = [psutil.Process(bench.pids(key)[0]).cpu_affinity() for key in ("a", "b")]
    assert [len(c or ()) for c in cores] == [1, 1]
    assert cores[0] != cores[1]
    for event in bench.events:
        assert all(o.request % 2 == (event.key == "b") for o in event.outputs)


def test_engines_share_a_core(tmp_path: Path, tiny: Path) -> None:
    """Two engines on one core compute what they compute alone, and the other core is nobody's."""
    cluster = share_gpus(Cluster.uniform(Gpu("core", 1 << 30), 1), [Sharing(2, 2.0)])
    executor = VllmExecutor(VllmOptions(heartbeat_s=0.02))
    other = VllmExecutor(VllmOptions(heartbeat_s=0.02))
    executor.open(cluster, tmp_path / "run")
    bench = Bench(executor)
    try:
        requests = [request(i, 30) for i in range(4)]
        expected = undisturbed(bench, tiny, requests)
        bench.executor.start_engine(spec("a", tiny, (0,)))
        bench.executor.start_engine(spec("b", tiny, (1,)))
        bench.executor.submit("a", requests)
        bench.executor.submit("b", [replace(r, request=r.request + 4) for r in requests])
        outputs = bench.gather(8)
        assert [outputs[i].token_ids for i in range(8)] == expected * 2
        cores = [psutil.Process(bench.pids(key)[0]).cpu_affinity() for key in ("a", "b")]
        assert cores[0] == cores[1]
        assert len(cores[0] or ()) == 1
        other.open(Cluster.uniform(Gpu("core", 1 << 30), len(cpu_cores()) - 1), tmp_path / "other")
    finally:
        executor.close()
        other.close()


def test_too_long_is_refused_per_request(bench: Bench, tiny: Path) -> None:
    """A prompt beyond max_model_len is reported with its reason; the others run."""
    bench.start(spec("a", tiny))
    long = EngineRequest(7, tuple(range(3, 500)) * 2, 994, 5, sampling=GREEDY)
    bench.executor.submit("a", [request(0, 5), long, request(1, 5)])
    outputs = bench.gather(3)
    assert outputs[7].finish_reason == "error"
    assert "512" in (outputs[7].error or "")
    assert [outputs[i].num_tokens for i in (0, 1)] == [5, 5]


def test_generation_ends_at_max_model_len(bench: Bench, tiny: Path) -> None:
    bench.start(spec("a", tiny))
    bench.executor.submit("a", [request(0, 10_000)])
    output = bench.gather(1)[0]
    assert (output.num_tokens, output.finish_reason) == (512 - 17, "length")


def test_wrong_sampling_is_refused_per_request(bench: Bench, tiny: Path) -> None:
    bench.start(spec("a", tiny))
    wrong: list[dict[str, object]] = [
        {"temperature": -1.0}, {"no_such_parameter": 1}, {"n": 2}, {"stop": ["x"]},
    ]  # fmt: skip
    bench.executor.submit("a", [request(i, 5, **w) for i, w in enumerate(wrong)])
    text = EngineRequest(9, None, 3, 5, prompt="no tokenizer here")
    bench.executor.submit("a", [text, request(8, 5)])
    outputs = bench.gather(6)
    assert [outputs[i].finish_reason for i in (0, 1, 2, 3, 9)] == ["error"] * 5
    assert "no_such_parameter" in (outputs[1].error or "")
    assert "tokenizer" in (outputs[9].error or "")
    assert outputs[8].num_tokens == 5


def test_text_in_text_out(bench: Bench, wordy: Path) -> None:
    """Text and chat messages are tokenised with the model's own tokenizer, outputs come as text."""
    bench.start(spec("a", wordy))
    ids = request(0, 6)
    text = EngineRequest(1, None, 3, 6, prompt="w10 w11 w12", sampling=GREEDY)
    messages = ({"role": "user", "content": "w10 w11"},)
    chat = EngineRequest(2, None, 3, 6, messages=messages, sampling=GREEDY)
    bench.executor.submit("a", [ids, text, chat])
    outputs = bench.gather(3)
    assert outputs[0].prompt_token_ids is None
    assert outputs[1].prompt_token_ids == (10, 11, 12)
    assert outputs[2].prompt_token_ids == (0, 10, 11)  # the role is no word of its own
    for output in outputs.values():
        words = (output.text or "").split()
        special = {0, 1, 2}
        assert words == [f"w{i}" for i in output.token_ids or () if i not in special]


def test_stop_string_across_the_cut(bench: Bench, wordy: Path) -> None:
    """A moved request ends at a stop string of which one half was generated before the move."""
    free = undisturbed(bench, wordy, [request(0, 40)])[0]
    at = next(i for i in range(6, 30) if min(free[i : i + 2]) > 2)
    stop = f"w{free[at]} w{free[at + 1]}"
    bench.start(spec("a", wordy))
    whole = request(0, 40, stop=[stop])
    bench.executor.submit("a", [whole])
    expected = bench.gather(1)[0]
    assert expected.finish_reason == "stop"
    assert expected.num_tokens <= at + 2
    cut = expected.num_tokens - 1
    half = replace(
        whole,
        prompt_token_ids=(*(whole.prompt_token_ids or ()), *free[:cut]),
        prompt_tokens=whole.prompt_tokens + cut,
        max_tokens=whole.max_tokens - cut,
        num_generated=cut,
    )
    bench.outputs.clear()
    bench.executor.submit("a", [half])
    output = bench.gather(1)[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free[cut : cut + 1]
    assert output.text == expected.text


def test_min_tokens_and_logprobs_are_carried(bench: Bench, tiny: Path) -> None:
    """A moved request still generates min_tokens in all; log probabilities come per token."""
    ids = request(0).prompt_token_ids or ()
    sampling: dict[str, object] = {"temperature": 0.0, "min_tokens": 12, "logprobs": 1}
    sampling["stop_token_ids"] = list(range(256, 512))
    whole = EngineRequest(0, ids, 17, 200, sampling=sampling)
    bench.start(spec("a", tiny))
    bench.executor.submit("a", [whole])
    first = bench.gather(1)[0]
    assert first.num_tokens > 12
    assert first.finish_reason == "stop"
    assert max((first.token_ids or ())[:12]) < 256
    part = replace(first, num_tokens=5, token_ids=(first.token_ids or ())[:5], finish_reason=None)
    bench.outputs.clear()
    bench.executor.submit("a", [continued(whole, part)])
    rest = bench.gather(1)[0]
    assert (*(part.token_ids or ()), *(rest.token_ids or ())) == first.token_ids
    assert rest.logprobs is not None
    assert first.logprobs is not None
    assert len(rest.logprobs) == rest.num_tokens
    for mine, its in zip(rest.logprobs, first.logprobs[5:], strict=True):
        assert [t.token_id for t in mine] == [t.token_id for t in its]
        assert [t.logprob for t in mine] == pytest.approx([t.logprob for t in its], abs=1e-3)


def test_penalised_requests_begin_again(bench: Bench, tiny: Path) -> None:
    """What cannot be carried over is handed back without tokens, and then ends as undisturbed."""
    requests = [request(0, 150, presence_penalty=1.5), request(1, 150)]
    expected = undisturbed(bench, tiny, requests)
    bench.start(spec("a", tiny))
    bench.executor.submit("a", requests)
    bench.until(lambda: sum(bench.executor.progress("a").values()) >= 20)
    cut = {o.request: o for o in bench.executor.stop_engine("a")}
    assert cut[0].num_tokens == 0
    assert cut[1].num_tokens > 0
    bench.start(spec("b", tiny))
    bench.executor.submit("b", [continued(r, cut[r.request]) for r in requests])
    outputs = bench.gather(2)
    assert outputs[0].token_ids == expected[0]
    assert (*(cut[1].token_ids or ()), *(outputs[1].token_ids or ())) == expected[1]


def test_lower_priority_number_first(bench: Bench, tiny: Path) -> None:
    one_at_a_time = replace(
        spec("a", tiny, scheduling_policy="priority").model,
        engine=replace(spec("a", tiny).model.engine, max_num_seqs=1),
    )
    bench.executor.start_engine(spec("a", tiny, model=one_at_a_time, scheduling_policy="priority"))
    bench.executor.submit("a", [replace(request(i, 5), priority=5 - i) for i in range(5)])
    bench.gather(5)
    assert list(bench.outputs) == [4, 3, 2, 1, 0]


def test_kv_cache_is_what_was_asked_for(bench: Bench, tiny: Path) -> None:
    """With room for one whole request, what is cached never exceeds it: others are preempted."""
    model = replace(spec("a", tiny).model, max_model_len=128)
    bench.start(spec("a", tiny, model=model, kv_cache_tokens=128))
    bench.executor.submit("a", [request(i, 100) for i in range(3)])
    bench.gather(3)
    steps, _ = bench.executor.take_steps("a") or (None, None)
    assert steps is not None
    assert steps.context_tokens.max() <= 128
    assert steps.prefill_tokens.sum() > 3 * 17  # preempted ones were computed again


def test_the_forking_process_ends_with_the_outermost_context(tmp_path: Path) -> None:
    """These tests are in one themselves."""
    with VllmExecutor.kept_warm():
        executor = VllmExecutor()
        executor.open(CLUSTER, tmp_path)
        executor.close()
        server = _ForkServer.kept["cpu"]
    assert _ForkServer.kept["cpu"] is server
    assert not server.lost


def test_importing_begins_before_the_executor_is_opened() -> None:
    """Once, and not outside of a context, for nobody would end it."""
    with patch("samullm_vllm.fork_launching._ForkServer", kept={}, keeping=False) as server:
        VllmExecutor().begin_opening()
        assert not server.called
        server.keeping = True
        VllmExecutor(VllmOptions(start_method="fresh")).begin_opening()
        assert not server.called
        for _ in range(2):
            VllmExecutor().begin_opening()
        server.assert_called_once()
        assert list(server.kept) == ["cpu"]


def test_options_reach_the_engine(bench: Bench, tmp_path: Path) -> None:
    """Engine arguments beyond the named ones are handed on; the log is kept in the run folder."""
    model = make_tiny_llama(tmp_path / "m")
    settings = replace(spec("a", model).model.engine, extra=(("max_logprobs", 3),))
    bench.start(spec("a", model, model=replace(spec("a", model).model, engine=settings)))
    bench.executor.submit("a", [request(0, 2, logprobs=5), request(1, 2, logprobs=3)])
    outputs = bench.gather(2)
    assert outputs[0].finish_reason == "error"
    assert outputs[1].finish_reason == "length"
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"
    log = (tmp_path / "run" / "logs" / "a.log").read_text()
    assert "Loading safetensors" in log  # at any logging level that the environment asks for


class TestContract(ExecutorContract):
    """The rules every executor keeps."""

    from samullm_vllm.vllm_executor import VllmExecutor

    executor_class = VllmExecutor
    kv_cache_tokens = 4096

    @pytest.fixture(autouse=True)
    def _use_tiny(self, tiny: Path) -> None:
        type(self).model = ModelSpec(
            "tiny", 512, path=str(tiny), engine=spec("a", tiny).model.engine
        )
