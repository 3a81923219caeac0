"""Commands and news over calls that are lost, repeated and overtake one another, without Ray."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_ray.actors import check_facts, greet_later
from samullm_ray.agent import installed_versions
from samullm_ray.cluster import check_address, connect
from samullm_ray.describe import FoundMachine, cluster_section
from samullm_ray.executor import RayExecutor
from samullm_ray.launcher import RemoteLauncher
from samullm_ray.link import Batch, Incoming, Outgoing
from samullm_ray.machine import Machine
from samullm_ray.messages import (
    Begin,
    Call,
    Command,
    Ended,
    Kill,
    Killed,
    Launch,
    MachineFacts,
    Meet,
    News,
    Place,
    Reply,
    Said,
    Send,
    decode_call,
    encode,
)
from samullm_ray.options import RayOptions
from samullm_vllm.launching import Launched
from samullm_vllm.protocol import LENGTH, Finished, ProtocolError, Start, Submit, decode
from samullm_vllm.protocol import encode as encode_message
from samullm_vllm.vllm_executor import VllmExecutor

from samullm_plugin import Cluster, EngineRequest, Gpu, InputError, RequestOutput
from samullm_plugin.host.manager import PluginHost

FACTS = MachineFacts("one", "host", "cpu", (), ())


class Unreachable(Exception):
    """A call that did not get through."""


class Gone(Exception):
    """The agent has died."""


class Wire:
    """An agent in memory: answers when the test says so, or loses calls and answers."""

    def __init__(self) -> None:
        self.incarnation = "one"
        self.commands: Incoming[Command] = Incoming()
        self.carried_out: list[Command] = []
        self.news: Outgoing[News] = Outgoing()
        self.calls: list[tuple[Future[bytes], Call]] = []
        self.fenced = False
        self.kills_succeed = True

    def call(self, data: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        self.calls.append((future, decode_call(data)))
        return future

    def final(self, error: BaseException) -> str | None:
        return "it has died" if isinstance(error, Gone) else None

    def fence(self) -> None:
        self.fenced = True

    def serve(self, number: int, *, arrives: bool = True, answers: bool = True) -> None:
        """Let a call through, or lose it or its answer."""
        future, call = self.calls.pop(number % len(self.calls))
        if arrives:
            for command in self.commands.take(call.commands):
                self.carried_out.append(command)
                if isinstance(command, Kill):
                    self.news.add(Killed(command.key, b"", gone=self.kills_succeed))
            batch: Batch[News] = Batch(0, ())
            if call.wait_s is not None:
                self.news.acknowledge(call.acknowledged)
                batch = self.news.batch()
            if answers:
                reply = Reply(self.incarnation, self.commands.received, batch)
                future.set_result(encode(reply))
                return
        future.set_exception(Unreachable())


class QuickWire(Wire):
    """An agent that answers at once, and polls when it has something to say."""

    def call(self, data: bytes) -> Future[bytes]:
        future = super().call(data)
        for number in reversed(range(len(self.calls))):
            call = self.calls[number][1]
            if call.wait_s is None or call.commands.items or self.news:
                self.serve(number)
        return future


def machine(wire: Wire) -> Machine:
    return Machine(
        0, (0,), wire, FACTS, lambda: None, poll_s=1.0, linger_s=0.02, lost_timeout_s=20.0
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_command_and_all_news_once(steps: list[tuple[int, bool, bool]]) -> None:
    wire = Wire()
    there = machine(wire)
    told = heard = 0
    there.flush(0.0)
    for now, (number, arrives, answers) in enumerate(steps):
        if number < 4:
            there.tell(Kill(str(told)))
            told += 1
        elif wire.calls:
            wire.serve(number, arrives=arrives, answers=answers)
        for news in there.update(now * 0.01):
            assert news.key == str(heard)
            heard += 1
        there.flush(now * 0.01)
    for now in range(20):  # nothing is lost any more
        for _ in range(len(wire.calls)):
            wire.serve(0)
        heard += len(there.update(1.0 + now * 0.2))
        there.flush(1.0 + now * 0.2)
    assert [c.key for c in wire.carried_out] == [str(i) for i in range(told)]
    assert heard == told
    assert not there.lost


def test_a_silent_machine_is_given_up_and_fenced() -> None:
    wire = Wire()
    there = machine(wire)
    for tick in range(200):
        there.flush(tick * 0.2)
        there.update(tick * 0.2)
    assert "nothing was heard of it for 20 s" in there.lost
    assert wire.fenced
    there.tell(Kill("late"))
    there.flush(100.0)
    for _ in range(len(wire.calls)):
        wire.serve(0)
    assert there.update(100.0) == []  # word of a machine that was given up is dropped


def test_a_busy_coordinator_is_no_silence() -> None:
    there = machine(Wire())
    for hour in range(10):
        there.update(hour * 3600.0)
    assert not there.lost


def test_one_call_carries_all_commands_and_asks_for_news() -> None:
    """Calls are what costs the coordinator."""
    wire = Wire()
    there = machine(wire)
    there.tell(Kill("a"))
    there.tell(Kill("b"))
    there.flush(0.0)
    there.flush(0.1)
    (first,) = [call for _, call in wire.calls]
    assert [c.key for c in first.commands.items] == ["a", "b"]
    assert first.wait_s is not None
    there.tell(Kill("c"))  # while that call waits for news, what is to be done does not wait
    there.flush(0.2)
    second = wire.calls[1][1]
    assert ([c.key for c in second.commands.items], second.wait_s) == (["c"], None)


def test_replies_are_gathered_while_they_come_one_after_another() -> None:
    wire = Wire()
    there = machine(wire)
    lingers = []
    for now_s in (0.0, 10.0, 10.02, 10.07, 20.0):
        there.flush(now_s)
        lingers.append(wire.calls[0][1].linger_s)
        wire.news.add(Killed("x", b"", gone=True))
        wire.serve(0)
        assert len(there.update(now_s)) == 1
    there.flush(21.0)
    assert [*lingers, wire.calls[0][1].linger_s] == [0.0, 0.0, 0.0, 0.02, 0.02, 0.0]


def test_what_engines_hear_and_say_crosses_machines_as_it_is(tmp_path: Path) -> None:
    wire = QuickWire()
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    launcher = RemoteLauncher(bell, lambda lost: None, rank_processes=True)
    launcher.machines[0] = machine(wire)
    with (tmp_path / "log").open("wb") as log:
        channel = launcher.launch("a", 1, log, launcher.placement(["0/0"])).channel
    asked = Submit((EngineRequest(3, (5, 6), 2, 9, sampling={"seed": 1, "stop": ["x"]}),))
    said = Finished((RequestOutput(3, 1, (7,), text="w7", finish_reason="stop"),))
    channel.send(asked)
    with pytest.raises(ProtocolError, match="it cannot be sent"):  # as by an engine of this machine
        channel.send(Submit((EngineRequest(4, None, 1, 1, sampling={"x": object()}),)))
    wire.news.add(Said("a", (encode_message(said)[LENGTH.size :], b"nonsense")))
    launcher.flush()
    launcher.update()
    sent = wire.carried_out[-1]
    assert isinstance(sent, Send)
    assert decode(sent.frame[LENGTH.size :]) == asked
    assert launcher.fed
    encoded = channel.receive_encoded()
    assert decode(encoded[0]) == said
    assert encoded[1:] == [b"nonsense"]
    os.close(bell)


def test_death_ends_it_at_once() -> None:
    wire = Wire()
    there = machine(wire)
    there.flush(0.0)
    wire.calls.pop()[0].set_exception(Gone())
    there.update(0.0)
    assert there.lost == "machine host is lost: it has died"


def test_an_agent_that_took_its_place_is_not_believed() -> None:
    wire = Wire()
    there = machine(wire)
    there.flush(0.0)
    wire.incarnation = "two"
    wire.serve(0)
    there.update(0.0)
    assert "another agent" in there.lost


@pytest.mark.parametrize("gone", [True, False])
def test_an_engine_is_killed_once_and_its_agent_is_believed(*, gone: bool, tmp_path: Path) -> None:
    wire = QuickWire()
    wire.kills_succeed = gone
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    launcher = RemoteLauncher(bell, lambda lost: None, rank_processes=True)
    launcher.machines[0] = machine(wire)
    with (tmp_path / "log").open("wb") as log:
        for _ in range(2):  # the second engine of the key is not taken for killed with the first
            launched = launcher.launch("a", 1, log, launcher.placement(["0/0"]))
            launcher.strike(launched)
            assert launcher.kill(launched, 10.0) == gone
    assert not wire.fenced
    assert [type(c) for c in wire.carried_out] == [Launch, Kill, Launch, Kill]
    os.close(bell)


def test_an_engine_of_two_machines_is_one_engine(tmp_path: Path) -> None:
    """One leads, says where, and the other follows; what befalls one of them befalls the engine."""
    wires = [QuickWire(), QuickWire()]
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    launcher = RemoteLauncher(bell, lambda lost: None, rank_processes=True)
    launcher.machines |= {n: machine(wire) for n, wire in enumerate(wires)}
    start = Start("a", "m", {}, num_machines=2)

    def hear(wire: QuickWire, news: News) -> None:
        wire.news.add(news)
        launcher.flush()
        for _ in range(len(wire.calls)):
            wire.serve(0)
        launcher.update()
        launcher.flush()
        launcher.update()

    with (tmp_path / "log").open("wb") as log:

        def launched() -> Launched:
            where = launcher.placement(["1/0", "1/1", "0/1", "0/2"])
            engine = launcher.launch("a", 1, log, where)
            engine.channel.send(start)
            engine.channel.send(where)
            launcher.flush()
            launcher.update()
            return engine

        engine = launched()
        leading, following = wires[1].carried_out, wires[0].carried_out
        assert leading == [Launch("a", (0, 1), 1), Begin("a", start), Place("a", (0, 1))]
        assert following == [Launch("a", (1, 2), 1)]
        hear(wires[1], Meet("a", "10.0.0.2", 4711))
        told = Start("a", "m", {}, num_machines=2, machine=1, master="10.0.0.2", master_port=4711)
        assert following[1:] == [Begin("a", told), Place("a", (1, 2))]
        assert len(leading) == 3
        hear(wires[0], Ended("a", "its memory is full", b"end of the log"))
        assert engine.lost
        assert engine.why_lost == "machine host: its memory is full"
        assert launcher.kill(engine, 1.0)
        assert [w.carried_out[-1] for w in wires] == [Kill("a"), Kill("a")]
        engine = launched()
        assert not engine.lost
        launcher.machines[0].give_up("unplugged")
        launcher.update()
        assert "unplugged" in engine.why_lost
        wires[1].kills_succeed = False
        assert not launcher.kill(engine, 1.0)  # of the machine that is left
    os.close(bell)


def test_an_address_at_which_nobody_listens_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would go on trying for minutes."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray is asked to join"))
    for ask in (lambda o: RayExecutor(o).begin_opening(), connect):  # before planning, and later
        with pytest.raises(InputError, match=r"no cluster at 127\.0\.0\.1:1: .*ray start"):
            ask(RayOptions(address="127.0.0.1:1"))
        for wrong in ("here", "here:port", "here:99999", ":6379", ""):
            with pytest.raises(InputError, match="that is no HOST:PORT; start one"):
                ask(RayOptions(address=wrong))
        with pytest.raises(InputError, match=r"ray://here:10001 is for Ray's client.*HOST:6379"):
            ask(RayOptions(address="ray://here:10001"))


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (
            replace(FACTS, versions=(("msgspec", "0.0"), ("ray", "0.1"))),
            r"host has ray 0\.1, this one",
        ),
        (replace(FACTS, fault="3 devices are wanted"), "machine host: 3 devices are wanted"),
    ],
)
def test_a_machine_that_cannot_take_part_is_named(facts: MachineFacts, told: str) -> None:
    pytest.importorskip("ray")
    check_facts([FACTS, replace(FACTS, versions=installed_versions())])
    with pytest.raises(InputError, match=told):
        check_facts([FACTS, facts])


def test_without_ray_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samullm_ray.cluster.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'samullm-plugin\[ray\]'"):
        connect(RayOptions())


@pytest.mark.parametrize("answers", [True, False])
def test_a_head_that_does_not_answer_is_asked_for_no_agent(
    monkeypatch: pytest.MonkeyPatch, *, answers: bool
) -> None:
    """Ray would end this process a minute later, whatever it does then."""
    monkeypatch.setattr("samullm_ray.actors._JOIN_AGAIN_S", 0.01)
    started: list[int] = []
    executor = RayExecutor(RayOptions())
    tries: list[bool] = []

    def asked() -> bool:
        tries.append(answers)
        if len(tries) == 2:
            executor._left.set()
        return answers

    head = SimpleNamespace(gone=False, answers=asked, address="here")
    executor._head = cast("Any", head)
    executor._actors = cast("Any", SimpleNamespace(start=started.append))
    lost = machine(Wire())
    lost.give_up("it is silent")
    executor._note_lost(lost)
    for thread in threading.enumerate():
        if thread.name == "greeting":
            thread.join(30.0)
    assert len(tries) == 2, "an agent that does not come up is not asked for again"
    assert started == ([0] if answers else [])


class Pauses(threading.Event):
    """Is over at once whenever somebody waits for it, and keeps how long that would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        return self.is_set()


