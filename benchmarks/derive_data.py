"""Derive what is bundled in ``samullm_plugin/data`` from measurements, and from transformers.

    python benchmarks/derive_data.py latency FOLDER    # latency/a100-80gb.json
    python benchmarks/derive_data.py lengths FOLDER    # lengths/{no_robots,workloads}.json
    python benchmarks/derive_data.py model-defaults    # model_defaults.json

``FOLDER`` holds the published measurements. The bundled profile was written by an earlier version
of the fit (mean error of iterations 2.5 %; the present one has 2.3 %). It is kept, because every
simulated figure in the docs and the stored instances were made with it: write it anew together
with them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from samullm_plugin.model.types import Floats, Ints
from samullm_plugin.profiling.fit import fit_profile
from samullm_plugin.profiling.iterations import read_architectures, read_iterations
from samullm_plugin.profiling.profile_files import EngineStart, write_profile

BUNDLED = Path(__file__).resolve().parents[1] / "samullm_plugin" / "data"
DEFAULTS_FILE = BUNDLED / "model_defaults.json"
LATENCY_FILE = BUNDLED / "latency" / "a100-80gb.json"
LATENCY_SOURCE = "fitted to iteration logs of puddingfjz/vllm @ de1677dc, Apache-2.0"
MAX_NUM_SEQS = 512


def engine_starts(data: Path) -> list[EngineStart]:
    """Return recorded peak memory, KV blocks and warm start seconds, by model and size."""
    with (data / "a100_engine_meta.csv").open(encoding="utf-8") as file:
        meta = {(r["model"], r["tp"]): r for r in csv.DictReader(file)}
    starts = []
    with (data / "model_constants.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            recorded = meta.get((row["model"], row["tp"]))
            fields: dict[str, float | int | None] = {}
            if row["peak_memory"]:
                # The first implementation's rule: a whole prompt must fit into one iteration.
                tokens = max(int(float(row["max_seq_len"])), 2048)
                fields = {
                    "peak_bytes": float(row["peak_memory"]),
                    "block_bytes": float(row["cache_block_bytes"]),
                    "num_blocks": int(float(row["gpu_blocks"])),
                    "max_num_batched_tokens": tokens,
                    "max_num_seqs": MAX_NUM_SEQS,
                }
                if recorded is not None:
                    fields["total_bytes"] = float(recorded["total_gpu_memory"])
                    fields["max_num_batched_tokens"] = int(recorded["max_num_batched_tokens"])
            if row["init_cost_s_used"]:
                fields["warm_s"] = round(float(row["init_cost_s_used"]), 2)
            if fields:
                start = {"model": row["model"], "tensor_parallel_size": int(row["tp"]), **fields}
                starts.append(EngineStart.model_validate(start))
    return starts


def derive_latency(data: Path) -> None:
    """Write the A100-80GB profile from the published measurements."""
    profile = fit_profile(
        read_iterations(data / "a100_iterations.csv.gz"),
        read_architectures(data / "model_architectures.csv"),
        source=LATENCY_SOURCE,
        transfer=True,
        starts=engine_starts(data),
    )
    write_profile(profile, LATENCY_FILE)
    print(f"{LATENCY_FILE.name}: {len(profile.models)} models and sizes")


GRID = np.unique(
    np.round(
        np.concatenate(
            (np.arange(0, 0.95, 0.0025), np.arange(0.95, 0.99, 0.001), np.arange(0.99, 1, 0.00025))
        ),
        6,
    )
)
PROBABILITIES = np.append(GRID, 1.0)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a gzipped CSV file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quantiles(lengths: Ints, mass: Floats) -> list[int]:
    """Return the lengths at which the distribution function reaches ``PROBABILITIES``."""
    order = np.argsort(lengths)
    cdf = np.cumsum(mass[order]) / mass.sum()
    index = np.searchsorted(cdf - 1e-9, np.maximum(PROBABILITIES, 1e-9))
    return [int(v) for v in lengths[order][np.minimum(index, len(cdf) - 1)]]


def no_robots(data: Path) -> dict[str, object]:
    """Return quantiles of the outputs of each model that were not cut, and the share that was."""
    models: dict[str, object] = {}
    rows = [r for r in read_rows(data / "output_lengths.csv.gz") if "no_robots" in r["dataset"]]
    for name in dict.fromkeys(r["model"] for r in rows):
        seen = [r for r in rows if r["model"] == name and r["kind"] == "observed"]
        cut = [r for r in rows if r["model"] == name and r["kind"] == "censored"]
        mass = np.array([float(r["prob"]) for r in seen])
        lengths = np.array([int(r["output_len"]) for r in seen], np.int64)
        models[name] = {
            "num_observations": sum(int(r["count_est"]) for r in (*seen, *cut)),
            "cut_mass": round(sum(float(r["prob"]) for r in cut), 8),
            "cut_at": max((int(r["output_len"]) for r in cut), default=0),
            "lengths": quantiles(lengths, mass) if seen else [],
        }
    return models


def workloads(data: Path) -> dict[str, object]:
    """Return quantiles of prompt and output lengths of other real workloads."""
    folder = data / "workloads"
    share = [r for r in read_rows(data / "output_lengths.csv.gz") if r["kind"] == "reference"]
    pairs = {
        "sharegpt": [(int(r["input_len"]), int(r["output_len"])) for r in share],
        **{
            name: [
                (int(r["num_prefill_tokens"]), int(r["num_decode_tokens"]))
                for r in read_rows(folder / file)
            ]
            for name, file in (
                ("azure-conv", "azure2023_splitwise_conv.csv.gz"),
                ("azure-code", "azure2023_splitwise_code.csv.gz"),
                ("arxiv", "arxiv_summarization_lengths.csv.gz"),
            )
        },
    }
    tables = {}
    for name, rows in pairs.items():
        table = np.array(rows, np.int64)
        ones = np.ones(len(table))
        tables[name] = {
            "num_observations": len(table),
            "prompt_lengths": quantiles(np.maximum(table[:, 0], 1), ones),
            "lengths": quantiles(np.maximum(table[:, 1], 1), ones),
        }
    return tables


def _write(path: Path, source: str, terms: str, name: str, tables: dict[str, object]) -> None:
    """Write a table file, one model or workload per line."""
    head = {
        "format": "samullm-length-quantiles-1",
        "source": source,
        "license": terms,
        "probabilities": [float(p) for p in PROBABILITIES],
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in head.items()]
    rows = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in tables.items()]
    body = ",\n".join(lines) + f",\n{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}"
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")


def derive_lengths(data: Path) -> None:
    """Write quantiles of the measured output lengths, by model and by workload."""
    _write(
        BUNDLED / "lengths" / "no_robots.json",
        "output lengths of about 9,890 No Robots prompts at temperature 1.0, "
        "puddingfjz/vllm @ de1677dc",
        "Apache-2.0",
        "models",
        no_robots(data),
    )
    _write(
        BUNDLED / "lengths" / "workloads.json",
        "ShareGPT replies: puddingfjz/vllm @ de1677dc (Apache-2.0); Azure LLM inference trace 2023 "
        "(CC-BY-4.0) and arXiv summarisation: via microsoft/vidur @ 7d475133 (MIT)",
        "see source",
        "workloads",
        workloads(data),
    )


READ = re.compile(
    r"^(vocab_size.*|padded_vocab_size|hidden_size.*|n_embe?d|d_model|num_hidden_layers|n_layers?|"
    r"num_layers|num_attention_heads|n_heads?|num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|"
    r"head_dim|attention_head_dim|kv_channels|.*intermediate_size.*|n_inner|ffn_dim|ffn_hidden_size|"
    r"expert_ffn_hidden_size|dense_intermediate_size|block_.*|expansion_ratio|mlp_ratio|depth|"
    r"embed_dim|.*lora_rank|qk_.*head_dim|v_head_dim|index_.*|.*experts?|.*experts_per_tok.*|"
    r"moe_.*|first_k_dense_replace|num_dense_layers|decoder_sparse_step|interleave_moe_layer_step|"
    r"expert_layer_.*|attn_layer_.*|mlp_only_layers|sliding_window.*|use_sliding_window|"
    r"max_window_layers|attention_chunk_size|no_rope_layer.*|max_position_embeddings|n_positions|"
    r"n_ctx|max_seq_len|seq_length|max_seq_length|model_max_length|max_target_positions|"
    r"tie_word_embeddings|multi_query|new_decoder_architecture|word_embed_proj_dim|"
    r"learned_pos_emb|mamba_.*|ssm_state_size|state_size|conv_kernel|expand|n_groups|num_heads|"
    r"time_step_rank|conv_L_cache|linear_.*|global_attn_every_n_layers|gating|patch_size|"
    r"num_channels|in_channels|image_size|temporal_patch_size|spatial_merge_size|out_hidden_size|"
    r"num_kv_shared_layers|global_head_dim|num_global_key_value_heads|attention_k_eq_v|"
    r"hidden_size_per_layer_input|vocab_size_per_layer_input|laurel_rank|altup_num_inputs|"
    r"enable_moe_block|use_double_wide_mlp|adapter_rank|num_mem_blocks|"
    r"use_shared_attention_adapter|use_mem_rope|n_mamba_heads|use_post_norm|layer_types|"
    r"full_attention_interval|shared_expert.*|share_expert_dim|n_shared_experts|zero_expert_num|"
    r"use_bias|use_qkv_bias|bias|attention_bias|mlp_bias|use_conv_bias|is_moe|"
    r"add_swa_attention_sink_bias|swa_.*|projector_.*|text_hidden_size|downsample_.*|scale_factor|"
    r"depths|deepstack_visual_indexes|num_global_layers|vision_output_dim|projection_dim)$"
)
SECTIONS = ("text_config", "vision_config", "attn_config", "ffn_config", "llm_config")


def derive_model_defaults() -> None:
    """Write what transformers' configuration classes say by default.

    A ``config.json`` leaves out what its class has by default, and each class names its fields its
    own way. The file names the version of transformers.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    classes = dict(CONFIG_MAPPING.items())
    kinds = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted(kinds):
        cls = classes[kind]
        try:
            config = json.loads(cls().to_json_string(use_diff=False))
        except Exception as error:  # classes without a default
            print(f"{kind}: {type(error).__name__}: {error}")
            continue
        _drop_computed(cls, config)
        _add(found, classes, kind, config, dict(getattr(cls, "attribute_map", {})))
    text = json.dumps(
        {
            "source": f"configuration classes of transformers {transformers.__version__}",
            "families": found,
        },
        sort_keys=True,
    )
    text = text.replace('}, "', '},\n"')
    DEFAULTS_FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{len(found)} families, {DEFAULTS_FILE.stat().st_size:,} bytes")


