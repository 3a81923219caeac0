"""``samullm plugins new`` writes packages that work; the examples are such packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from samullm_plugin import InputError
from samullm_plugin.cli.app import main
from samullm_plugin.host.scaffolding import SKELETONS, write_plugin

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"
KINDS = {
    "one-by-one": "scheduler",
    "geometric": "length-estimator",
    "roofline": "latency-model",
    "longest-prompt": "request-policy",
    "fixed-rate": "executor",
}


def test_there_is_an_example_of_every_kind():
    assert sorted(KINDS.values()) == sorted(SKELETONS)
    assert {p.name for p in EXAMPLES.iterdir()} == {f"samullm-{name}" for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_the_example_is_what_the_command_writes(name, tmp_path):
    written = write_plugin(name, KINDS[name], tmp_path / "new")
    for path in written:
        relative = path.relative_to(tmp_path / "new")
        example = EXAMPLES / f"samullm-{name}" / relative
        assert example.read_text() == path.read_text(), f"regenerate {example}"
        assert not re.search(r"\{\{|\}\}|\{%", path.read_text())


@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        ("Greedy", "scheduler", "lower-case"),
        ("a--b", "scheduler", "single hyphens"),
        ("fine", "schedular", "did you mean"),
    ],
)
def test_wrong_requests_are_refused(name, kind, fault, tmp_path):
    with pytest.raises(InputError, match=fault):
        write_plugin(name, kind, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    arguments = ["plugins", "new", "x", "--kind", "scheduler", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "name another" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
