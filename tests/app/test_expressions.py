"""Expressions over fields: what they compute, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from samullm_plugin.app.expressions import ExpressionError, parsed

FIELDS = {"score": 6, "output": "Sorry, no.", "rate": {"parts": [1, 2]}, "logprob": -0.8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("score < 7", True),
        ("1 <= score <= 5", False),
        ("score < 7 and logprob < -0.7", True),
        ("score > 7 or not score", False),
        ('matches("(?i)sorry", output)', True),
        ("rate.parts[1] * 2 + 1", 5),
        ('rate["parts"][0] if score > 5 else 0', 1),
        ('lower(output) in ["sorry, no.", "yes"]', True),
        ("len(rate.parts) == 2 and words(output) == 2", True),
        ("-score // 4", -2),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parsed(text).value(FIELDS) == value


def test_names_are_the_fields_it_uses() -> None:
    assert parsed("rate.score < limit and len(output) > 2").names == {"rate", "limit", "output"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__mro__",
        "[x for x in output]",
        "lambda: 1",
        "output.upper()",
        "score := 3",
        "2 ** 99",
        "f'{output}'",
        "exec('1')",
        "score < ",
        "max(*rate)",
    ],
)
def test_what_is_refused_before_it_is_evaluated(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"not (allowed|an expression)|are allowed"):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scor < 7", "no field 'scor'; fields: logprob, output, rate, score"),
        ("rate.total > 1", "no field 'total'; fields: parts"),
        ("output < 7", "not supported"),
        ("output * 1000000000", "not both numbers"),
        ("score / 0", "division"),
    ],
)
def test_what_has_no_value(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        parsed(text).value(FIELDS)