def test_a_machine_with_a_fault_is_asked_again_at_growing_pauses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with it may be mended meanwhile: a folder copied, devices let go of."""
    pytest.importorskip("ray")
    faults = ["other runs hold 0"] * 8 + ["no folder"] + [""]
    ended: list[Any] = []
    monkeypatch.setattr("samullm_ray.actors.end_agents", ended.extend)

    def agent(fault: str) -> Any:
        answered: Future[MachineFacts] = Future()
        answered.set_result(replace(FACTS, fault=fault))
        call = SimpleNamespace(future=lambda: answered)
        return SimpleNamespace(hello=SimpleNamespace(remote=lambda timeout_s: call))

    agents = [agent(fault) for fault in faults]
    waiting, joined = list(agents), list[Any]()

    def heard(agent: Any, facts: MachineFacts) -> None:
        check_facts([facts])
        joined.append(agent)

    pauses = Pauses()
    caplog.set_level("INFO")
    greet_later(lambda: waiting.pop(0), 1.0, heard, pauses)
    for thread in threading.enumerate():
        if thread.name == "greeting":
            thread.join(30.0)
    assert joined == agents[-1:]
    assert ended == agents[:-1], "an agent that cannot take part keeps its devices"
    assert pauses.asked == [5, 10, 20, 40, 80, 160, 320, 320, 320]
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 2, "the same fault is told more than once"
    assert (
        "does not join yet: executor ray: machine host: other runs hold 0; it is asked again in 5 s"
        in told[0]
    )
    assert "no folder" in told[1]


def test_nothing_is_asked_of_ray_once_the_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start a cluster."""
    ended: list[Any] = []
    monkeypatch.setattr("samullm_ray.actors.end_agents", ended.extend)
    left = threading.Event()

    def leave(timeout_s: float) -> None:
        left.set()
        raise ConnectionError("the cluster is left")

    agent = SimpleNamespace(hello=SimpleNamespace(remote=leave))
    greet_later(lambda: agent, 1.0, lambda agent, facts: None, left)
    for thread in threading.enumerate():
        if thread.name == "greeting":
            thread.join(30.0)
    assert left.is_set()
    assert not ended


