"""Runs code that is not ours in a child process: a fault there costs a call, never the host.

This is fault isolation and not security: the child has the user's rights. Whatever the code prints
goes to stderr, whatever it changes stays in the child, and when its time is over its process group
is killed, with whatever it has started. Process pools of libraries do not serve here: their
children import the user's ``__main__`` again, write to the host's stdout, and are killed without
the processes that they started.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, ParamSpec, TypeVar

from samullm_plugin.errors import InputError, PluginError, SamullmError

P = ParamSpec("P")
R = TypeVar("R")

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from samullm_plugin.host.isolation import serve; serve()"
)

_BEGUN = "begun"
"""What the child says before it calls a function."""
_BEGIN_S = 60.0
"""A child may take so long to start and to import the host's modules: on a busy machine several
seconds, which are no fault of the code that it is to run."""


class FaultError(PluginError):
    """Raised in the child where the host's own checks find fault; its text follows the name."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call has no value.

    Attributes:
        kind: ``input`` (the code raised an ``InputError``: its message is for the user),
            ``raised`` (any other exception), ``timeout`` or ``died`` (the process ended).
        text: what happened, as the rest of a sentence that names the culprit; of ``input`` the
            message alone.
        trace: traceback in the child; empty if nothing was raised.
    """

    kind: Literal["input", "raised", "timeout", "died"]
    text: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call: a value, or why there is none."""

    value: Any = None
    failure: Failure | None = None


class IsolatedWorker:
    """A child process that runs functions one after the other.

    It is started at the first call, imports what it is given from the host's ``sys.path``, keeps
    its modules from call to call, and is started anew after a call that killed it. It ends with
    this object. Calls from several threads wait for one another; for parallel work take several
    workers.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._child: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def try_call(
        self, function: Callable[P, R], limit_s: float | None, *args: P.args, **kwargs: P.kwargs
    ) -> Answer:
        """Run a function in the child.

        Args:
            function: of a module that the child can import.
            limit_s: seconds from its first line until the child is killed; None: never.
            args: pickled on the way there, as the value is on the way back.
            kwargs: likewise.

        Raises:
            TypeError: if function or arguments cannot be pickled; also ``pickle.PicklingError``.
        """
        request = pickle.dumps((function, args, kwargs))
        with self._lock:
            child = self._child or self._start()
            answers: list[Any] = []
            begun = threading.Event()

            def exchange() -> None:
                with contextlib.suppress(OSError, EOFError, ValueError, pickle.UnpicklingError):
                    assert child.stdin is not None
                    assert child.stdout is not None
                    pickle.dump(request, child.stdin)
                    child.stdin.flush()
                    answer = pickle.load(child.stdout)
                    begun.set()
                    answers.append(pickle.load(child.stdout) if answer == _BEGUN else answer)
                begun.set()

            thread = threading.Thread(target=exchange, daemon=True)  # its end can be waited for
            thread.start()
            if limit_s is not None:
                begun.wait(limit_s + _BEGIN_S)
            thread.join(limit_s)
            if thread.is_alive():
                _kill(child)
                thread.join()  # the pipes are closed at their other end
                self._stop()
                text = f"did not answer within {limit_s:g} s and was ended"
                return Answer(failure=Failure("timeout", text))
            if answers and isinstance(answers[0], Answer):
                return answers[0]
            self._stop()
            text = f"ended its process (exit status {child.returncode})"
            return Answer(failure=Failure("died", text))

    def call(
        self,
        name: str,
        function: Callable[P, R],
        limit_s: float | None,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a function in the child and return its value.

        Args:
            name: the culprit of whatever goes wrong.
            function: of a module that the child can import.
            limit_s: seconds from its first line until the child is killed; None: never.
            args: of the function.
            kwargs: of the function.

        Raises:
            PluginError: if it raises, is too slow or dies; the message begins with the name.
            InputError: if the function raised one.
        """
        answer = self.try_call(function, limit_s, *args, **kwargs)
        if answer.failure is None:
            value: R = answer.value
            return value
        if answer.failure.kind == "input":
            raise InputError(answer.failure.text)
        raise PluginError(f"{name} {answer.failure.text}")

    def kill(self) -> None:
        """End the child now; a call of another thread that waits for it has died."""
        if (child := self._child) is not None:
            _kill(child)

    def close(self) -> None:
        """End the child; the next call starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._child, self._end = child, weakref.finalize(self, _end, child)
        return child

    def _stop(self) -> None:
        self._end()
        self._child = None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started, also if the child has ended by itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end(child: subprocess.Popen[bytes]) -> None:
    _kill(child)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not read by the other end
                pipe.close()


# --- in the child ---


def import_class(module: str, qualname: str) -> Any:
    """Return a class by the module and the name under which it was registered."""
    owner: Any = importlib.import_module(module)
    for part in qualname.split("."):
        owner = getattr(owner, part)
    return owner


def digest(value: object) -> bytes:
    """Return a hash by which a later change of a value shows."""
    return hashlib.blake2b(pickle.dumps(value)).digest()


def serve() -> None:
    """Read calls from stdin and write answers to what was stdout, until there are no more."""
    calls = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # code that reads stdin must not swallow calls
    os.dup2(2, 1)  # whatever it prints must not mix with the answers
    sys.stdout = sys.stderr
    while True:
        try:
            request = pickle.load(calls)
        except EOFError:
            return
        answer = _answer(request, answers)
        try:
            data = pickle.dumps(answer)
        except Exception as error:  # what foreign code returns may be anything
            data = pickle.dumps(Answer(failure=_failure(error)))
        answers.write(data)
        answers.flush()


def _answer(request: bytes, answers: BinaryIO) -> Answer:
    """Call a function, having said that it begins."""
    try:
        function, args, kwargs = pickle.loads(request)
        pickle.dump(_BEGUN, answers)
        answers.flush()
        return Answer(function(*args, **kwargs))
    except (Exception, SystemExit) as error:  # foreign code
        return Answer(failure=_failure(error))


def _failure(error: BaseException) -> Failure:
    trace = traceback.format_exc()
    if isinstance(error, InputError):
        return Failure("input", str(error), trace)
    text = " ".join(str(error).split())
    if isinstance(error, FaultError):
        return Failure("raised", text, trace)
    if isinstance(error, SamullmError):
        return Failure("raised", f"failed: {text}", trace)
    what = f"raised {type(error).__name__}"
    return Failure("raised", f"{what}: {text}" if text else what, trace)
