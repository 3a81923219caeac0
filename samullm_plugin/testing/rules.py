"""How the contract suites say which rule a plugin breaks."""

from __future__ import annotations


class ContractViolation(AssertionError):
    """A plugin breaks a rule of its interface.

    Attributes:
        rule: short name of the rule, as the documentation lists it.
    """

    def __init__(self, rule: str, message: str) -> None:
        """Name the rule and what was seen."""
        super().__init__(f"rule {rule}: {message}")
        self.rule = rule


def require(condition: object, rule: str, message: str) -> None:
    """Raise unless a condition holds.

    Raises:
        ContractViolation: naming the rule.
    """
    if not condition:
        raise ContractViolation(rule, message)