def test_cores_are_the_same_devices_in_a_cluster_and_alone() -> None:
    alone = VllmExecutor.local_cluster()
    if alone is None or alone.gpus[0].name != "core":
        pytest.skip("needs vLLM and a machine without GPUs")
    memory = psutil.virtual_memory().total
    section = cluster_section([FoundMachine("here", None, alone.num_gpus, memory)])
    gib = round(alone.gpus[0].memory_bytes / 2**30, 2)
    assert section["gpus"] == [{"gpu": "core", "count": alone.num_gpus, "gpu_memory_gib": gib}]


def test_sleeping_is_refused_and_not_left_out() -> None:
    host = PluginHost.from_settings()
    with pytest.raises(InputError, match=r"sleep_mode.*cannot be put to sleep; leave it out"):
        host.create("executor", "ray", {"sleep_mode": True})


def test_several_machines_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine alone would wait for the others until join_timeout_s is over."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("samullm_ray.executor.check_installed", lambda name: None)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("a cluster is started"))
    core = Gpu("core", 1 << 30)
    with pytest.raises(InputError, match=r"has 2 machines, and without an address.*HOST:6379"):
        RayExecutor(RayOptions()).open(Cluster((core, core), (), ((0,), (1,))), None)


def test_another_service_at_the_address_is_told_at_once() -> None:
    """Such as the dashboard; Ray would go on trying for a quarter of an hour."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            there, _ = server.accept()
            with there:
                there.recv(100)
                there.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(InputError, match="what listens there is no head of a Ray cluster"):
            check_address(RayOptions(address=f"127.0.0.1:{port}"))
        thread.join(10.0)


@pytest.mark.parametrize(
    "told", ["Version mismatch: The cluster was started with:\n    Ray: 1.0", "Failed to connect"]
)
def test_a_head_that_lets_nobody_in(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**options: object) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("samullm_ray.cluster.check_address", lambda options: None)
    with pytest.raises(InputError) as raised:
        connect(RayOptions(address="here:6379"))
    said = str(raised.value)
    assert f"the head at here:6379 cannot be joined: {' '.join(told.split())}; every" in said
    assert "RAY_AUTH_MODE=token" in said
