"""``samullm bench`` is a command and a group of commands."""

from __future__ import annotations

import subprocess
import sys

import pytest

from samullm_plugin.cli.app import main


@pytest.mark.parametrize("command", ["lengths", "policies"])
def test_sub_commands_have_help(capsys, command):
    assert main(["bench", command, "--help"]) == 0
    assert f"samullm bench {command}" in capsys.readouterr().out


def test_the_bare_help_names_options_and_sub_commands(capsys):
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--schedulers", "--apps", "lengths", "policies"):
        assert word in text


def test_an_unknown_sub_command_is_an_input_error(capsys):
    assert main(["bench", "length"]) == 2
    assert "length" in capsys.readouterr().err


def test_the_bare_call_compares_schedulers(capsys):
    words = ["--apps", "small-1", "--schedulers", "max-heuristic", "--seeds", "1", "--shifts", ""]
    assert main(["bench", *words]) == 0
    assert "small-1 on 2 GPUs" in capsys.readouterr().err


def test_help_of_bench_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from samullm_plugin.cli.app import main\n"
        "assert main(['bench', 'lengths', '--help']) == 0\n"
        "heavy = {'numpy', 'numba', 'ortools', 'yaml', 'samullm_plugin.host.manager'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_plugin_that_fails_is_exit_code_1_and_the_others_appear(monkeypatch, capsys):
    from samullm_baselines.plugin import MaxHeuristic

    def fail(self, problem, context):
        raise ZeroDivisionError("no idea")

    monkeypatch.setattr(MaxHeuristic, "schedule", fail)
    words = ["--apps", "small-1", "--schedulers", "max-heuristic,min-heuristic", "--seeds", "1"]
    assert main(["bench", *words]) == 1
    err = capsys.readouterr().err
    assert "max-heuristic raised ZeroDivisionError: no idea" in err
    assert "min-heuristic" in err
