"""What real CPU engines of tiny models hold: weights, groups of layers, capacity.

Run as a program, which imports vLLM once and forks for each kind; writes one JSON object by kind.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("LlamaConfig", "LlamaForCausalLM", {**BASE, "tie_word_embeddings": False}),
    "tied": ("Qwen2Config", "Qwen2ForCausalLM", {**BASE, "tie_word_embeddings": True}),
    "hybrid": ("Gemma3TextConfig", "Gemma3ForCausalLM",
               {**BASE, "num_hidden_layers": 6, "sliding_window": 64,
                "query_pre_attn_scalar": 32}),
}  # fmt: skip
BLOCKS, MAX_MODEL_LEN = 400, 1024


def found(folder: Path) -> dict[str, Any]:
    """Start an engine and return what it holds."""
    from vllm import EngineArgs
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.engine.llm_engine import LLMEngine

    counted = []
    pack = base_loader.process_weights_after_loading

    def count_and_pack(model: Any, *rest: Any) -> None:
        # Processors that oneDNN packs matrices for have them outside the parameters afterwards.
        counted.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        pack(model, *rest)

    base_loader.process_weights_after_loading = count_and_pack
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(folder), dtype="bfloat16", max_model_len=MAX_MODEL_LEN, max_num_seqs=16,
            max_num_batched_tokens=512, block_size=32, enforce_eager=True,
            skip_tokenizer_init=True, num_gpu_blocks_override=BLOCKS, async_scheduling=False,
            enable_prefix_caching=False,
        )
    )  # fmt: skip
    core = engine.engine_core.engine_core
    config = core.scheduler.kv_cache_config
    (weight_bytes,) = counted
    return {
        "weight_bytes": weight_bytes,
        "groups": [
            [len(g.layer_names), g.kv_cache_spec.block_size, g.kv_cache_spec.page_size_bytes]
            for g in config.kv_cache_groups
        ],
        "tokens": get_kv_cache_capacity(engine.vllm_config, config)[0],
    }


def make(folder: Path) -> None:
    """Write the model of a kind, the folder's name, and what its engine holds."""
    import torch
    import transformers

    config, model, sizes = KINDS[folder.name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    made.to(torch.bfloat16).save_pretrained(folder)
    (folder / "found.json").write_text(json.dumps(found(folder)))


def main(folder: Path) -> None:
    """Write the models and what their engines hold."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    import vllm.v1.engine.llm_engine  # noqa: F401  # for all of the forked processes

    for kind in KINDS:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                make(folder / kind)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
