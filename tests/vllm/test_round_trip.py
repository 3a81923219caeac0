"""Every sampling parameter and chat option on its way from app.yaml or a line to vLLM and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from samullm_vllm.protocol import LENGTH, Submit, decode, encode

from samullm_plugin import EngineRequest, RequestOutput
from samullm_plugin.app.loading import load_application
from samullm_plugin.app.sampling import SamplingSection
from samullm_plugin.cli.app import main
from samullm_plugin.host.interfaces.moving import continued, move_rule
from samullm_plugin.run.asked import engine_request
from samullm_plugin.run.ledger import Ledger
from samullm_plugin.run.prompts import Prompt
from samullm_plugin.run.text_prompts import TextPrompts
from tests.models import make_tiny_llama

pytestmark = pytest.mark.vllm

VALUES: Mapping[str, Any] = {
    "max_tokens": 20,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.05,
    "seed": -(2**62),
    "stop": ["w7", "\u2028"],
    "stop_token_ids": [5, 6],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "presence_penalty": -1.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "bad_words": ["w9"],
    "logit_bias": {5: 99.0, 7: -3.5},
    "allowed_token_ids": [5, 7, 9],
    "logprobs": 2,
    "prompt_logprobs": 1,
    "logprob_token_ids": [5, 6],
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "structured_outputs": {"regex": "w[0-9]+"},
    "thinking_token_budget": 4,
    "repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2},
    "watermarking": False,
    "skip_reading_prefix_cache": True,
    "extra_args": {"a": [1, 2.5, "x"]},
}
"""A value of each parameter that is not what vLLM takes without it."""

VLLM = """
import json, sys
from samullm_vllm.protocol import LENGTH, decode
from samullm_vllm.sampling import sampling_params
import msgspec

plain = lambda v: vars(v) if hasattr(v, "__dict__") else {f: getattr(v, f) for f in v.__slots__}
frames = json.load(sys.stdin)
found = {}
for name, frame in frames.items():
    request = decode(bytes.fromhex(frame)).requests[0]
    params = sampling_params(request, object())
    found[name] = {
        f: v if isinstance(v := getattr(params, f), (int, float, str, list, dict, type(None)))
        else plain(v) if hasattr(v, "__dataclass_fields__") else repr(v)
        for f in (s.name for s in msgspec.structs.fields(params))
    }
json.dump(found, sys.stdout)
"""


def requests_of(folder: Path, sampling: Mapping[str, Any], where: str) -> EngineRequest:
    """Return a node's first request with parameters from app.yaml, from ``extra``, or its line."""
    line: dict[str, Any] = {"id": "a", "prompt": "w3"}
    section: dict[str, Any] = {"max_tokens": 30}
    if where == "line":
        line["sampling_params"] = sampling
    elif where == "extra":
        section["extra"] = sampling
    else:
        section |= sampling
    node = {"model": "m", "requests": "r.jsonl", "sampling_params": section}
    model = {"model": "lmsys/vicuna-13b-v1.5"}
    app = {"version": 1, "name": "t", "models": {"m": model}, "nodes": {"n": node}}
    (folder / "r.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "app.yaml").write_text(yaml.safe_dump(app))
    loaded = load_application(folder / "app.yaml")
    made = TextPrompts(loaded).prepare((0, 0), Ledger(loaded.app))
    assert isinstance(made, Prompt)
    return engine_request(0, made)


def over_the_wire(request: EngineRequest) -> EngineRequest:
    message = decode(encode(Submit((request,)))[LENGTH.size :])
    assert isinstance(message, Submit)
    return message.requests[0]


def test_every_parameter_reaches_vllm(tmp_path: Path) -> None:
    """From each place it can be written, through the channel, and again after a move."""
    assert VALUES.keys() == SamplingSection.model_fields.keys() - {"n", "extra"}
    frames, expected = {}, {}
    for name, value in VALUES.items():
        for where in ("node", "extra", "line"):
            request = over_the_wire(requests_of(tmp_path, {name: value}, where))
            cut = RequestOutput(0, 2, (8, 9), prompt_token_ids=(3,), logprobs=((), ()))
            moved = continued(request, cut)
            assert (moved is request) == (move_rule(request.sampling) != "carry")
            for stage, one in (("", request), (" moved", over_the_wire(moved))):
                frames[f"{name} {where}{stage}"] = encode(Submit((one,)))[LENGTH.size :].hex()
                want = value
                if stage and moved is not request:
                    want = {"max_tokens": 18, "min_tokens": 1}.get(name, value)
                expected[f"{name} {where}{stage}"] = json.loads(json.dumps(want))
    done = subprocess.run(
        [sys.executable, "-c", VLLM],
        input=json.dumps(frames),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    for key, want in expected.items():
        got = found[key][key.partition(" ")[0]]
        if isinstance(want, dict) and isinstance(got, dict):
            got = {k: got[k] for k in want}
        assert got == want, key


LINES: list[dict[str, Any]] = [
    {"custom_id": "choices", "body": {"prompt": "w3 w4", "n": 3, "temperature": 1, "seed": 7}},
    {"custom_id": "logprobs", "body": {"prompt": "w3 w4", "logprobs": 2, "prompt_logprobs": 1}},
    {
        "custom_id": "chat",
        "body": {
            "messages": [
                {"role": "system", "content": "w5"},
                {"role": "user", "content": [{"type": "text", "text": "w3"}, "w4"]},
            ],
            "logprobs": True,
            "top_logprobs": 2,
            "chat_template_kwargs": {"enable_thinking": False},
            "tools": [{"type": "function", "function": {"name": "w9"}}],
        },
    },
    {"custom_id": "bias", "body": {"prompt": "w3", "logit_bias": {"5": 100}, "max_tokens": 3}},
    {
        "custom_id": "template",
        "body": {
            "messages": [{"role": "user", "content": "w3"}],
            "chat_template": "{{ messages[0]['content'] }} w6 w6",
            "max_completion_tokens": 2,
        },
    },
    {
        "custom_id": "image",
        "body": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
                    ],
                }
            ]
        },
    },
    {
        "custom_id": "form",
        "body": {
            "prompt": "w3",
            "structured_outputs": {"choice": ["w7"]},
            "ignore_eos": False,
        },
    },
]

TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}w8 {% endif %}"
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
)


def test_batch_lines_are_answered_as_they_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The outputs of real engines hold every choice, probability and form asked for."""
    model = make_tiny_llama(tmp_path / "m", tokenizer=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": TEMPLATE})
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    node = {"model": "m", "requests": "r.jsonl", "sampling_params": {"max_tokens": 5}}
    node["sampling_params"] |= {"temperature": 0, "ignore_eos": True}  # type: ignore[operator]
    engine = {"dtype": "float32", "block_size": 32, "gpu_memory_utilization": 0.3}
    app = {
        "version": 1,
        "name": "t",
        "models": {"m": {"model": "tiny", "path": str(model), "max_model_len": 512,
                         "engine_args": engine}},
        "nodes": {"n": node},
        "on_bad_row": "skip",
        "cluster": {"gpus": 1, "gpu": "A100-80GB", "gpu_memory_gib": 2},
        "planner": {"length_estimator": "fixed", "scheduler": "max-heuristic"},
        "executor": "vllm",
    }  # fmt: skip
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(app))
    code = main(["run", str(tmp_path / "app.yaml"), "--output-dir", str(tmp_path / "run")])
    shown = capsys.readouterr().err
    assert code == 1, shown
    lines = (tmp_path / "run/outputs/n.jsonl").read_text().splitlines()
    found = {line["custom_id"]: line for line in map(json.loads, lines)}
    assert list(found) == [line["custom_id"] for line in LINES]
    bodies = {k: v["response"] and v["response"]["body"] for k, v in found.items()}
    assert "image" in found["image"]["error"]["message"]
    assert {k for k, v in found.items() if v["error"]} == {"image"}

    choices = bodies["choices"]["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    assert len({c["text"] for c in choices}) == 3
    assert bodies["choices"]["usage"]["completion_tokens"] == 15

    (choice,) = bodies["logprobs"]["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 5
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())  # the most likely one was taken
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["4"]["decoded_token"].strip() == "w4"

    chat = bodies["chat"]
    # tool, no-thinking mark, two roles that are no words of it, and their three words
    assert chat["usage"]["prompt_tokens"] == 7
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert all(len(c["top_logprobs"]) == 2 for c in content)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert bodies["bias"]["choices"][0]["text"].split() == ["w5"] * 3
    usage = bodies["template"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2)
    assert bodies["form"]["choices"][0]["text"].strip() == "w7"
