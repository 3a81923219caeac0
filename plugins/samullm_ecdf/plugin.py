"""Registers the shipped length estimators."""

from __future__ import annotations

from collections.abc import Callable

from samullm_ecdf.ecdf import ConditionalLengths, EcdfLengths
from samullm_ecdf.given import FixedLengths, OracleLengths, WorkloadLengths
from samullm_ecdf.proxy import ProxyLengths
from samullm_plugin import LengthEstimator, hookimpl


@hookimpl
def register_length_estimators(register: Callable[[type[LengthEstimator]], None]) -> None:
    """Offer every estimator."""
    for estimator in (
        EcdfLengths,
        ConditionalLengths,
        OracleLengths,
        FixedLengths,
        WorkloadLengths,
        ProxyLengths,
    ):
        register(estimator)
