"""``samullm plugins`` and ``samullm collect-env``."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pytest

from samullm_plugin.cli.app import main
from samullm_plugin.cli.collect_env import collect


def test_plugins_lists_what_is_shipped(capsys) -> None:
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = {"kind", "name", "distribution", "version", "module", "status", "reason"}
    assert all(set(row) == keys for row in rows)
    shipped = [row for row in rows if row["distribution"] == "samullm-plugin"]
    assert all(row["status"] == "ok" for row in shipped), shipped
    entries = [e for e in metadata.entry_points(group="samullm") if e.dist.name == "samullm-plugin"]
    assert {e.module.split(".")[0] for e in entries} <= {
        row["module"].split(".")[0] for row in shipped
    }


def test_plugins_for_people_and_for_pip(capsys) -> None:
    assert main(["plugins"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "samullm-plugin" in captured.err
    assert main(["plugins", "--requirements"]) == 0
    assert f"samullm-plugin=={metadata.version('samullm-plugin')}\n" in capsys.readouterr().out


def test_no_plugin_at_all_is_an_error_with_a_remedy(capsys, monkeypatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda **_: ())
    assert main(["plugins"]) == 2
    assert "pip install -e ." in capsys.readouterr().err


def test_environment_names_packages_and_machine(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SAMULLM_DISABLE_PLUGINS", "x")
    assert main(["collect-env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["numpy"] == metadata.version("numpy")
    assert "vllm" in found["packages"]
    assert found["cpu_count"] >= 1
    assert found["memory_bytes"] > 2**28
    expected = {k: v for k, v in os.environ.items() if k.startswith("SAMULLM_")}
    assert found["settings"] == expected
    assert expected["SAMULLM_DISABLE_PLUGINS"] == "x"
    assert main(["collect-env"]) == 0
    assert "ortools" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'NVIDIA A100, 81920 MiB, 570.1'", ["NVIDIA A100, 81920 MiB, 570.1"]),
        ("exit 9", ["nvidia-smi does not answer: CalledProcessError"]),
    ],
)
def test_gpus_come_from_the_driver(tmp_path, monkeypatch, script, gpus) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert collect().gpus == gpus
