"""Settings are read from the environment, checked, and listed in the documentation."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from samullm_plugin.errors import InputError
from samullm_plugin.host.settings import PREFIX, Settings, read_settings

TABLE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_table_in_the_documentation_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", TABLE.read_text(), re.MULTILINE)
    expected = [
        (PREFIX + name.upper(), _shown(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert rows == expected


def _shown(default: object) -> str:
    return "not set" if default is None or default == () else f"`{default}`"


def test_lists_are_split(monkeypatch) -> None:
    monkeypatch.setenv("SAMULLM_LOAD_PLUGINS", " a , b:c,")
    assert read_settings().load_plugins == ("a", "b:c")


def test_an_empty_allow_list_differs_from_none(monkeypatch) -> None:
    assert read_settings().load_plugins is None
    monkeypatch.setenv("SAMULLM_LOAD_PLUGINS", "")
    assert read_settings().load_plugins == ()


def test_a_value_that_cannot_be_understood_is_named(monkeypatch) -> None:
    monkeypatch.setenv("SAMULLM_TRACE_PLUGINS", "perhaps")
    with pytest.raises(InputError, match=r"variable SAMULLM_TRACE_PLUGINS: .*not 'perhaps'"):
        read_settings()


def test_a_misspelt_variable_is_reported(monkeypatch, caplog) -> None:
    monkeypatch.setenv("SAMULLM_DISABLE_PLUGIN", "x")
    with caplog.at_level(logging.WARNING):
        read_settings()
    assert "did you mean 'SAMULLM_DISABLE_PLUGINS'" in caplog.text
