"""A third party's length estimator, asked in a child process that can be ended.

The child is started once and answers many calls: estimators are asked for every node and scenario.
It keeps nothing between calls, so that a call depends on its arguments alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samullm_plugin.errors import InputError, PluginError
from samullm_plugin.host.interfaces.length import LengthEstimator, LengthQuery
from samullm_plugin.host.registration import Registration
from samullm_plugin.model.length_observations import LengthObservations
from samullm_plugin.model.types import Ints
from samullm_plugin.planning.building import check_lengths
from samullm_plugin.planning.containment import ContainedCall, ContainedResult


class ContainedProcess:
    """A child process that answers calls one after the other until one of them goes wrong."""

    def __init__(self) -> None:
        """Start the child; it ends when this object does."""
        self.child = subprocess.Popen(
            [sys.executable, "-m", "samullm_plugin.planning.contained_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.end = weakref.finalize(self, _end, self.child)

    def ask(self, call: ContainedCall, limit_s: float) -> ContainedResult | None:
        """Return the child's answer; None if it has died.

        Raises:
            TimeoutError: if it does not answer in time; it has been ended.
        """
        answers: list[Any] = []

        def exchange() -> None:
            with contextlib.suppress(OSError, EOFError, ValueError, pickle.UnpicklingError):
                assert self.child.stdin is not None
                assert self.child.stdout is not None
                self.child.stdin.write(pickle.dumps(call))
                self.child.stdin.flush()
                answers.append(pickle.load(self.child.stdout))

        thread = threading.Thread(target=exchange, daemon=True)  # its end can be waited for
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            _kill(self.child)
            thread.join()  # the pipes are closed at their other end
            self.end()
            raise TimeoutError
        return answers[0] if answers and isinstance(answers[0], ContainedResult) else None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end(child: subprocess.Popen[bytes]) -> None:
    _kill(child)
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not read by the other end
                pipe.close()


class _Line:
    """A child process that is started again after it was ended, for one estimator and its fits."""

    def __init__(self) -> None:
        self._process: ContainedProcess | None = None
        self._lock = threading.Lock()

    def ask(self, name: str, call: ContainedCall, limit_s: float) -> Any:
        """Return the value of a call.

        Raises:
            PluginError: naming the plugin.
            InputError: if the plugin raised one.
        """
        with self._lock:
            process = self._process = self._process or ContainedProcess()
            try:
                result = process.ask(call, limit_s)
            except TimeoutError:
                self._process = None
                raise PluginError(
                    f"{name} did not answer within {limit_s:g} s and was ended"
                ) from None
            if result is None:
                process.end()
                self._process = None
                status = process.child.returncode
                raise PluginError(f"{name} ended its process (exit status {status})")
        if result.error_kind == "input":
            raise InputError(result.error)
        if result.error_kind:
            raise PluginError(f"{name} {result.error}")
        return result.value


class ContainedLengthEstimator(LengthEstimator):
    """Asks a third party's estimator in a child process, with a time limit, and checks its answers.

    What ``fit`` returns stays in the child's terms: it is kept as pickled bytes and never becomes
    an object of this process.
    """

    def __init__(
        self,
        registration: Registration,
        options: Mapping[str, object],
        limit_s: float,
        *,
        state: bytes | None = None,
        line: _Line | None = None,
    ) -> None:
        """Keep what calls need; nothing is started yet.

        Args:
            registration: the estimator.
            options: validated again by its ``Config`` in the child.
            limit_s: seconds until a call is ended.
            state: pickled estimator, if it was fitted.
            line: where calls go; a new child if None.
        """
        super().__init__()
        origin = registration.provenance
        self.name = origin.qualified_name  # type: ignore[misc]  # messages name the distribution
        self._label = f"{origin.kind} {origin.qualified_name}"
        self._registration, self._options, self._limit_s = registration, dict(options), limit_s
        self._state, self._line = state, line or _Line()

    def _ask(self, method: str, **arguments: Any) -> Any:
        cls = self._registration.value
        call = ContainedCall(
            "length",
            cls.__module__,
            cls.__qualname__,
            self._options,
            {"method": method, "state": self._state, "arguments": arguments},
        )
        return self._line.ask(f"{self._label}: {method}", call, self._limit_s)

    def fit(self, observations: Sequence[LengthObservations]) -> ContainedLengthEstimator:
        """Return the fitted estimator, contained as this one is.

        Raises:
            PluginError: if it raises, is too slow, changes what it was given, or returns something
                else than an estimator that can be pickled.
        """
        state = self._ask("fit", observations=list(observations))
        return ContainedLengthEstimator(
            self._registration, self._options, self._limit_s, state=state, line=self._line
        )

    def sample(self, query: LengthQuery, rng: np.random.Generator, num_scenarios: int) -> Ints:
        """Return checked samples; ``rng`` goes on as if it had been used here.

        Raises:
            PluginError: if it raises, is too slow, changes what it was given, or breaks a rule of
                the interface.
        """
        drawn, used = self._ask("sample", query=query, rng=rng, num_scenarios=num_scenarios)
        rng.bit_generator.state = used
        return check_lengths(drawn, query, num_scenarios, self.name)

    def source(self, model: str) -> str:
        """Return what the estimate of a model rests on, in the plugin's words."""
        return str(self._ask("source", model=model))
