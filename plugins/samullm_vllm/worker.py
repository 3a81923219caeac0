"""The engine process: take requests from the coordinator, step the engine, send what it finishes.

Started as ``python -m samullm_vllm.worker CHANNEL LIFELINE`` (two descriptors), or called in a
process that :mod:`samullm_vllm.fork_server` forked.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from samullm_plugin import EngineRequest, RequestOutput
from samullm_plugin.host.interfaces.backlog import Backlog
from samullm_vllm import engine as engines
from samullm_vllm import tracking
from samullm_vllm.channel import Channel, ChannelClosedError
from samullm_vllm.processes import end_with_parent
from samullm_vllm.protocol import (
    Asleep,
    Beat,
    Fault,
    Finished,
    Go,
    Message,
    Prepared,
    Ready,
    Sleep,
    Start,
    Stop,
    Stopped,
    Submit,
    Tick,
    Wake,
    encode,
)
from samullm_vllm.rank import Rank
from samullm_vllm.workdir import remove_temporary

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5.0

TOKENISED = 2
"""An engine has so many times the requests that it can run at once; others are not tokenised."""

TOGETHER = 16
"""Requests that are tokenised and given to the engine together."""

TOKENISE_S = 0.02
"""Seconds between two iterations of a busy engine in which requests may be tokenised."""

M = TypeVar("M", Start, Go)


class Leader:
    """The rank that talks to the coordinator and, if there are others, leads them.

    Args:
        channel: to the coordinator.
        links: to the other ranks.
    """

    def __init__(self, channel: Channel, links: Sequence[Channel] = ()) -> None:
        self._channel = channel
        self._links = links
        self._early: list[Message] = []
        self._beaten_s = 0.0
        self._backlog: Backlog[EngineRequest] = Backlog()
        self._prioritised = False  # whether any request ever had a priority

    def run(self) -> None:
        """Be an engine until told to stop, or until the coordinator is gone."""
        start = self._expect(Start)
        bringup = engines.Bringup(start, 0)
        if start.machine > 0:
            bringup.use_devices(self._expect(Go))
            bringup.help_leader()
            raise RuntimeError("the ranks of this machine have ended")
        self._lead(start)
        if start.ahead:
            with self._modelled(start, start.prepare_s):
                bringup.prepare()
            self._channel.send(Prepared())
            self._channel.flush_all(LAST_WORDS_S)
        go = self._expect(Go)
        self._lead(go)
        bringup.use_devices(go)
        rest_s = start.load_s if start.ahead else start.prepare_s + start.load_s
        with self._modelled(start, rest_s):
            rank = Rank(start, bringup.finish())
        from vllm import __version__

        tokens = engines.kv_cache_tokens(rank.engine)
        self._channel.send(Ready(tokens, __version__, bringup.parts))
        self._beaten_s = time.monotonic()
        while self._round(rank):
            pass

    @staticmethod
    @contextmanager
    def _modelled(start: Start, seconds: float) -> Iterator[None]:
        """Take so many modelled seconds, if an engine only takes the time of what it does."""
        due_s = time.monotonic() + seconds * start.time_scale
        yield
        if start.latency is not None:
            time.sleep(max(0.0, due_s - time.monotonic()))

    def _expect(self, kind: type[M]) -> M:
        """Return the next message, which must be of a kind."""
        while not self._early:
            self._early += self._channel.receive(None)
        message = self._early.pop(0)
        if not isinstance(message, kind):
            raise ChannelClosedError(f"expected a {kind.__name__}, got {message}")
        return message

    def _lead(self, message: Message) -> None:
        if self._links:
            frame = encode(message)
            for link in self._links:
                link.send_bytes(frame)
                link.flush_all(60.0)

    def _round(self, rank: Rank) -> bool:
        """Take messages, run a step; return whether to go on."""
        from samullm_vllm import recording

        beat_s = rank.start.beat_s
        messages, self._early = self._early, []
        working = rank.busy or messages or self._backlog
        messages += self._channel.receive(0.0 if working else beat_s)
        for message in messages:
            recording.interrupted()
            if isinstance(message, Stop):
                self._end(rank)
                return False
            if isinstance(message, Submit):
                self._keep(message.requests)
                continue
            self._lead(message)
            self._report(rank.apply(message))
            if isinstance(message, Sleep):
                self._channel.send(Asleep())
            elif isinstance(message, Wake):
                tokens = engines.kv_cache_tokens(rank.engine)
                self._channel.send(Ready(tokens, ""))
        if self._backlog:
            self._admit(rank)
        outputs: list[RequestOutput] = []
        if rank.busy:
            self._lead(Tick(step=True))
            outputs = rank.step()
        # What is reported when nothing is left to do is complete: iterations come before outputs.
        if time.monotonic() - self._beaten_s >= beat_s or (
            outputs and not rank.busy and not self._backlog
        ):
            self._beat(rank)
            self._beaten_s = time.monotonic()
        self._report(outputs)
        self._channel.flush()
        return True

    def _keep(self, requests: Sequence[EngineRequest]) -> None:
        """Keep requests until the engine has room for them: the lower priority number first."""
        for request in requests:
            self._backlog.add(request.priority, request)
            self._prioritised |= request.priority != 0

    def _admit(self, rank: Rank) -> None:
        """Give the engine requests it can soon use.

        Prompts are tokenised a few at a time, so that the engine computes the first ones while the
        rest waits. Modelled prompts are not tokenised: as many as there is room for are given at
        once. A request that is to be served before one that the engine has is given to it in any
        case.
        """
        from samullm_vllm import recording

        limit = TOKENISED * int(rank.start.engine_args.get("max_num_seqs") or 256)
        until_s = time.monotonic() + (TOKENISE_S if rank.start.latency is None else float("inf"))
        while self._backlog:
            room = limit - len(rank.tracked)
            if room <= 0:
                if not self._prioritised:
                    break
                last = max(t.request.priority for t in rank.tracked.values())
                if self._backlog.first() >= last:
                    break
                room = 1
            recording.interrupted()
            count = min(TOGETHER, len(self._backlog), room)
            batch = Submit(tuple(self._backlog.take()[1] for _ in range(count)))
            self._lead(batch)
            self._report(rank.add(batch.requests))
            if rank.busy and time.monotonic() > until_s:
                break

    def _report(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._channel.send(Finished(tuple(outputs)))

    def _beat(self, rank: Rank) -> None:
        import numpy as np

        from samullm_vllm import recording

        requests, counts, tokens = tracking.new_tokens(rank.engine, rank.tracked)
        rows = np.asarray(recording.take_rows(), dtype=np.float64)
        lag_s = 0.0
        if rank.start.latency is not None:
            from samullm_vllm.emulation import total_lag_s

            lag_s = total_lag_s()
        self._channel.send(Beat(tuple(requests), tuple(counts), tokens, rows.tobytes(), lag_s))

    def _end(self, rank: Rank) -> None:
        """Report what is unfinished."""
        self._beat(rank)
        unfinished = tracking.unfinished_outputs(rank.engine, rank.tracked)
        self._channel.send(Stopped(tuple(unfinished)))
        self._channel.flush_all(LAST_WORDS_S)
        for link in self._links:
            link.close()


def lead(channel: Channel, links: Sequence[Channel] = ()) -> int:
    """Run the first or only rank; return the exit status."""
    # A worker that vLLM forks from this process must not hold the channel open when this one ends.
    os.register_at_fork(after_in_child=channel.close)
    try:
        Leader(channel, links).run()
    except ChannelClosedError:
        return 0  # the coordinator is gone, and nobody wants results
    except Exception as error:  # whatever it is, the coordinator must hear of it
        return _give_up(channel, Fault(engines.last_line(error)))
    return 0


def _give_up(channel: Channel, fault: Fault) -> int:
    """Print the error that is being handled, tell the coordinator and return the exit status."""
    traceback.print_exc()
    try:
        channel.send(fault)
        channel.flush_all(LAST_WORDS_S)
    except ChannelClosedError:
        pass
    return 1


def follow(link: Channel, rank_index: int) -> int:
    """Run another rank: do as the first rank does; return the exit status."""
    rank: Rank | None = None
    start: Start | None = None
    bringup: engines.Bringup | None = None
    try:
        while True:
            for message in link.receive(None):
                if isinstance(message, Start):
                    start, bringup = message, engines.Bringup(message, rank_index)
                    if start.ahead:
                        bringup.prepare()
                elif isinstance(message, Go) and start is not None and bringup is not None:
                    bringup.use_devices(message)
                    rank = Rank(start, bringup.finish())
                elif rank is None:
                    raise ChannelClosedError(f"{message} before the start")
                elif isinstance(message, Tick):
                    rank.step()
                else:
                    rank.apply(message)
    except ChannelClosedError:
        return 0
    except Exception:  # into the log; the first rank is ended with this one
        traceback.print_exc()
        return 1


def _end_with(lifeline: int) -> None:
    """End this process's whole group when the coordinator's end of the pipe closes."""

    def watch() -> None:
        os.read(lifeline, 1)
        remove_temporary(os.environ.get("TMPDIR", ""))
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Run an engine over the descriptors given: its channel and the coordinator's lifeline."""
    number, lifeline = (int(a) for a in arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(os.getppid(), cleaning_up=True)
    _end_with(lifeline)
    channel = Channel(socket.socket(fileno=number))
    try:
        engines.import_vllm()
    except Exception as error:  # an installation can be broken in any way
        reason = f"vLLM cannot be imported: {engines.last_line(error)}"
        return _give_up(channel, Fault(reason, of_all=True))
    status = lead(channel)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)  # without vLLM's own clearing up, which can take seconds
