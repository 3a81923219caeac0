from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from samullm_aiconfigurator.plugin import AiconfiguratorOptions, OperatorTables

from samullm_plugin.checkpoints.gpus import bundled_gpu
from samullm_plugin.errors import InputError, MissingExtraError
from samullm_plugin.measuring.judging import fit_host
from samullm_plugin.model.application import ModelSpec
from samullm_plugin.model.cluster import Gpu
from samullm_plugin.testing.latency_contract import LatencyModelContract, step_table

HAS_PACKAGE = find_spec("aiconfigurator_core") is not None
needs_package = pytest.mark.skipif(
    not HAS_PACKAGE, reason="needs the extra aiconfigurator (the package aiconfigurator)"
)
H100 = bundled_gpu("H100-80GB")
QWEN = ModelSpec("Qwen/Qwen3-32B", 8192)


def make(**options: object) -> OperatorTables:
    return OperatorTables(AiconfiguratorOptions.model_validate(options))


def test_without_the_package_the_message_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [m for m in sys.modules if m.startswith("aiconfigurator_core")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'samullm-plugin\[aiconfigurator\]'"):
        OperatorTables()


def test_host_time_is_found_despite_outliers() -> None:
    rng = np.random.default_rng(3)
    seqs = np.array([1, 4, 16, 64, 128, 256] * 4)
    device = 0.01 + 2e-5 * seqs
    measured = device + 2e-3 + 1e-5 * seqs + rng.normal(0, 2e-5, len(seqs))
    measured[5] += 0.2
    base, each = fit_host(seqs, device, measured)
    assert base == pytest.approx(2e-3, rel=0.05)
    assert each == pytest.approx(1e-5, rel=0.05)


def test_host_time_is_never_negative() -> None:
    seqs = np.array([1, 2, 4, 8])
    assert fit_host(seqs, np.full(4, 0.02), np.full(4, 0.01)) == (0.0, 0.0)
    base, each = fit_host(seqs, np.full(4, 0.01), 0.012 - 1e-5 * seqs)
    assert each == 0
    assert base == pytest.approx(2e-3, rel=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a correction"),
        ('{"base": "linear", "entries": []}', "corrects latency model linear"),
        ('{"base": "aiconfigurator"}', "entries: missing"),
        (
            '{"base": "aiconfigurator", "entries": [{"model": "m", "tensor_parallel_size": 1, '
            '"host_s": -1, "host_s_per_seq": 0}]}',
            "host_s",
        ),
    ],
)
@needs_package
def test_wrong_corrections_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "correction.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        make(correction=path)


@needs_package
class TestContract(LatencyModelContract):
    latency_class = OperatorTables
    model = QWEN
    gpu = H100
    sizes = (1, 2)


@needs_package
class TestMixtureContract(LatencyModelContract):
    latency_class = OperatorTables
    model = ModelSpec("Qwen/Qwen3-30B-A3B", 4096)
    gpu = bundled_gpu("H200-141GB")
    sizes = (1, 2)


@needs_package
class TestAgainstThePackage:
    @pytest.mark.parametrize(
        ("name", "gpu", "size"),
        [
            ("Qwen/Qwen3-32B", "H100-80GB", 2),
            ("meta-llama/Llama-3.1-8B", "A100-80GB", 1),
            ("meta-llama/Llama-3.1-70B", "H200-141GB", 8),
        ],
    )
    def test_steady_states_agree(self, name: str, gpu: str, size: int) -> None:
        from aiconfigurator.cli.api import cli_estimate

        renamed = name.replace("meta-llama/Llama", "meta-llama/Meta-Llama")
        device = bundled_gpu(gpu)
        system = {"H100": "h100_sxm", "A100": "a100_sxm", "H200": "h200_sxm"}[gpu[:4]]
        steps = make().step_latency(ModelSpec(name, 8192), device, size)
        for batch, isl, osl in ((1, 500, 200), (7, 1000, 300), (33, 1111, 777), (90, 300, 100)):
            found = cli_estimate(
                renamed, system, backend_name="vllm", isl=isl, osl=osl, batch_size=batch,
                tp_size=size,
            )  # fmt: skip
            context = isl + osl // 2
            decode, mixed = steps.step_seconds(
                step_table([(batch, context, 0, 0, 0), (max(batch - 1, 1), context, 1, isl, 0)])
            )
            tpot = decode if batch == 1 else (batch * mixed + (osl - batch) * decode) / osl
            assert 1e3 * tpot == pytest.approx(found.tpot, rel=0.02)

    def test_prefills_agree_between_the_points_asked_for(self) -> None:
        model = make()
        steps = model.step_latency(QWEN, H100, 2)
        operators = model._priced(QWEN, H100, 2, 1)
        rows = [(0, 0, 1, 777, 0), (0, 0, 1, 1500, 3000), (0, 0, 3, 901, 0)]
        wanted = [operators.prefill_s(n, t, c) for _, _, n, t, c in rows]
        assert steps.step_seconds(step_table(rows)) == pytest.approx(wanted, rel=0.02)


