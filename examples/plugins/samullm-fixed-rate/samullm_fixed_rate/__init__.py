"""Engines on a virtual clock that serve one request at a time."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from samullm_plugin import (
    Cluster,
    EngineEvent,
    EngineRequest,
    EngineSpec,
    Executor,
    RequestOutput,
    hookimpl,
)

samullm_interface = 1


class Options(BaseModel):
    """Options of the executor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_s: float = Field(default=1.0, ge=0, description="Virtual seconds of an engine start.")
    token_s: float = Field(default=0.01, gt=0, description="Virtual seconds per output token.")


class FixedRate(Executor):
    """Engines on a virtual clock that serve one request after the other at a fixed rate."""

    name = "fixed-rate"
    Config = Options
    virtual_clock = True

    def open(self, cluster: Cluster, run_dir: Path | None) -> None:
        """Start the clock."""
        self._now_s = 0.0
        self._ready_s: dict[str, float] = {}
        self._announced: set[str] = set()
        self._queues: dict[str, deque[EngineRequest]] = {}
        self._begun_s: dict[str, float] = {}

    def now_s(self) -> float:
        """Return the virtual time."""
        return self._now_s

    def start_engine(self, spec: EngineSpec) -> None:
        """Note when the engine will be ready."""
        self._ready_s[spec.key] = self._now_s + self.config.start_s
        self._queues[spec.key] = deque()

    def submit(self, key: str, requests: Sequence[EngineRequest]) -> None:
        """Queue requests."""
        if not self._queues[key]:
            self._begun_s[key] = max(self._now_s, self._ready_s[key])
        self._queues[key].extend(requests)

    def poll(self, timeout_s: float) -> Sequence[EngineEvent]:
        """Move the clock to the next event and return it."""
        times = [(t, k, "ready") for k, t in self._ready_s.items() if k not in self._announced]
        times += [(self._done_s(k), k, "finished") for k, q in self._queues.items() if q]
        if not times:
            self._now_s += timeout_s
            return []
        time_s, key, kind = min(times, key=lambda t: (t[0], t[2] != "ready"))
        self._now_s = max(self._now_s, time_s)
        if kind == "ready":
            self._announced.add(key)
            return [EngineEvent(key, "ready", self._now_s)]
        request = self._queues[key].popleft()
        self._begun_s[key] = self._now_s
        tokens = self._tokens(request)
        reason = "length" if tokens == request.max_tokens else "stop"
        output = RequestOutput(request.request, tokens, finish_reason=reason)
        return [EngineEvent(key, "finished", self._now_s, (output,))]

    def stop_engine(self, key: str) -> Sequence[RequestOutput]:
        """Return what is unfinished; the first request keeps the tokens it has."""
        rest = []
        for place, request in enumerate(self._queues.pop(key)):
            done = 0
            if place == 0 and self._now_s > self._begun_s[key]:
                done = int((self._now_s - self._begun_s[key]) / self.config.token_s)
            tokens = min(done, self._tokens(request) - 1)
            rest.append(RequestOutput(request.request, tokens))
        del self._ready_s[key]
        self._announced.discard(key)
        return rest

    def close(self) -> None:
        """Forget everything."""
        self._queues, self._ready_s = {}, {}

    def _tokens(self, request: EngineRequest) -> int:
        return request.max_tokens if request.output_tokens is None else request.output_tokens

    def _done_s(self, key: str) -> float:
        tokens = self._tokens(self._queues[key][0])
        return max(self._begun_s[key], self._ready_s[key]) + tokens * self.config.token_s


@hookimpl
def register_executors(register):
    """Offer the executor."""
    register(FixedRate)
