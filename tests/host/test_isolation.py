"""One bad plugin is named and contained; the rest works."""

from __future__ import annotations

import logging

import pytest

from samullm_plugin import StageScheduler
from samullm_plugin.errors import InputError, PluginError

HEAD = "from samullm_plugin import StageScheduler, NoOptions, hookimpl\n"
CLASS = HEAD + (
    "class Mine(StageScheduler):\n"
    "    '''Doc.'''\n"
    "    name = 'mine'\n"
    "    def schedule(self, problem, context):\n"
    "        return None\n"
)
REGISTER = "\n@hookimpl\ndef register_schedulers(register):\n    "

BROKEN = {
    "does not import": ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named"),
    "leaves at import": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "syntax": ("def (:\n", "SyntaxError"),
    "no hook": ("x = 1\n", "implements no hook"),
    "misspelt hook": (
        HEAD + "@hookimpl\ndef register_scheduler(register): ...\n",
        "unknown hook 'register_scheduler' (did you mean 'register_schedulers'",
    ),
    "unknown argument": (
        HEAD + "@hookimpl\ndef register_schedulers(registry): ...\n",
        "registry",
    ),
    "raises": (CLASS + REGISTER + "register(Mine)\n    raise ValueError('on\\nfire')", "on fire"),
    "instance": (CLASS + REGISTER + "register(Mine())", "register the class, not an instance"),
    "wrong type": (
        CLASS + "@hookimpl\ndef register_executors(register):\n    register(Mine)",
        "does not derive from Executor",
    ),
    "abstract": (
        CLASS
        + "class Half(StageScheduler):\n    '''D.'''\n    name='half'\n"
        + REGISTER
        + "register(Half)",
        "does not implement schedule",
    ),
    "bad name": (CLASS + "Mine.name = 'Mine_2'\n" + REGISTER + "register(Mine)", "'Mine_2'"),
    "no name": (CLASS + "del Mine.name\n" + REGISTER + "register(Mine)", "the name None"),
    "bad config": (CLASS + "Mine.Config = dict\n" + REGISTER + "register(Mine)", "pydantic model"),
    "no docstring": (CLASS + "Mine.__doc__ = None\n" + REGISTER + "register(Mine)", "no docstring"),
    "twice": (CLASS + REGISTER + "register(Mine); register(Mine)", "'mine' twice"),
    "other interface": (
        CLASS + "samullm_interface = 99\n" + REGISTER + "register(Mine)",
        "version 99 of the plugin interface; this samullm-plugin has version 1",
    ),
    "bad command": (
        HEAD + "@hookimpl\ndef register_commands(app):\n"
        "    app.command()(lambda x: None)\n    app.no_such_method()\n",
        "AttributeError: 'Typer' object has no attribute 'no_such_method'",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_named_and_the_rest_works(install, load, scheduler, fault) -> None:
    source, reason = BROKEN[fault]
    install("aaa-broken", version="0.3", bad=source)
    install("zzz-good", good=scheduler("good"))
    host = load()
    (failure,) = host.failures()
    assert (failure.kind, failure.name, failure.status) == ("plugin", "bad", "failed")
    assert (failure.distribution, failure.version) == ("aaa-broken", "0.3")
    assert failure.module == "aaa_broken_bad"
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert host.names("scheduler") == ["good"]
    assert isinstance(host.create("scheduler", "good"), StageScheduler)


def test_nothing_of_a_half_registered_plugin_stays(install, load) -> None:
    source = (
        CLASS
        + REGISTER
        + "register(Mine)\n"
        + "@hookimpl\ndef on_run_event(run, event):\n    raise AssertionError('still called')\n"
        + "@hookimpl\ndef register_executors(register):\n    raise OSError('late')\n"
    )
    install("half", half=source)
    host = load()
    assert host.names("scheduler") == []
    assert not host.has_observers
    assert host._loader._manager.get_plugins() == set()
    assert [row.status for row in host.provenance()] == ["failed"]


def test_a_failed_plugin_is_mentioned_where_its_name_is_missed(install, load) -> None:
    install("half", half="import nothing_of_this_name")
    with pytest.raises(InputError, match="failed to load, see `samullm plugins`: half:half"):
        load().resolve("scheduler", "mine")


def test_prints_of_a_plugin_do_not_reach_stdout(install, load, scheduler, capsys) -> None:
    install("noisy", noisy="print('loading noisy')\n" + scheduler("noisy").replace("\n    ", "\n"))
    load()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loading noisy" in captured.err


def test_the_same_module_under_two_entry_points_is_refused(install, load, site) -> None:
    install("both", one=CLASS + REGISTER + "register(Mine)")
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    points.write_text(points.read_text() + "two = both_one\n")
    host = load()
    assert [row.name for row in host.failures()] == ["two"]
    assert host.names("scheduler") == ["mine"]


def test_two_entry_points_of_one_distribution_cannot_share_a_name(install, load, scheduler) -> None:
    install("both", one=scheduler("same"), two=scheduler("same"))
    host = load()
    (failure,) = host.failures()
    assert failure.name == "two"
    assert "both registers the scheduler 'same' twice" in failure.reason
    assert host.names("scheduler") == ["same"]


def test_a_constructor_that_raises_is_named(install, load) -> None:
    install(
        "brittle",
        brittle=CLASS
        + "    def __init__(self, config):\n        raise RuntimeError('no luck')\n"
        + REGISTER
        + "register(Mine)",
    )
    with pytest.raises(PluginError, match=r"scheduler brittle:mine .*RuntimeError: no luck"):
        load().create("scheduler", "mine")


def test_a_constructor_may_refuse_input(install, load) -> None:
    install(
        "needy",
        needy=CLASS
        + "    def __init__(self, config):\n"
        + "        from samullm_plugin import MissingExtraError\n"
        + "        raise MissingExtraError('scheduler mine', 'torch', 'vllm')\n"
        + REGISTER
        + "register(Mine)",
    )
    with pytest.raises(InputError, match=r"pip install 'samullm-plugin\[vllm\]'"):
        load().create("scheduler", "mine")


def test_hook_calls_can_be_traced(install, load, scheduler, caplog) -> None:
    install("good", good=scheduler("good"))
    with caplog.at_level(logging.DEBUG, logger="samullm_plugin.hook_calls"):
        load(trace=True)
    assert "register_schedulers" in caplog.text
