"""The shipped length estimators keep their contract."""

from __future__ import annotations

import pytest
from samullm_ecdf.ecdf import ConditionalLengths, EcdfLengths
from samullm_ecdf.given import FixedLengths, OracleLengths, WorkloadLengths

from samullm_plugin.testing.length_contract import LengthEstimatorContract


class TestEcdf(LengthEstimatorContract):
    estimator_class = EcdfLengths
    model = "lmsys/vicuna-13b-v1.5"


class TestConditional(LengthEstimatorContract):
    estimator_class = ConditionalLengths
    model = "lmsys/vicuna-13b-v1.5"


class TestFixed(LengthEstimatorContract):
    estimator_class = FixedLengths


class TestWorkload(LengthEstimatorContract):
    estimator_class = WorkloadLengths


class TestOracle(LengthEstimatorContract):
    estimator_class = OracleLengths
    options = {"output_tokens": {"node": [7 + i for i in range(200)]}}


class TestProxy(LengthEstimatorContract):
    model = "lmsys/vicuna-13b-v1.5"

    @pytest.fixture(autouse=True)
    def _needs_sklearn(self):
        pytest.importorskip("sklearn", reason="the extra `learn` is not installed")

    @property
    def estimator_class(self):
        from samullm_ecdf.proxy import ProxyLengths

        return ProxyLengths
