"""What outputs are that do not follow their schema, whatever a model writes."""

from __future__ import annotations

import pytest

from samullm_plugin.app.schemas import Schema
from samullm_plugin.errors import Reject

ANYTHING = Schema("json", "{}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"a": ', "is not JSON"),
        ("[" * 2000, "is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not JSON: maximum recursion depth"),
        ("[" * 300 + "]" * 300, "more than 100 levels"),
        ("1" * 5000, "is not JSON: Exceeds the limit"),
    ],
    ids=["nothing", "cut", "repeated", "too deep to read", "deep", "too many digits"],
)
def test_what_cannot_be_kept_is_rejected(text: str, message: str) -> None:
    with pytest.raises(Reject, match=message):
        ANYTHING.parse(text)


def test_what_can_be_kept_is_the_value() -> None:
    assert ANYTHING.parse("[" * 100 + "1" + "]" * 100)
    assert ANYTHING.parse('{"a": "\\ud800"}') == {"a": "\ud800"}
