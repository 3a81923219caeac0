"""Dispatch, exit codes and messages of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from samullm_plugin.cli import app
from samullm_plugin.errors import InputError, PlanError
from samullm_plugin.host.manager import PluginHost


@pytest.fixture
def command(monkeypatch):
    """Replace the command table by one command that does what a test wants."""

    def install(function):
        module = type(sys)("fake_command_module")
        module.function = function
        monkeypatch.setitem(sys.modules, "fake_command_module", module)
        monkeypatch.setitem(app.COMMANDS, "fake", app.Command("fake_command_module:function", "-"))

    return install


def test_every_command_can_be_imported_and_has_help(capsys) -> None:
    for name in app.COMMANDS:
        assert app.main([name, "--help"]) == 0, name
        assert f"samullm {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("bench --apps small-1 --apps small-2", "--apps"),
        ("plan small-1 --gpus 2 --gpus=4", "--gpus"),
        ("plan small-1 -o a.json --output b.json", "--output"),
    ],
)
def test_an_option_of_one_value_is_given_once(words: str, option: str, capsys) -> None:
    assert app.main(words.split()) == 2
    assert f"{option} is given 2 times and has one value" in capsys.readouterr().err


def test_the_overview_lists_every_command(capsys) -> None:
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in app.COMMANDS:
        assert name in text
    assert app.main([]) == 0
    assert capsys.readouterr().out == text


def test_the_overview_lists_commands_of_shipped_plugins(capsys, monkeypatch) -> None:
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in app.SHIPPED_COMMANDS.items():
        assert line in text
        assert app.main([name, "--help"]) == 0
        assert f"samullm {name}" in capsys.readouterr().out
        found = PluginHost.from_settings().resolve("command", name)
        assert found.provenance.distribution == "samullm-plugin"
    monkeypatch.setattr(app, "find_spec", lambda package: None)
    assert app.main(["--help"]) == 0
    assert "doctor" not in capsys.readouterr().out


def test_help_imports_no_heavy_library_and_is_quick() -> None:
    code = textwrap.dedent("""
        import sys, time
        start = time.process_time()
        from samullm_plugin.cli.app import main
        assert main(["--help"]) == 0
        seconds = time.process_time() - start
        heavy = {"numpy", "numba", "ortools", "pandas", "pydantic", "pluggy", "rich.table_never",
                 "samullm_plugin.host.manager", "samullm_plugin.host.interfaces", "torch", "vllm",
                 "scipy", "matplotlib", "jinja2", "yaml", "psutil"}
        print(sorted(heavy & set(sys.modules)), seconds, file=sys.stderr)
        """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, seconds = done.stderr.rsplit(maxsplit=1)
    assert imported == "[]"
    assert float(seconds) < 0.8  # of the processor; 0.2 s on an idle core


def test_validate_imports_neither_compiler_nor_solver_nor_engines(tmp_path: Path) -> None:
    """Half of its time for a small application would be theirs."""
    (tmp_path / "app.yaml").write_text(
        "version: 1\nname: one\nmodels: {m: {model: THUDM/chatglm3-6b}}\n"
        "nodes: {a: {model: m, requests: {file: r.jsonl}, prompt: '{{ q }}',"
        " sampling_params: {max_tokens: 4}}}\n"
        "cluster: {gpus: 8, gpu: A100-80GB, nvlink: 2}\nexecutor: vllm\n"
    )
    (tmp_path / "r.jsonl").write_text('{"q": "x"}\n')
    code = textwrap.dedent("""
        import sys
        from samullm_plugin.cli.app import main
        assert main(["validate", sys.argv[1]]) == 0
        heavy = {"numba", "ortools", "vllm", "torch", "transformers", "ray", "pandas", "scipy",
                 "pyarrow", "matplotlib"}
        print(sorted(heavy & set(sys.modules)))
        """)
    command = [sys.executable, "-c", code, str(tmp_path / "app.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("app.yaml: nodes.a: no"), 2, "samullm: app.yaml: nodes.a: no"),
        (PlanError("overlap"), 1, "samullm: overlap"),
        (
            FileNotFoundError(2, "No such file or directory", "x.yaml"),
            2,
            "samullm: x.yaml: No such",
        ),
        (OSError(28, "No space left on device", "out"), 1, "samullm: out: No space left"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; run it"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_an_exit_code(command, capsys, error, code, message) -> None:
    def fail() -> None:
        raise error

    command(fail)
    assert app.main(["fake"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= 1


def test_wrong_fields_become_one_line(command, capsys) -> None:
    from pydantic import BaseModel

    class Model(BaseModel):
        count: int

    command(lambda: Model.model_validate({"count": "many"}))
    assert app.main(["fake"]) == 2
    assert capsys.readouterr().err.startswith("samullm: count: Input should be a valid integer")


def test_a_traceback_is_shown_on_demand_wherever_asked(command, capsys) -> None:
    def fail() -> None:
        raise InputError("wrong")

    command(fail)
    for words in (["fake", "--traceback"], ["--traceback", "fake"]):
        assert app.main(words) == 2
        assert "Traceback" in capsys.readouterr().err


def test_wrong_usage(command, capsys) -> None:
    command(lambda: None)
    assert app.main(["fake", "--frobnicate"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("samullm: No such option")
    assert message.endswith(" (see `samullm fake --help`)\n")
    assert app.main(["--frobnicate"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_an_unknown_command_names_close_ones(capsys) -> None:
    assert app.main(["plugin"]) == 2
    assert "unknown command 'plugin' (did you mean 'plugins'" in capsys.readouterr().err


def test_an_exit_code_of_a_command_is_kept(command) -> None:
    import typer

    def leave() -> None:
        raise typer.Exit(1)

    command(leave)
    assert app.main(["fake"]) == 1


def test_global_flags_stop_at_a_double_dash() -> None:
    assert app._split_flags(["a", "-q", "--", "-v"]) == ({"quiet"}, ["a", "--", "-v"])


def test_the_version_is_printed(capsys) -> None:
    from importlib.metadata import version

    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("samullm-plugin")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "samullm_plugin", "collect-env", "--json"]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=buffered, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_interrupt_while_a_command_is_imported(command, capsys, monkeypatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    command(None)
    monkeypatch.setattr(app, "import_module", interrupted)
    assert app.main(["fake"]) == 130
    assert capsys.readouterr().err == "samullm: interrupted\n"


def test_messages_are_logged_by_verbosity(command, capsys) -> None:
    import logging

    def talk() -> None:
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("samullm_plugin.test"), level)(level)

    command(talk)
    expected = {"-q": 1, "": 2, "-v": 3, "-vv": 4}
    for flag, lines in expected.items():
        assert app.main(["fake", *flag.split()]) == 0
        assert len(capsys.readouterr().err.splitlines()) == lines, flag
