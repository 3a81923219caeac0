"""What this plugin offers."""

from __future__ import annotations

from typing import Any

from samullm_plugin import hookimpl


@hookimpl
def register_request_policies(register: Any) -> None:
    """Offer the shipped request policies."""
    from samullm_policies import policies

    for policy in (
        policies.Fcfs,
        policies.ShortestFirst,
        policies.LongestFirst,
        policies.MultiBin,
        policies.PrefixAffinity,
        policies.ProgramAge,
        policies.IsolateLongest,
    ):
        register(policy)
