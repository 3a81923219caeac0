"""``samullm schema`` and ``samullm validate``."""

from __future__ import annotations

import json

import pytest

from samullm_plugin.cli.app import main


def test_the_schema_of_applications_is_printed(capsys, tmp_path) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["$schema"].startswith("https://json-schema.org/")
    assert {"version", "name", "models", "nodes", "cluster"} <= set(printed["properties"])
    assert printed["additionalProperties"] is False
    assert "from" in printed["$defs"]["InputSection"]["properties"]
    assert main(["schema", "--output-json", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == printed


def test_the_schema_of_a_plugins_options_is_printed(capsys) -> None:
    assert main(["schema", "scheduler", "greedy"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedular"], "unknown kind 'schedular' (did you mean 'scheduler'?); known: length-"),
        (["scheduler"], "which scheduler? known: "),
        (["scheduler", "gredy"], "unknown scheduler 'gredy' (did you mean 'greedy'?)"),
    ],
)
def test_wrong_names_are_one_message(capsys, words, message) -> None:
    assert main(["schema", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_bundled_application_is_valid(capsys) -> None:
    assert main(["validate", "routing", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_gpus"] == 8
    assert all(node["fits"] for node in report["nodes"])
    assert main(["validate", "routing"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is valid; every model fits on its 8 GPUs" in captured.err


def test_a_missing_file_is_one_message(capsys) -> None:
    assert main(["validate", "nothing-here.yaml"]) == 2
    assert "nothing-here.yaml: there is no such file" in capsys.readouterr().err
