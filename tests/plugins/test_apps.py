"""Bundled applications: the published counts and statistics, equal for equal options."""

from __future__ import annotations

import numpy as np
import pytest

from samullm_plugin import Application, InputError, PluginHost
from samullm_plugin.model.scenarios import draw_taken
from samullm_plugin.planning.applications import build_named, find_application, parse_named


@pytest.fixture(scope="module")
def host() -> PluginHost:
    return PluginHost()


def lengths(app: Application) -> list[int]:
    return [int(v) for n in app.nodes for v in n.requests.prompt_tokens]


@pytest.mark.parametrize("requests", [1000, 5000, 10000])
@pytest.mark.parametrize("limit", [256, 512])
def test_ensembling(host: PluginHost, requests: int, limit: int) -> None:
    app = build_named(host, f"ensembling:requests={requests},max_tokens={limit}").app
    assert [len(n.requests) for n in app.nodes] == [requests] * 9
    for node in app.nodes:
        prompts = node.requests.prompt_tokens
        assert (prompts.min(), prompts.max()) == (5, 127)
        assert prompts.mean() == pytest.approx(21, abs=0.1)
        assert (node.requests.max_tokens == limit).all()


def test_routing(host: PluginHost) -> None:
    loaded = build_named(host, "routing")
    assert [len(n.requests) for n in loaded.app.nodes] == [408, 1267, 2068, 456, 2657]
    assert loaded.app.num_requests == 6856
    prompts = lengths(loaded.app)
    assert (min(prompts), max(prompts)) == (9, 577)
    assert np.mean(prompts) == pytest.approx(310, abs=0.5)
    assert loaded.output_tokens is None
    assert all((n.requests.max_tokens == 4096).all() for n in loaded.app.nodes)
    known = build_named(host, "routing:known=true")
    assert known.output_tokens is not None
    outputs = np.concatenate(known.output_tokens)
    assert (outputs.min(), outputs.max()) == (3, 1585)
    assert outputs.mean() == pytest.approx(199, abs=0.5)
    for node, own in zip(known.app.nodes, known.output_tokens, strict=True):
        assert (node.requests.max_tokens == own).all()


@pytest.mark.parametrize(("documents", "most"), [(100, 60), (300, 201), (500, 201)])
def test_chain_summary(host: PluginHost, documents: int, most: int) -> None:
    app = build_named(host, f"chain-summary:documents={documents},judges=8").app
    summarise, judge = (n.requests for n in app.nodes)
    assert len(judge) == 8 * documents
    depth = np.ones(len(summarise), np.int64)
    for row, before in zip(summarise.input_row, summarise.input_request, strict=True):
        depth[row] = depth[before] + 1
    last = judge.input_request[::8]
    chunks = np.sort(depth[last])
    assert len(summarise) == chunks.sum()
    assert chunks[-1] == most
    assert np.median(chunks) == 3
    assert (judge.input_request.reshape(documents, 8) == last[:, None]).all()
    assert summarise.prompt_tokens.max() == 2048 + 60
    mixtral = build_named(host, "chain-summary:summariser=mixtral").app
    assert mixtral.nodes[0].model.name == "mistralai/Mixtral-8x7B-Instruct-v0.1"


def test_mixed(host: PluginHost) -> None:
    app = build_named(host, "mixed").app
    assert len(app.nodes) == 11
    assert sum(len(n.requests) for n in app.nodes if n.name.startswith("ensembling/")) == 45_000


def test_filter_vote_drops_items_for_all_models(host: PluginHost) -> None:
    app = build_named(host, "filter-vote:keep=0.4").app
    taken = draw_taken(app, np.random.default_rng(0))
    assert taken[1].mean() == pytest.approx(0.4, abs=0.03)
    assert all((taken[i] == taken[1]).all() for i in (2, 3, 4))


@pytest.mark.parametrize("number", range(1, 6))
def test_small_instances(host: PluginHost, number: int) -> None:
    loaded = build_named(host, f"small-{number}")
    assert loaded.app.name == f"small-{number}"
    assert 2 <= len(loaded.app.nodes) <= 4
    assert loaded.cluster is not None
    assert 2 <= loaded.cluster.num_gpus <= 4


def test_all_say_what_is_assumed_and_are_reproducible(host: PluginHost) -> None:
    names = host.names("application")
    assert len([n for n in names if n.startswith("small-")]) == 5
    for name in names:
        first, second = build_named(host, name), build_named(host, name)
        assert first.app.notes, name
        assert lengths(first.app) == lengths(second.app), name
        assert first.cluster is not None
        assert max(len(g) for g in first.cluster.nvlink_groups) == 2
    other = build_named(host, "ensembling:seed=1").app
    first_app = build_named(host, "ensembling").app
    assert lengths(other) != lengths(first_app)
    assert sorted(lengths(other)) == sorted(lengths(first_app))


def test_names_with_options(host: PluginHost) -> None:
    assert parse_named("a:b") == ("a:b", {})
    assert parse_named("d:a:n=1,x=true,s=mixtral") == ("d:a", {"n": 1, "x": True, "s": "mixtral"})
    qualified = build_named(host, "samullm-plugin:ensembling:requests=10,gpus=4")
    assert qualified.cluster is not None
    assert qualified.cluster.num_gpus == 4
    for text, message in (
        ("ensembling:requests=1,requests=2", "given twice"),
        ("ensembling:requests=", "is not option=value"),
        ("ensembling:request=5", "unknown option 'request'"),
        ("ensembling:requests=0", "requests: Input should be greater"),
        ("ensemblin", "did you mean 'ensembling'"),
        ("missing/app.yaml", "there is no such file"),
        ("chain-summary:max_tokens=2000", "max_tokens 2000 is too much"),
    ):
        with pytest.raises(InputError, match=message):
            find_application(host, text)
