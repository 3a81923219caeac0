"""The bundled models, and tiny ones with random weights in the format that vLLM loads."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

BUNDLED = tuple(
    json.loads((files("samullm_plugin") / "data" / "models.json").read_text())["models"]
)
"""Names of the models whose figures are bundled."""

LLAMA_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def make_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_position_embeddings: int = 2048,
    tokenizer: bool = False,
    characters: bool = False,
    **sizes: int,
) -> Path:
    """Write a Llama of a few thousand weights and return its folder.

    Args:
        folder: where; made if it is not there.
        seed: of the weights.
        dtype: in which they are stored.
        max_position_embeddings: longest sequence.
        tokenizer: also write one, of words w3, w4, ... and the usual three special ones.
        characters: also write one, of single printable characters, which can spell anything.
        sizes: configuration fields to set otherwise than ``LLAMA_SIZES``.
    """
    torch = pytest.importorskip("torch", reason="torch writes the weights")
    from safetensors.torch import save_file

    config = {**LLAMA_SIZES, **sizes}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        scale = 1.0 if len(shape) == 1 else 2.0 * shape[1] ** -0.5
        return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv, vocab = head * config["num_key_value_heads"], config["vocab_size"]
    weights = {"model.embed_tokens.weight": random(vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.self_attn.q_proj.weight": random(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": random(kv, hidden),
            f"{at}.self_attn.v_proj.weight": random(kv, hidden),
            f"{at}.self_attn.o_proj.weight": random(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": random(inner, hidden),
            f"{at}.mlp.up_proj.weight": random(inner, hidden),
            f"{at}.mlp.down_proj.weight": random(hidden, inner),
            f"{at}.input_layernorm.weight": torch.ones(hidden, dtype=getattr(torch, dtype)),
            f"{at}.post_attention_layernorm.weight": torch.ones(
                hidden, dtype=getattr(torch, dtype)
            ),
        }
    weights["model.norm.weight"] = torch.ones(hidden, dtype=getattr(torch, dtype))
    weights["lm_head.weight"] = random(vocab, hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    if tokenizer or characters:
        _write_tokenizer(folder, vocab, characters=characters)
    return folder


def make_tiny_adapter(folder: Path, *, seed: int = 0, rank: int = 4, **sizes: int) -> Path:
    """Write a LoRA adapter of :func:`make_tiny_llama`, as PEFT does; return its folder.

    Args:
        folder: where.
        seed: of the weights.
        rank: of its matrices.
        sizes: of the model, where they are other than ``LLAMA_SIZES``.
    """
    torch = pytest.importorskip("torch", reason="torch writes the weights")
    from safetensors.torch import save_file

    config = {**LLAMA_SIZES, **sizes}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    modules = {"self_attn.q_proj": (hidden, hidden), "mlp.down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (out, into) in modules.items():
            at = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{at}.lora_A.weight"] = 0.3 * torch.randn(rank, into, generator=generator)
            weights[f"{at}.lora_B.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "down_proj"], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def make_tiny_encoder(folder: Path, *, labels: int = 0, seed: int = 0) -> Path:
    """Write a BERT of a few thousand weights that reads characters; return its folder.

    Args:
        folder: where.
        labels: of a sequence classifier; 0: it embeds.
        seed: of the weights.
    """
    torch = pytest.importorskip("torch", reason="torch writes the weights")
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lengths = {"intermediate_size": 128, "max_position_embeddings": 512}
    kind, names = (
        (BertForSequenceClassification, {"num_labels": labels}) if labels else (BertModel, {})
    )
    config = BertConfig(vocab_size=128, initializer_range=0.5, **sizes, **lengths, **names)
    kind(config).save_pretrained(folder)
    _write_pair_tokenizer(folder)
    return folder


def make_tiny_reward(folder: Path, *, seed: int = 0) -> Path:
    """Write a Llama that gives a text one number; return its folder."""
    torch = pytest.importorskip("torch", reason="torch writes the weights")
    from safetensors.torch import load_file, save_file

    make_tiny_llama(folder, seed=seed, characters=True, vocab_size=104)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    generator = torch.Generator().manual_seed(seed)
    weights["score.weight"] = torch.randn(1, config["hidden_size"], generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_tiny_vision(folder: Path, *, seed: int = 0) -> Path:
    """Write an Idefics3 of a few thousand weights that reads characters and images.

    An image is made 56 pixels wide or high and cut into tiles of 28 x 28, of 4 tokens each.
    """
    torch = pytest.importorskip("torch", reason="torch writes the weights")
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tiles = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=104,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "image_size": 28, "patch_size": 7,
            "initializer_range": 0.5, **heads,
        },
        text_config={
            "model_type": "llama", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128,
            "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5, **heads,
        },
    )  # fmt: skip
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    _write_tokenizer(folder, 104, characters=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {"id": 104 + k, "content": mark, "special": True, **flags} for k, mark in enumerate(marks)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": 28},
        "size": {"longest_edge": 56},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _write_pair_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters that marks one text, or two, as BERT's does."""
    pytest.importorskip("tokenizers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(chr(c) for c in range(32, 127)), "\n"]
    words = {w: i for i, w in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # no password
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {f"{n}_token": f"[{n.upper()}]" for n in ("unk", "pad", "cls", "sep")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **marks,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_tokenizer(folder: Path, vocab_size: int, *, characters: bool) -> None:
    """Write a tokenizer of whole words or characters, and a chat template that joins messages."""
    pytest.importorskip("tokenizers")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    spelled = [chr(c) for c in range(32, 127)] + ["\n"]
    names = spelled if characters else [f"w{i}" for i in range(3, vocab_size)]
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {w: i for i, w in enumerate(names, 3)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if characters:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 1_000_000,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
