"""The built wheel in an empty environment, shared by the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from tests.packaging.install import as_pip_is_configured

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that knows nothing of this checkout."""

    folder: Path
    elsewhere: Path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands from another folder, without inherited paths."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SAMULLM_"))}
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.elsewhere,
            env=kept | variables,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def install(self, *requirements: str) -> None:
        """Install with pip."""
        done = self.run("python", "-m", "pip", "install", "--quiet", "--no-compile", *requirements)
        assert done.returncode == 0, done.stderr


def build_wheel(source: Path, output: Path) -> Path:
    """Build a wheel with the build backend of this environment and return its path."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(output)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(output.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with nothing but the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    environment = Environment(folder, tmp_path_factory.mktemp("elsewhere"))
    words, variables = as_pip_is_configured()
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", *words]
    command = [*uv, "--python", str(folder / "bin" / "python"), str(wheel)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return environment


@pytest.fixture(scope="session")
def example_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the wheel of one of the examples."""

    def build(name: str) -> Path:
        source = REPOSITORY / "examples" / "plugins" / name
        return build_wheel(source, tmp_path_factory.mktemp(name))

    return build


@pytest.fixture
def third_party(installed: Environment) -> Iterator[Callable[[str, str], None]]:
    """Put a third party's plugin of one module where pip would; it is gone after the test.

    That pip installs such packages is shown by the examples and the tutorial.
    """
    (site,) = installed.folder.glob("lib/python*/site-packages")
    made: list[Path] = []

    def add(distribution: str, source: str) -> None:
        module = distribution.replace("-", "_")
        record = site / f"{module}-0.7.dist-info"
        record.mkdir()
        made.extend([site / f"{module}.py", record])
        (site / f"{module}.py").write_text(dedent(source))
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.7\n"
        (record / "METADATA").write_text(metadata)
        (record / "entry_points.txt").write_text(f"[samullm]\nmain = {module}\n")

    yield add
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