@needs_package
class TestWhatItCannotAnswer:
    @pytest.mark.parametrize(
        ("model", "gpu", "size", "options", "message"),
        [
            ("nobody/nothing", H100, 1, {}, "has no configuration of model 'nobody/nothing'"),
            (QWEN.name, Gpu("RTX4090-24GB", 2**34), 1, {}, "GPU RTX4090-24GB: not one of those"),
            (QWEN.name, Gpu("A100-40GB", 2**35), 1, {}, "GPU A100-40GB: not one of those"),
            (QWEN.name, H100, 1, {"systems": {"H100-80GB": "h1000"}}, "no system 'h1000'"),
            (QWEN.name, H100, 1, {"systems": {"H100-80GB": "a30"}}, "no vllm tables for a30"),
            (QWEN.name, H100, 3, {}, "num_heads 64 should be divisible by tp_size 3"),
            (QWEN.name, H100, 1, {"gemm_quant_mode": "nvfp4"}, "missing system flops"),
            (QWEN.name, H100, 1, {"gemm_quant_mode": "int3"}, "unknown name 'int3'"),
            (QWEN.name, H100, 1, {"backend_version": "0.1"}, "no vllm 0.1 tables for h100_sxm"),
            (QWEN.name, H100, 1, {"min_measured_share": 0.999}, "without measured operators"),
        ],
    )
    def test_it_is_said(
        self, model: str, gpu: Gpu, size: int, options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            make(**options).step_latency(replace(QWEN, name=model), gpu, size)

    def test_quantisation_is_not_guessed(self) -> None:
        engine = replace(QWEN.engine, extra=(("quantization", "fp8"),))
        with pytest.raises(InputError, match="gemm_quant_mode"):
            make().step_latency(replace(QWEN, engine=engine), H100, 1)

    def test_a_folder_without_configuration_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no config\.json"):
            make().step_latency(replace(QWEN, path=str(tmp_path)), H100, 1)

    def test_weights_that_do_not_fit_leave_no_cache(self) -> None:
        model = replace(QWEN, name="meta-llama/Llama-3.1-70B")
        assert make().kv_cache_tokens(model, H100, 1) == 0


@needs_package
def test_a_correction_adds_host_time_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "correction.json"
    entry = {"model": "Qwen3-32B", "tensor_parallel_size": 2, "device": "H100-80GB",
             "host_s": 1e-3, "host_s_per_seq": 1e-5, "mape_pct": 4.0}  # fmt: skip
    path.write_text(json.dumps({"base": "aiconfigurator", "entries": [entry]}))
    plain, corrected = make(), make(correction=path)
    rows = step_table([(64, 1024, 0, 0, 0), (10, 500, 1, 700, 0)])
    added = corrected.step_latency(QWEN, H100, 2).step_seconds(rows)
    added -= plain.step_latency(QWEN, H100, 2).step_seconds(rows)
    assert added == pytest.approx([1.64e-3, 1.11e-3])
    assert corrected.provenance(QWEN, H100, 2).error_pct == 4.0
    assert plain.provenance(QWEN, H100, 2).error_pct is None
    assert corrected.provenance(QWEN, H100, 1).error_pct is None


COLUMNS = "device,model,tp,phase,batch_size,context_tokens,max_seq_len,new_tokens,iter_s"


def fit_base(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    rows = [
        f"H100-80GB,Qwen/Qwen3-32B,2,decode,{b},{b * c},{c},{b},{0.02 + 1e-5 * b + 3e-7 * b * c}"
        for b in (1, 8, 32, 128)
        for c in (100, 1000)
    ]
    path = tmp_path / "iterations.csv"
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return subprocess.run(
        [sys.executable, "-m", "samullm_plugin", "profile", "fit", "--iterations", str(path),
         "--output", str(tmp_path / "correction.json"), *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_base_that_reads_no_correction_is_refused(tmp_path: Path) -> None:
    done = fit_base(tmp_path, "--base", "linear")
    assert done.returncode == 2
    assert "no option correction" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(HAS_PACKAGE, reason="tells what is missing without the package")
def test_a_missing_base_names_the_command(tmp_path: Path) -> None:
    done = fit_base(tmp_path, "--base", "aiconfigurator")
    assert done.returncode == 2
    assert "samullm-plugin[aiconfigurator]" in done.stderr
    assert "Traceback" not in done.stderr


@needs_package
def test_few_iterations_correct_the_tables(tmp_path: Path) -> None:
    done = fit_base(tmp_path, "--base", "aiconfigurator", "--output-json", "-")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["entries"][0]
    assert said["mape_pct"] < said["base_mape_pct"]
    written = make(correction=tmp_path / "correction.json")
    steps = step_table([(32, 1000, 0, 0, 0)])
    plain = make().step_latency(QWEN, H100, 2).step_seconds(steps)[0]
    corrected = written.step_latency(QWEN, H100, 2).step_seconds(steps)[0]
    assert corrected == pytest.approx(plain + said["host_s"] + 32 * said["host_s_per_seq"])
    wrong = fit_base(tmp_path, "--base", "aiconfigurator", "--base-options", "[]")
    assert wrong.returncode == 2
    assert "--base-options" in wrong.stderr
