"""The built wheel in an empty environment, shared by the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

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
        done = self.run("python", "-m", "pip", "install", "--quiet", *requirements)
        assert done.returncode == 0, done.stderr


def build_wheel(source: Path, output: Path) -> Path:
    """Build a wheel with the build tools of this environment and return its path."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = subprocess.run(
        [*command, "--outdir", str(output), str(source)],
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
    environment.install(str(wheel))
    return environment


@pytest.fixture(scope="session")
def example_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the wheel of one of the examples."""

    def build(name: str) -> Path:
        source = REPOSITORY / "examples" / "plugins" / name
        return build_wheel(source, tmp_path_factory.mktemp(name))

    return build


@pytest.fixture
def third_party(tmp_path: Path) -> Callable[[str, str], Path]:
    """Build the wheel of a third party's plugin of one module."""

    def build(distribution: str, source: str) -> Path:
        module = distribution.replace("-", "_")
        project = tmp_path / distribution
        project.mkdir()
        (project / f"{module}.py").write_text(dedent(source))
        (project / "pyproject.toml").write_text(
            dedent(f"""
            [build-system]
            requires = ["hatchling"]
            build-backend = "hatchling.build"
            [project]
            name = "{distribution}"
            version = "0.7"
            dependencies = ["samullm-plugin"]
            [project.entry-points.samullm]
            main = "{module}"
            [tool.hatch.build.targets.wheel]
            include = ["{module}.py"]
            """)
        )
        return build_wheel(project, tmp_path / f"{distribution}-wheel")

    return build
