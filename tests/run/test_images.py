"""Images in prompts: named by fields of rows, counted in plans, read by a small vision model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest

from samullm_plugin.app.bodies import image_parts, with_files
from samullm_plugin.app.loading import load_application, read_spec
from samullm_plugin.checkpoints.tokenizing import OwnTokenizers
from samullm_plugin.errors import InputError
from samullm_plugin.planning.planner import make_plan
from samullm_plugin.run.journal import read_journal
from samullm_plugin.run.run import start_run
from tests.models import make_tiny_vision
from tests.run.test_pipelines import ENGINE, outputs, setup_of

SIZES = {"a": (40, 30), "b": (70, 30), "c": (28, 28)}
APP = """
version: 1
name: look
models: {{v: {{model: v, path: {path}, max_model_len: 1024, engine_args: {engine}}}}}
nodes:
  own: {{model: v, requests: own.jsonl, sampling_params: &four {{max_tokens: 4, temperature: 0}}}}
  look:
    model: v
    requests: rows.jsonl
    messages: [{{system: Look.}}, {{image: picture}}, {{user: "What is {{{{ id }}}}?"}}]
    sampling_params: *four
  sure:
    model: v
    for_each: look
    messages: [{{image: picture}}, {{user: "{{{{ look }}}}, really?"}}]
    sampling_params: *four
"""


def _part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of an application: pictures, rows that name them, and conversations that hold them."""
    image = pytest.importorskip("PIL.Image", reason="makes the pictures")
    urls = {}
    for name, size in SIZES.items():
        data = io.BytesIO()
        image.new("RGB", size, (200, 60, 10)).save(data, "PNG")
        (tmp_path / f"{name}.png").write_bytes(data.getvalue())
        urls[name] = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    rows = [
        {"id": "file", "picture": "a.png"},
        {"id": "both", "picture": ["b.png", urls["c"]]},
        {"id": "none", "picture": None},
    ]
    asks = {"type": "text", "text": "what is"}
    own = [
        {"id": n, "messages": [{"role": "user", "content": [asks, _part(url)]}]}
        for n, url in urls.items()
    ]
    for name, lines in (("rows", rows), ("own", own)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return tmp_path


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_engines_count_images_as_the_plan_does(folder: Path) -> None:
    model = make_tiny_vision(folder / "v")
    engine = {k: v for k, v in ENGINE.items() if "structured" not in k}
    app = folder / "app.yaml"
    app.write_text(APP.format(path=model, engine=json.dumps(engine)))
    loaded = load_application(app, count_tokens=OwnTokenizers())
    planned = {
        (node.name, r): int(tokens)
        for node in loaded.app.nodes[:2]  # the third has outputs in its prompts
        for r, tokens in enumerate(node.requests.prompt_tokens)
    }
    tiles = [planned["own", k] for k in range(3)]
    assert tiles[0] == tiles[2] > tiles[1]  # four tiles, two, four
    assert not any("not counted" in n or "estimated" in n for n in loaded.app.notes)

    spec = read_spec(app)
    ready = setup_of(spec, spec.models, app, folder / "r", fused=True, cores=1)
    outcome = start_run(ready, make_plan(ready.host, ready.instance.problem, "min-heuristic").plan)
    assert outcome.failed == ()
    measured = {
        (r["node"], r["request"]): r["prompt_tokens"]
        for r in read_journal(folder / "r/events.jsonl")
        if r["kind"] == "finished" and r["node"] != "sure"
    }
    assert measured == planned
    assert set(outputs(folder / "r", "sure")) == {"file", "both", "none"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.png", "there is no file .*gone.png"),
        ("https://example.org/a.png", "nothing is downloaded during a run; download https"),
        (["a.png", 4], "it is a int; give a file or a data URL"),
    ],
)
def test_what_is_no_image(folder: Path, value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"node n: image picture: {message}"):
        image_parts({"picture": value}, "picture", folder, "node n")


def test_engines_are_given_the_contents_of_files(folder: Path) -> None:
    (part,) = image_parts({"picture": "a.png"}, "picture", folder, "n")
    (made,) = with_files([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
    url = made["content"][0]["image_url"]["url"]
    assert (
        base64.b64decode(url.removeprefix("data:image/png;base64,"))
        == (folder / "a.png").read_bytes()
    )
    assert made["content"][1] == {"type": "text", "text": "?"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("[{user: a}, {image: picture}]", "messages: behind the image 'picture' there is no user"),
        ("[{image: picture}, {user: a}]", "messages.image: model .*vicuna.* reads text only"),
    ],
)
def test_images_where_nobody_looks(folder: Path, messages: str, message: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text(json.dumps(config))
    app = folder / "app.yaml"
    app.write_text(
        "version: 1\nname: n\n"
        "models: {m: {model: lmsys/vicuna-13b-v1.5, architecture: lmsys/vicuna-13b-v1.5, path: m}}"
        f"\nnodes: {{x: {{model: m, requests: rows.jsonl, messages: {messages}, "
        "sampling_params: {max_tokens: 4}}}\n"
    )
    with pytest.raises(InputError, match=message):
        load_application(app)
