"""``docs/running.md`` names every option of ``samullm run``, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from samullm_plugin.cli.run import run

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_option() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(run)
    options = [
        {*parameter.opts, *parameter.secondary_opts}
        for parameter in typer.main.get_command(app).params
        if parameter.param_type_name == "option"
    ]
    text = (ROOT / "docs" / "running.md").read_text()
    table = text.partition("| option | meaning |")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = {o for cell in cells for o in re.findall(r"--[a-z-]+", cell)}
    assert len(named) > 10
    assert [names for names in options if not names & named and "--help" not in names] == []
    assert named <= set().union(*options)
    assert "--no-replan" in named
