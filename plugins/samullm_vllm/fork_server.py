"""A process that has imported vLLM once and forks engines.

Importing vLLM takes six seconds and more; on a CPU an engine's own start takes one. This process
touches no device and starts no thread, so that forking it is safe, and never builds an engine
itself. It ends, and its engines with it, when the coordinator does.

Run as ``python -m samullm_vllm.fork_server PLATFORM CONTROL``: ``cpu`` or ``cuda``, and the
descriptor of its end of a socket pair.
"""

from __future__ import annotations

import array
import gc
import os
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from samullm_vllm import engine
from samullm_vllm.channel import Channel
from samullm_vllm.processes import end_with_parent, ended_with_peer
from samullm_vllm.protocol import (
    LENGTH,
    Exited,
    Fault,
    Fork,
    Forked,
    Preloaded,
    decode,
    encode,
    frame_bytes,
)
from samullm_vllm.workdir import remove_temporary

NUM_DESCRIPTORS = 2


class ForkServer:
    """Forks engines on request.

    Args:
        control: to the coordinator.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._temporary: set[str] = set()
        self._children: dict[int, tuple[str, int]] = {}  # by pidfd: replica and process id

    def run(self) -> None:
        """Serve until the coordinator is gone."""
        while True:
            for selected, _ in self._selector.select():
                if selected.fileobj is self._control:
                    if not self._serve():
                        return
                elif isinstance(selected.fileobj, int):
                    self._reap(selected.fileobj)

    def end(self) -> None:
        """Kill every engine that is left, and remove what a killed coordinator left."""
        for _, pid in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in self._temporary:
            remove_temporary(folder)

    def _serve(self) -> bool:
        """Answer a message; return False if the coordinator is gone."""
        try:
            data, descriptors = _receive(self._control)
        except OSError:
            return False
        if data is None:
            return False
        message = decode(data)
        if isinstance(message, Fork):
            self._fork(message, descriptors)
        return True

    def _fork(self, message: Fork, descriptors: list[int]) -> None:
        channel, log = descriptors
        self._temporary.add(message.environment.get("TMPDIR", ""))
        pairs = [socket.socketpair() for _ in range(1, message.num_ranks)]
        pids = []
        for rank in range(message.num_ranks):
            pid = os.fork()
            if pid == 0:
                self._become(message, rank, channel, log, pairs)
            pids.append(pid)
            child = os.pidfd_open(pid)
            self._children[child] = (message.key, pid)
            self._selector.register(child, selectors.EVENT_READ)
        for sock in (s for pair in pairs for s in pair):
            sock.close()
        os.close(channel)
        os.close(log)
        self._control.sendall(encode(Forked(message.key, tuple(pids))))

    def _become(
        self,
        message: Fork,
        rank: int,
        channel: int,
        log: int,
        pairs: list[tuple[socket.socket, socket.socket]],
    ) -> NoReturn:
        """Be an engine's rank, in the forked process."""
        status = 1
        try:
            end_with_parent(self._pid)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            self._control.close()
            self._selector.close()
            for child in self._children:
                os.close(child)
            os.environ.update(message.environment)
            tempfile.tempdir = None
            from samullm_vllm import worker

            if rank == 0:
                for _, other in pairs:
                    other.close()
                links = [Channel(own) for own, _ in pairs]
                status = worker.lead(Channel(socket.socket(fileno=channel)), links)
            else:
                os.close(channel)
                for i, (own, other) in enumerate(pairs, start=1):
                    own.close()
                    if i != rank:
                        other.close()
                status = worker.follow(Channel(pairs[rank - 1][1]), rank)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _reap(self, child: int) -> None:
        """Report that an engine process has ended."""
        key, pid = self._children.pop(child)
        self._selector.unregister(child)
        os.close(child)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            self._control.sendall(encode(Exited(key, pid, os.waitstatus_to_exitcode(status))))


def _receive(control: socket.socket) -> tuple[bytes | None, list[int]]:
    """Return a message's bytes and the descriptors that came with it, or None at the end."""
    data, descriptors = b"", []
    size = LENGTH.size
    while len(data) < size:
        part, ancillary, _, _ = control.recvmsg(
            size - len(data), socket.CMSG_SPACE(NUM_DESCRIPTORS * array.array("i").itemsize)
        )
        if not part:
            return None, []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                descriptors += numbers.tolist()
        data += part
        if size == LENGTH.size == len(data):
            size += frame_bytes(data)
    return data[LENGTH.size :], descriptors


def main(arguments: Sequence[str]) -> None:
    """Import vLLM, then fork engines until the coordinator is gone."""
    platform, number = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(number))
    try:
        with ended_with_peer(control):  # importing takes long
            engine.preload(platform)
    except Exception as error:  # an installation can be broken in any way
        traceback.print_exc()
        reason = f"vLLM cannot be imported: {engine.last_line(error)}"
        control.sendall(encode(Fault(reason, of_all=True)))
        sys.exit(1)
    if engine.cuda_in_use():
        reason = f"{engine.CUDA_BEGUN}; give the executor the option start_method=fresh"
        control.sendall(encode(Fault(reason, of_all=True)))
        sys.exit(1)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 and platform == "cpu":
        print(f"{threads} threads after importing vLLM: forked engines may hang", file=sys.stderr)  # noqa: T201  # this process's log
    gc.collect()
    gc.freeze()
    server = ForkServer(control)
    control.sendall(encode(Preloaded()))
    try:
        server.run()
    finally:
        server.end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take an interpreter with vLLM in it apart takes a second


if __name__ == "__main__":
    main(sys.argv[1:])
