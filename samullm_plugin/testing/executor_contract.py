"""The contract of executors.

Subclass it in a test module and say which engine to start and what to ask it; every rule becomes a
test::

    class TestMine(ExecutorContract):
        executor_class = MyExecutor
        cluster = Cluster.uniform(Gpu("cpu", 2**33), 2)
        model = ModelSpec("tiny", 512, path="/models/tiny")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import ClassVar

from samullm_plugin.host.interfaces.executor import (
    EngineEvent,
    EngineRequest,
    EngineSpec,
    Executor,
    RequestOutput,
)
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Cluster, Gpu
from samullm_plugin.testing.factories import TestNode, make_problem
from samullm_plugin.testing.rules import require


class ExecutorContract:
    """Rules every executor keeps.

    Attributes:
        executor_class: the class under test.
        options: its options.
        cluster: devices it can use on this machine, at least two.
        model: a model it can start.
        kv_cache_tokens: capacity to ask for.
        limit_s: longest wait for anything, on the wall clock.
    """

    executor_class: ClassVar[type[Executor]]
    options: ClassVar[dict[str, object]] = {}
    cluster: ClassVar[Cluster] = Cluster.uniform(Gpu("test-gpu", 80 * 2**30), 2)
    model: ClassVar[ModelSpec] = ModelSpec("model-node", 4096)
    kv_cache_tokens: ClassVar[int] = 8192
    limit_s: ClassVar[float] = 60.0

    @contextmanager
    def opened(self) -> Iterator[Executor]:
        """Open a new executor that imitates the contract's own small problem, and close it."""
        executor = self.executor_class(self.executor_class.Config.model_validate(self.options))
        node = TestNode("node", [8] * 12, [3 + i for i in range(12)], load_s=1.0, step_s=0.01)
        self._costs = next(iter(node.costs().values()))
        executor.imitate(make_problem([node], 2))
        executor.open(self.cluster, None)
        try:
            yield executor
        finally:
            executor.close()

    def spec(self, key: str = "engine.0", device: int = 0) -> EngineSpec:
        """Return a replica on one device."""
        return EngineSpec(
            key, 0, self.model, (device,), 1, 1, self.kv_cache_tokens, costs=self._costs
        )

    def request(self, index: int) -> EngineRequest:
        """Return a request that generates exactly ``3 + index`` tokens."""
        return EngineRequest(
            index,
            tuple(range(1, 9)),
            8,
            3 + index,
            sampling={"ignore_eos": True, "temperature": 0.0},
            output_tokens=3 + index,
        )

    def gather(self, executor: Executor, count: int) -> list[EngineEvent]:
        """Poll until ``count`` outputs have been reported, or nothing more comes."""
        events: list[EngineEvent] = []
        deadline = monotonic() + self.limit_s
        while sum(len(e.outputs) for e in events) < count and monotonic() < deadline:
            events += executor.poll(0.5)
            if any(e.kind == "failed" for e in events):
                break
        return events

    def check_outputs(self, outputs: list[RequestOutput], expected: set[int]) -> None:
        """Check that every request was reported once, with its own tokens."""
        seen = [o.request for o in outputs]
        lost = expected - set(seen)
        require(not lost, "nothing-lost", f"requests {sorted(lost)} were never reported")
        doubled = sorted({r for r in seen if seen.count(r) > 1})
        require(not doubled, "nothing-doubled", f"requests {doubled} were reported twice")
        foreign = set(seen) - expected
        require(not foreign, "nothing-invented", f"requests {sorted(foreign)} were not submitted")
        for output in outputs:
            wrong = output.finish_reason == "length" and output.num_tokens != 3 + output.request
            require(
                not wrong,
                "own-tokens",
                f"request {output.request} has {output.num_tokens} tokens, not its own",
            )
            if output.token_ids is not None:
                same = len(output.token_ids) == output.num_tokens
                require(same, "own-tokens", f"request {output.request}: token count differs")

    def test_everything_is_reported_once(self) -> None:
        """Every submitted request finishes exactly once, with its own number of tokens."""
        with self.opened() as executor:
            executor.start_engine(self.spec())
            executor.submit("engine.0", [self.request(i) for i in range(6)])
            events = self.gather(executor, 6)
            executor.submit("engine.0", [self.request(i) for i in range(6, 10)])
            events += self.gather(executor, 4)
            failed = [e.reason for e in events if e.kind == "failed"]
            require(not failed, "starts", f"the engine failed: {failed}")
            ready = [i for i, e in enumerate(events) if e.kind == "ready"]
            require(len(ready) == 1, "ready-once", f"{len(ready)} ready events")
            first = next((i for i, e in enumerate(events) if e.kind == "finished"), len(events))
            require(ready[0] <= first, "ready-first", "outputs came before the ready event")
            times = [e.time_s for e in events]
            require(times == sorted(times), "monotone-clock", f"event times fall: {times}")
            self.check_outputs([o for e in events for o in e.outputs], set(range(10)))
            require(
                not executor.stop_engine("engine.0"), "nothing-doubled", "stop reports finished"
            )

    def test_stop_reports_the_rest(self) -> None:
        """What had not finished when the engine stopped is reported by the stop, and only there."""
        with self.opened() as executor:
            executor.start_engine(self.spec())
            executor.submit("engine.0", [self.request(i) for i in range(8)])
            events = self.gather(executor, 1)
            rest = list(executor.stop_engine("engine.0"))
            late = executor.poll(0.0)
            done = [o for e in (*events, *late) for o in e.outputs]
            for output in rest:
                cut = output.finish_reason is None
                require(cut, "unfinished", f"request {output.request} is said to be finished")
                fewer = output.num_tokens < 3 + output.request
                require(fewer, "unfinished", f"request {output.request} has all its tokens")
            self.check_outputs([*done, *rest], set(range(8)))

    def test_engines_are_told_apart(self) -> None:
        """Outputs of several engines carry their own keys."""
        with self.opened() as executor:
            executor.start_engine(self.spec("a.0", 0))
            executor.start_engine(self.spec("b.0", 1))
            executor.submit("a.0", [self.request(i) for i in (0, 1, 2)])
            executor.submit("b.0", [self.request(i) for i in (3, 4, 5)])
            events = self.gather(executor, 6)
            for key, expected in (("a.0", {0, 1, 2}), ("b.0", {3, 4, 5})):
                outputs = [o for e in events if e.key == key for o in e.outputs]
                self.check_outputs(outputs, expected)

    def test_an_engine_goes_on_for_another_node(self) -> None:
        """An idle engine that is passed on serves at once, under its new key alone."""
        with self.opened() as executor:
            if not executor.can_pass_on:
                return
            executor.start_engine(self.spec())
            executor.submit("engine.0", [self.request(i) for i in (0, 1)])
            self.check_outputs([o for e in self.gather(executor, 2) for o in e.outputs], {0, 1})
            executor.pass_on_engine("engine.0", self.spec("other.0"))
            executor.submit("other.0", [self.request(i) for i in (2, 3, 4)])
            events = self.gather(executor, 3)
            require(
                {(e.key, e.kind) for e in events} == {("other.0", "finished")},
                "passed-on",
                f"an engine that was passed on reports {[(e.key, e.kind) for e in events]}",
            )
            self.check_outputs([o for e in events for o in e.outputs], {2, 3, 4})
            require(not executor.stop_engine("other.0"), "nothing-doubled", "stop reports finished")

    def test_an_engine_sleeps_and_wakes(self) -> None:
        """Another has its device meanwhile; it wakes under its new key alone."""
        with self.opened() as executor:
            if not executor.can_sleep:
                return
            executor.start_engine(self.spec())
            executor.submit("engine.0", [self.request(i) for i in (0, 1)])
            self.check_outputs([o for e in self.gather(executor, 2) for o in e.outputs], {0, 1})
            require(executor.sleep_engine("engine.0"), "sleeps", "an idle engine does not sleep")
            executor.start_engine(replace(self.spec("beside.0"), after=("engine.0",)))
            executor.submit("beside.0", [self.request(2)])
            self.check_outputs([o for e in self.gather(executor, 1) for o in e.outputs], {2})
            executor.stop_engine("beside.0")
            executor.wake_engine("engine.0", self.spec("other.0"))
            executor.submit("other.0", [self.request(i) for i in (3, 4)])
            events = self.gather(executor, 2)
            heard = {(e.key, e.kind) for e in events}
            wanted = {("other.0", "ready"), ("other.0", "finished")}
            require(heard == wanted, "sleeps", f"an engine that wakes reports {heard}")
            self.check_outputs([o for e in events for o in e.outputs], {3, 4})
            require(not executor.stop_engine("other.0"), "nothing-doubled", "stop reports finished")

    def test_close_twice(self) -> None:
        """Closing is safe at any time and twice."""
        with self.opened() as executor:
            executor.start_engine(self.spec())
            executor.close()
