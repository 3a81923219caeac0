"""Commands and news over calls that are lost, repeated and overtake one another, without Ray."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samullm_ray.cluster import connect
from samullm_ray.describe import FoundMachine, cluster_section
from samullm_ray.executor import RayExecutor
from samullm_ray.launcher import RemoteLauncher
from samullm_ray.link import Batch, Incoming, Outgoing
from samullm_ray.machine import Machine
from samullm_ray.messages import Command, Kill, Killed, Launch, MachineFacts, News, Reply
from samullm_ray.options import RayOptions
from samullm_vllm.vllm_executor import VllmExecutor

from samullm_plugin import InputError

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
        self.calls: list[tuple[Future[Reply], Batch[Command] | int]] = []
        self.fenced = False
        self.kills_succeed = True

    def command(self, batch: Batch[Command]) -> Future[Reply]:
        return self._call(batch)

    def poll(self, acknowledged: int, timeout_s: float, linger_s: float) -> Future[Reply]:
        return self._call(acknowledged)

    def _call(self, what: Batch[Command] | int) -> Future[Reply]:
        future: Future[Reply] = Future()
        self.calls.append((future, what))
        return future

    def final(self, error: BaseException) -> str | None:
        return "it has died" if isinstance(error, Gone) else None

    def fence(self) -> None:
        self.fenced = True

    def serve(self, number: int, *, arrives: bool = True, answers: bool = True) -> None:
        """Let a call through, or lose it or its answer."""
        future, what = self.calls.pop(number % len(self.calls))
        if arrives:
            if isinstance(what, Batch):
                for command in self.commands.take(what):
                    self.carried_out.append(command)
                    if isinstance(command, Kill):
                        self.news.add(Killed(command.key, b"", gone=self.kills_succeed))
                batch: Batch[News] = Batch(0, ())
            else:
                self.news.acknowledge(what)
                batch = self.news.batch()
            if answers:
                future.set_result(Reply(self.incarnation, self.commands.received, batch))
                return
        future.set_exception(Unreachable())


class QuickWire(Wire):
    """An agent that answers at once, and polls when it has something to say."""

    def _call(self, what: Batch[Command] | int) -> Future[Reply]:
        future = super()._call(what)
        for number, (_, asked) in enumerate(self.calls):
            if isinstance(asked, Batch):
                self.serve(number)
        if self.calls and self.news:
            self.serve(0)
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
    for now, (number, arrives, answers) in enumerate(steps):
        if number < 4:
            there.tell(Kill(str(told)))
            told += 1
        elif wire.calls:
            wire.serve(number, arrives=arrives, answers=answers)
        for news in there.update(now * 0.01):
            assert news.key == str(heard)
            heard += 1
    for now in range(20):  # nothing is lost any more
        for _ in range(len(wire.calls)):
            wire.serve(0)
        heard += len(there.update(1.0 + now * 0.2))
    assert [c.key for c in wire.carried_out] == [str(i) for i in range(told)]
    assert heard == told
    assert not there.lost


def test_a_silent_machine_is_given_up_and_fenced() -> None:
    wire = Wire()
    there = machine(wire)
    there.update(0.0)
    for tick in range(1, 200):
        there.update(tick * 0.2)
    assert "nothing was heard of it for 20 s" in there.lost
    assert wire.fenced
    there.tell(Kill("late"))
    for _ in range(len(wire.calls)):
        wire.serve(0)
    assert there.update(100.0) == []  # word of a machine that was given up is dropped


def test_a_busy_coordinator_is_no_silence() -> None:
    there = machine(Wire())
    for hour in range(10):
        there.update(hour * 3600.0)
    assert not there.lost


def test_death_ends_it_at_once() -> None:
    wire = Wire()
    there = machine(wire)
    wire.calls.pop()[0].set_exception(Gone())
    there.update(0.0)
    assert there.lost == "machine host is lost: it has died"


def test_an_agent_that_took_its_place_is_not_believed() -> None:
    wire = Wire()
    there = machine(wire)
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


def test_an_address_at_which_nobody_listens_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray would go on trying for minutes."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray is asked to join"))
    with pytest.raises(InputError, match=r"no cluster at 127\.0\.0\.1:1: .*ray start"):
        connect(RayOptions(address="127.0.0.1:1"))


@pytest.mark.parametrize("answers", [True, False])
def test_a_head_that_does_not_answer_is_asked_for_no_agent(*, answers: bool) -> None:
    """Ray would end this process a minute later, whatever it does then."""
    started: list[int] = []
    executor = RayExecutor(RayOptions())
    head = SimpleNamespace(gone=False, answers=lambda: answers, address="here")
    executor._head = cast("Any", head)
    executor._actors = cast("Any", SimpleNamespace(start=started.append))
    lost = machine(Wire())
    lost.give_up("it is silent")
    executor._note_lost(lost)
    for thread in threading.enumerate():
        if thread.name == "greeting":
            thread.join(30.0)
    assert started == ([0] if answers else [])


def test_cores_are_the_same_devices_in_a_cluster_and_alone() -> None:
    alone = VllmExecutor.local_cluster()
    if alone is None or alone.gpus[0].name != "core":
        pytest.skip("needs vLLM and a machine without GPUs")
    memory = psutil.virtual_memory().total
    section = cluster_section([FoundMachine("here", None, alone.num_gpus, memory)])
    gib = round(alone.gpus[0].memory_bytes / 2**30, 2)
    assert section["gpus"] == [{"gpu": "core", "count": alone.num_gpus, "gpu_memory_gib": gib}]
