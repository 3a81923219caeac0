"""Joining a Ray cluster, and noticing that its head is gone."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from importlib.util import find_spec

from samullm_plugin import InputError, MissingExtraError
from samullm_ray.options import RayOptions

NAMESPACE = "samullm"

_LISTENER_S = 10.0
_PORTS = 1 << 16
_FRAME_BYTES, _SETTINGS = 9, b"\x04"
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
"""How both sides of HTTP/2 begin (RFC 9113, 3.4 and 4.1): a frame's fourth byte is its type."""


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        InputError: saying how to install it.
    """
    if find_spec("ray") is None:
        raise MissingExtraError("executor ray", "ray", "ray")


def joined() -> bool:
    """Return whether this process belongs to a cluster already."""
    require_ray()
    import ray

    return bool(ray.is_initialized())


def connect(options: RayOptions) -> bool:
    """Join the cluster, or start one of this machine alone.

    Returns:
        Whether the connection was made here and is to be ended here.

    Raises:
        InputError: if there is no Ray or no cluster at the address.
    """
    if joined():
        import ray

        here = ray.get_runtime_context().gcs_address
        if options.address not in (None, "auto", here):
            raise InputError(
                f"executor ray: this process belongs to the cluster at {here} already; ask for "
                f"that one, or leave it before joining {options.address}"
            )
        return False
    check_address(options)
    import ray

    try:
        ray.init(
            address=options.address or "local",
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
            include_dashboard=None if options.address else False,
        )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if options.address is None or ":" not in options.address:
            raise _no_cluster(options, error) from error
        raise InputError(
            f"executor ray: the head at {options.address} cannot be joined: {_in_one_line(error)}; "
            "every machine needs the same Ray and Python, and RAY_AUTH_MODE=token in the "
            "environment if `ray start` said that token authentication is enabled"
        ) from error
    return True


def check_address(options: RayOptions) -> None:
    """See that a head listens at ``HOST:PORT``; Ray would go on trying for minutes.

    Raises:
        InputError: if none does, or it is no such address.
    """
    if options.address in (None, "auto", "local"):
        return
    host, _, port = options.address.rpartition(":")
    if "://" in host:
        raise InputError(
            f"executor ray: {options.address} is for Ray's client, which is not enough here: run "
            "on a machine of the cluster, and name the head as HOST:6379 or `auto`"
        )
    try:
        if not (host and port.isdecimal() and int(port) < _PORTS):
            raise ValueError("that is no HOST:PORT")
        _require_head(options.address)
    except (OSError, ValueError) as error:
        raise _no_cluster(options, error) from error


def _require_head(address: str) -> None:
    """See that what listens at ``HOST:PORT`` speaks HTTP/2, as gRPC and so Ray's head do.

    Raises:
        OSError: if nobody listens there, or somebody else.
    """
    with _connection(address, _LISTENER_S) as there:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        there.sendall(_HTTP2)
        if there.recv(_FRAME_BYTES)[3:4] != _SETTINGS:
            raise ConnectionError("what listens there is no head of a Ray cluster")


def _no_cluster(options: RayOptions, error: Exception) -> InputError:
    where = options.address or "this machine"
    return InputError(
        f"executor ray: no cluster at {where}: {_in_one_line(error)}; start one with "
        "`ray start --head` and name its address with --executor-option address=HOST:6379, or "
        "leave the address out to use this machine alone"
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _reach(address: str, limit_s: float) -> None:
    """Connect to ``HOST:PORT`` once.

    Raises:
        OSError: if nobody listens there.
    """
    _connection(address, limit_s).close()


def _connection(address: str, limit_s: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), limit_s)


class HeadWatch:
    """Notices that the head of the cluster (its GCS) is gone.

    Agents go on without it, but Ray ends a process that has not reached it for a minute, without
    a word to that process.

    Args:
        limit_s: silence after which it is gone.
    """

    def __init__(self, limit_s: float) -> None:
        import ray

        self.address: str = ray.get_runtime_context().gcs_address
        self._limit_s = limit_s
        self._heard_s = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="head-watch").start()

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            self.answers()

    def answers(self) -> bool:
        """Return whether it answers now."""
        with suppress(OSError):
            _reach(self.address, 2.0)
            self._heard_s = time.monotonic()
            return True
        return False

    @property
    def gone(self) -> bool:
        """Return whether the head has been silent for too long."""
        return time.monotonic() - self._heard_s > self._limit_s

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()


def device_resource(options: RayOptions) -> str:
    """Return the Ray resource that counts devices: GPUs where there are any."""
    import ray

    if options.resource is not None:
        return options.resource
    if options.platform == "cpu" or not ray.cluster_resources().get("GPU"):
        return "CPU"
    return "GPU"