def _drop_computed(cls: type, config: dict[str, Any]) -> None:
    """Drop, in place, what a class computes from its other fields: the reader does so itself."""
    for canonical in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        name = getattr(cls, "attribute_map", {}).get(canonical, canonical)
        if not isinstance(config.get(name), int):
            continue
        try:
            changed = json.loads(cls(**{name: 2 * config[name]}).to_json_string(use_diff=False))
        except Exception as error:  # not every size is allowed
            print(f"{cls.__name__}: {name} doubled: {type(error).__name__}")
            continue
        for key, value in changed.items():
            if key != name and key in config and value != config[key]:
                del config[key]


def _add(
    found: dict[str, dict[str, Any]],
    classes: Mapping[str, Any],
    kind: str,
    config: Mapping[str, Any],
    aliases: dict[str, str],
) -> None:
    """Keep what is read of one class, and of the classes of its sections."""
    entry: dict[str, Any] = {
        k: v
        for k, v in config.items()
        if READ.match(k) and _plain(v) and not (isinstance(v, list) and len(v) > 8)
    }
    entry.pop("layer_types", None)
    for section in SECTIONS:
        part = config.get(section)
        if isinstance(part, dict):
            name = part.get("model_type") or f"{kind}.{section}"
            entry[section] = {"model_type": name}
            if name not in found:
                own_class = classes.get(name)
                whole = part
                if own_class is not None:
                    try:
                        whole = json.loads(own_class().to_json_string(use_diff=False))
                        _drop_computed(own_class, whole)
                    except Exception as error:  # some classes have no default
                        print(f"{name}: {type(error).__name__}")
                _add(found, classes, name, whole, {})
            if name in found:
                own = {k: v for k, v in part.items() if k in found[name] and _plain(v)}
                entry[section] |= {k: v for k, v in own.items() if found[name][k] != v}
    if aliases:
        entry["aliases"] = aliases
    found[kind] = entry


def _plain(value: object) -> bool:
    """Return whether a value is a number, a flag, nothing or a short list of numbers."""
    if isinstance(value, list):
        return all(isinstance(v, int) for v in value)
    return value is None or isinstance(value, bool | int | float)


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("latency", "lengths", "model-defaults"))
    parser.add_argument("folder", nargs="?", type=Path, help="of the measurements")
    given = parser.parse_args()
    if given.what == "model-defaults":
        derive_model_defaults()
        return
    if given.folder is None or not given.folder.is_dir():
        parser.error(f"{given.what}: name the folder of the measurements")
    derive_latency(given.folder) if given.what == "latency" else derive_lengths(given.folder)


if __name__ == "__main__":
    main()
