"""The simulation schedules at every step what vLLM's own scheduler schedules.

``python -m tests.conformance --count 5000`` does the same at greater length.
"""

from __future__ import annotations

import pytest

from samullm_plugin.engine import CHECKED_VLLM_VERSIONS
from tests.conformance.compare import Case, compare, simulate
from tests.conformance.other_versions import (
    UnavailableError,
    admitted,
    published,
    run_with,
    unpack,
)
from tests.conformance.workloads import named_cases, pooling_cases, queue_cases

NAMED = named_cases()

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM's own warnings


@pytest.mark.parametrize("name", NAMED)
def test_named_case(name: str) -> None:
    result = compare(NAMED[name])
    assert result.difference is None
    assert result.steps > 0
    assert result.never_fits == name.startswith("never fits")
    if "many times over" in name:
        assert result.preemptions > 100


@pytest.mark.slow
def test_random_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.conformance.__main__ import compare_random

    done = compare_random(count=300, start=2026)
    with capsys.disabled():
        print(
            f" {len(done)} workloads, {sum(r.steps for r in done)} steps, "
            f"{sum(r.preemptions for r in done)} preemptions, no difference ",
            end="",
        )
    assert len(done) >= 250
    assert sum(r.preemptions for r in done) > 150
    assert sum(r.never_fits for r in done) > 2


def test_random_hybrid_models_and_pipelines() -> None:
    from tests.conformance.__main__ import compare_random

    done = compare_random(count=200, start=2026, drawn=queue_cases())
    assert len(done) >= 160
    assert sum(r.preemptions for r in done) > 60


def test_pooling_requests_end_with_their_prompt() -> None:
    """A pooling request ends in the step in which its prompt is computed, like one of one token."""
    from tests.conformance.__main__ import compare_random

    assert len(compare_random(count=100, start=7, drawn=pooling_cases())) >= 90


@pytest.mark.timeout(900)  # 15 s, and the download; its own import of vLLM waits for busy cores
@pytest.mark.parametrize("version", CHECKED_VLLM_VERSIONS)
def test_admitted_version_that_is_not_installed(version: str, pytestconfig: pytest.Config) -> None:
    """Its own scheduler, where its wheel can be had; the named cases are compared as well."""
    import vllm

    if vllm.__version__ == version:
        pytest.skip("installed, so compared by all of the other tests")
    try:
        folder = unpack(version, pytestconfig.cache.mkdir("vllm"))
    except UnavailableError as error:
        pytest.skip(f"vLLM {version}: its wheel cannot be had: {error}")
    said = run_with(folder, "--count", "40", "--seed", "991")
    assert f"vllm {version}+cpu" in said
    assert ": 0 differences" in said


def test_every_admitted_version_is_checked() -> None:
    assert set(admitted().filter(CHECKED_VLLM_VERSIONS)) == set(CHECKED_VLLM_VERSIONS)
    try:
        newer = set(published()) - set(CHECKED_VLLM_VERSIONS)
    except UnavailableError as error:
        pytest.skip(f"the registry's versions are not known: {error}")
    if newer:  # published since: no fault of this code
        pytest.skip(f"not compared yet, then to be added or excluded: {', '.join(sorted(newer))}")


def test_checked_versions_name_the_installed_one() -> None:
    import vllm

    assert vllm.__version__ in CHECKED_VLLM_VERSIONS, "run python -m tests.conformance, then add it"


@pytest.mark.parametrize("name", NAMED)
def test_leaping_changes_nothing(name: str) -> None:
    """Without recorded steps, undisturbed decode steps are run without touching sequences."""
    case: Case = NAMED[name]
    recorded, _ = simulate(case)
    leaping, _ = simulate(case, record_steps=False)
    assert leaping.finish_s.tolist() == recorded.finish_s.tolist()
    assert leaping.num_steps == recorded.num_steps
    assert leaping.num_preemptions == recorded.num_preemptions
