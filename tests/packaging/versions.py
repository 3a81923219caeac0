"""Test against the lower bounds of ``pyproject.toml``, and against the newest packages.

Run by ``make test-versions``, which has uv in the environment it runs in::

    python tests/packaging/versions.py [--keep FOLDER] [PYTEST ARGUMENT ...]

Every case is a Python at hand with the lowest or the newest direct requirements: the oldest Python
with both, each later one with the newest. The newest ones are also checked by mypy. vLLM is left
out, and so are the tests that make environments of their own or read the documentation aloud. A
Python that this machine lacks is skipped with a line that says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CASES = (
    ("3.11", "lowest-direct"),
    ("3.11", "highest"),
    ("3.12", "highest"),
    ("3.13", "highest"),
)
TESTS = ("-m", "not vllm and not slow", "--ignore=tests/packaging", "--ignore=tests/docs")


def find_python(version: str) -> str | None:
    """Return an interpreter of a version: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [p for p in (shutil.which(f"python{version}"),) if p]
    found += [str(p / "bin" / "python") for p in sorted(pyenv.glob(f"{version}.*"), reverse=True)]
    for python in found:
        code = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    return None


def test_case(
    folder: Path, python: str, resolution: str, arguments: Sequence[str], *, types: bool
) -> bool:
    """Make an environment, install into it, and return whether the tests pass in it."""
    uv = [sys.executable, "-m", "uv"]
    inside = str(folder / "bin" / "python")
    commands = [
        [*uv, "venv", "--quiet", "--python", python, str(folder)],
        [
            *uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            inside,
            "--resolution",
            resolution,
            "--editable",
            ".[test]",
        ],
    ]
    if types:
        commands.append([inside, "-m", "mypy", "--cache-dir", str(folder / "mypy")])
    commands.append([inside, "-m", "pytest", "-q", *TESTS, *arguments])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "CI"}
    return all(
        subprocess.run(command, cwd=REPOSITORY, env=kept, check=False).returncode == 0
        for command in commands
    )


def main(words: Sequence[str]) -> int:
    """Test every case; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the environments")
    options, arguments = parser.parse_known_args(words)
    passed, lines = True, []
    with tempfile.TemporaryDirectory() as scratch:
        for version, resolution in CASES:
            name = f"python {version}, {resolution.removesuffix('-direct')} packages"
            python = find_python(version)
            if python is None:
                lines.append(f"{name}: skipped, this machine has no Python {version}")
                continue
            folder = (options.keep or Path(scratch)) / f"{version}-{resolution}"
            good = test_case(folder, python, resolution, arguments, types=resolution == "highest")
            lines.append(f"{name}: {'passed' if good else 'FAILED'}")
            passed &= good
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
