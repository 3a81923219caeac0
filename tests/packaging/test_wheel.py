"""The wheel works in an empty environment, away from the checkout."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest

from samullm_plugin.cli.app import COMMANDS

REPOSITORY = Path(__file__).parents[2]

GREETER = """
    from samullm_plugin import StageScheduler, hookimpl

    class Mine(StageScheduler):
        '''Schedules nothing.'''
        name = "{name}"
        def schedule(self, problem, context):
            raise NotImplementedError

    @hookimpl
    def register_schedulers(register):
        register(Mine)

    @hookimpl
    def register_commands(app):
        @app.command()
        def greet(name: str) -> None:
            print("hello", name)

        @app.command()
        def plugins() -> None:
            print("not the built-in one")
    """


def test_the_wheel_holds_every_package_and_its_data(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("plugins", "strategies"):
        for package in (REPOSITORY / folder).glob("samullm_*"):
            assert f"{package.name}/__init__.py" in names, package
    for path in (REPOSITORY / "samullm_plugin").rglob("*"):
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and path.suffix not in (".nbi", ".nbc")
        ):
            assert str(path.relative_to(REPOSITORY)) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_every_plugin_module_has_its_entry_point() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    stated = set(project["entry-points"]["samullm"].values())
    present = {
        f"{path.parent.name}.plugin"
        for folder in ("plugins", "strategies")
        for path in (REPOSITORY / folder).glob("samullm_*/plugin.py")
    }
    assert stated == present


def test_lists_of_packages_in_the_project_file_agree() -> None:
    tool = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    present = {
        str(path.relative_to(REPOSITORY))
        for folder in ("plugins", "strategies")
        for path in (REPOSITORY / folder).glob("samullm_*")
        if (path / "__init__.py").exists()
    }
    assert set(packages) == present | {"samullm_plugin"}
    assert set(packages) <= set(tool["mypy"]["files"])
    plugins = {Path(package).name for package in present}
    contracts = {c["name"]: c for c in tool["importlinter"]["contracts"]}
    assert set(tool["importlinter"]["root_packages"]) == plugins | {"samullm_plugin"}
    assert plugins <= set(
        contracts["the host knows no plugin and no heavy library"]["forbidden_modules"]
    )
    # The engines of the executor ray are those of the executor vllm, and schedulers that search
    # share the timing of models: contracts of their own, which name all but those.
    for name, allowed in (
        ("engines on other machines are those of the executor vllm", {"samullm_vllm"}),
        ("nobody knows the executor of several machines", set()),
        (
            "the timing of models is shared by the schedulers that search",
            {"samullm_auto", "samullm_cpsat", "samullm_greedy"},
        ),
        ("the timing of models knows no plugin", set()),
    ):
        sides = contracts[name]["source_modules"], contracts[name]["forbidden_modules"]
        assert {*sides[0], *sides[1]} == plugins - allowed, name
    apart = set(contracts["plugins do not know each other"]["modules"])
    assert plugins - {"samullm_ray", "samullm_tasks"} == apart
    assert plugins == set(contracts["plugins use what is public"]["source_modules"])


def test_plugins_are_found_from_another_folder(installed) -> None:
    done = installed.run("samullm", "plugins", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["distribution"] for row in rows} == {"samullm-plugin"}
    assert {row["status"] for row in rows} == {"ok"}, rows
    again = installed.run("python", "-m", "samullm_plugin", "plugins", "--json")
    assert again.stdout == done.stdout


def test_the_wheel_needs_nothing_from_extras_to_import(installed) -> None:
    done = installed.run("python", "-m", "pip", "check")
    assert done.returncode == 0, done.stdout
    code = (
        "from samullm_plugin.cli.app import COMMANDS, main\n"
        "print({c: main([c, '--help']) for c in COMMANDS})"
    )
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(dict.fromkeys(COMMANDS, 0)), done.stderr
    assert installed.run("samullm", "plan", "--help").returncode == 0


@pytest.mark.slow
def test_bench_runs_from_another_folder(installed) -> None:
    """The first run in a new environment compiles the simulator."""
    words = ["--apps", "small-1", "--schedulers", "greedy,max-heuristic,exact", "--seeds", "1"]
    done = installed.run("python", "-m", "samullm_plugin", "bench", *words, "--output-json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["scheduler"] for row in rows} == {"greedy", "max-heuristic", "exact"}
    assert all(row["application"] == "small-1" for row in rows)
    assert "greedy" in done.stderr


def test_a_third_party_is_found_contained_and_told_apart(installed, third_party) -> None:
    third_party("samullm-greeter", GREETER.format(name="greedy-too"))
    third_party("samullm-twin", GREETER.format(name="greedy-too"))
    third_party("samullm-bad", "raise RuntimeError('cannot start')")
    rows = json.loads(installed.run("samullm", "plugins", "--json").stdout)
    assert {
        "kind": "scheduler",
        "name": "greedy-too",
        "distribution": "samullm-greeter",
        "version": "0.7",
        "module": "samullm_greeter",
        "status": "ok",
        "reason": "",
    } in rows
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["distribution"] == "samullm-bad"
    assert failed["reason"] == "RuntimeError: cannot start"
    assert all(row["status"] == "ok" for row in rows if row["distribution"] == "samullm-plugin")

    code = "from samullm_plugin import PluginHost\nPluginHost().create('scheduler', 'greedy-too')"
    done = installed.run("python", "-c", code)
    assert "samullm-greeter:greedy-too and by samullm-twin:greedy-too" in done.stderr

    done = installed.run("samullm", "greet", "world")
    assert done.returncode == 2
    assert "samullm-greeter:greet and by samullm-twin:greet" in done.stderr
    done = installed.run("samullm", "samullm-twin:greet", "world")
    assert (done.returncode, done.stdout) == (0, "hello world\n"), done.stderr
    assert "hello" not in installed.run("samullm", "plugins").stdout
    done = installed.run("samullm", "samullm-twin:plugins")
    assert done.stdout == "not the built-in one\n"
