"""Names: bare, qualified, ambiguous, unknown; options; settings."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.host.manager import PluginHost


def test_provenance_names_everything(install, load, scheduler) -> None:
    install("samullm-alpha", version="2.1", fast=scheduler("quick"))
    (row,) = load().provenance()
    assert dataclasses.asdict(row) == {
        "kind": "scheduler",
        "name": "quick",
        "distribution": "samullm-alpha",
        "version": "2.1",
        "module": "samullm_alpha_fast",
        "status": "ok",
        "reason": "",
    }


def test_an_ambiguous_name_is_refused_and_both_are_named(install, load, scheduler) -> None:
    install("alpha", one=scheduler("greedy"))
    install("beta.dist", two=scheduler("greedy"))
    host = load()
    assert host.failures() == []
    with pytest.raises(InputError, match=r"alpha:greedy and by beta\.dist:greedy") as caught:
        host.create("scheduler", "greedy")
    assert caught.value.exit_code == 2
    assert type(host.create("scheduler", "alpha:greedy")).__module__ == "alpha_one"
    assert host.resolve("scheduler", "Beta_Dist:greedy").provenance.distribution == "beta.dist"
    assert host.names("scheduler") == ["alpha:greedy", "beta.dist:greedy"]


def test_an_unknown_name_lists_known_and_close_ones(install, load, scheduler) -> None:
    install("alpha", one=scheduler("greedy"), two=scheduler("max-heuristic"))
    with pytest.raises(InputError, match=r"did you mean 'greedy'.*known: greedy, max-heuristic"):
        load().create("scheduler", "gredy")
    with pytest.raises(InputError, match="unknown scheduler 'gamma:greedy'"):
        load().create("scheduler", "gamma:greedy")


def test_kinds_do_not_share_names(install, load, scheduler) -> None:
    install("alpha", one=scheduler("greedy"))
    with pytest.raises(InputError, match="unknown executor 'greedy'"):
        load().create("executor", "greedy")


def test_no_plugin_at_all_says_how_to_install() -> None:
    with pytest.raises(InputError, match=r"pip install -e \."):
        PluginHost([]).resolve("scheduler", "greedy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "scheduler greedy: width: .*greater than or equal to 1"),
        ({"widht": 3}, "scheduler greedy: unknown option 'widht' .did you mean 'width'"),
        ({"nested": {"a": "x"}}, r"scheduler greedy: nested\.a: .*not 'x'"),
        ({"nested": {"a": "x"}, "width": "w"}, r"width: .*; nested\.a: "),
    ],
)
def test_wrong_options_name_the_field(install, load, scheduler, options, message) -> None:
    install("alpha", one=scheduler("greedy"))
    with pytest.raises(InputError, match=message):
        load().create("scheduler", "greedy", options)


def test_options_reach_the_instance(install, load, scheduler) -> None:
    install("alpha", one=scheduler("greedy"))
    assert load().create("scheduler", "greedy", {"width": 9}).config.width == 9


@pytest.mark.parametrize("name", ["two", "alpha:two"])
def test_a_plugin_can_be_disabled(install, load, scheduler, name) -> None:
    install("alpha", one=scheduler("greedy"), two="raise SystemError('must not be imported')")
    host = load(disabled=[name])
    assert host.names("scheduler") == ["greedy"]
    assert [(row.name, row.status) for row in host.provenance()] == [
        ("two", "disabled"),
        ("greedy", "ok"),
    ]


@pytest.mark.parametrize(("only", "left"), [(["alpha"], ["a"]), (["beta:two"], ["b"]), ([], [])])
def test_an_allow_list_keeps_the_rest_out(install, load, scheduler, only, left) -> None:
    install("alpha", one=scheduler("a"))
    install("beta", two=scheduler("b"))
    assert load(only=only).names("scheduler") == left


def test_a_misspelt_selection_is_reported(install, load, scheduler, caplog) -> None:
    install("alpha", one=scheduler("a"))
    with caplog.at_level(logging.WARNING):
        load(disabled=["alpah"])
    assert "no installed plugin is named 'alpah' (did you mean 'alpha'" in caplog.text


def test_settings_choose_plugins(install, site, scheduler, monkeypatch) -> None:
    install("alpha", one=scheduler("a"), two=scheduler("b"))
    monkeypatch.setenv("SAMULLM_LOAD_PLUGINS", "alpha")
    monkeypatch.setenv("SAMULLM_DISABLE_PLUGINS", "two,")
    host = PluginHost.from_settings()
    assert host.names("scheduler") == ["a"]


def test_hosts_are_independent(install, load, scheduler) -> None:
    install("alpha", one=scheduler("a"))
    assert load(disabled=["alpha"]).names("scheduler") == []
    assert load().names("scheduler") == ["a"]


def test_commands_of_plugins_are_registered_by_name(install, load) -> None:
    source = """
        from samullm_plugin import hookimpl

        @hookimpl
        def register_commands(app):
            @app.command()
            def greet(name: str): ...
        """
    install("alpha", one=source)
    install("beta", two=source.replace("def greet", "def part"))
    host = load()
    assert host.names("command") == ["greet", "part"]
    assert host.resolve("command", "greet").provenance.distribution == "alpha"
