"""A ``config.json`` with what its class has by default, under the names most classes use.

The longest sequence of a model is derived from it as vLLM does (``_get_and_verify_max_len``).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from samullm_plugin.errors import InputError

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "num_layer"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads", "num_attention_groups",
    ),
    "head_dim": ("attention_head_dim", "hidden_size_per_head"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_hidden_size"),
    "vocab_size": ("padded_vocab_size", "n_vocab"),
    "num_experts": (
        "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
    ),
    "num_experts_per_tok": (
        "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
        "num_selected_experts",
    ),
    "moe_intermediate_size": ("expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "layer_types": ("layers_block_type",),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "model_max_length"),
}  # fmt: skip
"""What one and the same size is called; the first is the name most classes use."""

TEXT_SECTIONS = (
    "text_config", "llm_config", "language_config", "language_model_config",
)  # fmt: skip
"""Where a language model is described that is not alone in its file."""


_REMOTE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "minicpm": {"tie_word_embeddings": True},
    "exaone": {"tie_word_embeddings": True},
}
"""Of classes that come with the model's files: what those files do not say and sizes depend on."""


@cache
def _defaults() -> Mapping[str, Mapping[str, Any]]:
    file = files("samullm_plugin") / "data" / "model_defaults.json"
    families: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text("utf-8"))["families"]
    return {**families, **_REMOTE_DEFAULTS}


def has_defaults(kind: str) -> bool:
    """Return whether the defaults of a ``model_type`` are known: transformers has its class."""
    return kind in _defaults() and kind not in _REMOTE_DEFAULTS


@dataclass(frozen=True, slots=True)
class HfConfig:
    """One section of a ``config.json``: the language model's, or the vision tower's.

    Attributes:
        where: file and section, for messages.
        kind: its ``model_type``.
        given: what the file says.
        defaults: what its class says of the rest.
        asked: the field that was read last, for messages.
    """

    where: str
    kind: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    asked: deque[str] = field(default_factory=lambda: deque(maxlen=1), compare=False, repr=False)

    def names(self, name: str) -> tuple[str, ...]:
        """Return what a field is called here, its usual name first."""
        alias = self.defaults.get("aliases", {}).get(name)
        return tuple(n for n in (name, alias, *_SPELLINGS.get(name, ())) if n)

    def get(self, name: str, otherwise: Any = None) -> Any:
        """Return a field; what the file says, ``null`` included, comes before any default.

        A field written twice under two names counts where it is not ``null``.
        """
        names = self.names(name)
        self.asked.append(next((n for n in names if n in self.given), name))
        for values in (self.given, self.defaults):
            found = [values[n] for n in names if n in values]
            if found:
                return next((v for v in found if v is not None), None)
        return otherwise

    def has(self, name: str) -> bool:
        """Return whether the file itself says something of a field."""
        return any(self.given.get(n) is not None for n in self.names(name))

    def number(self, name: str, otherwise: int | None = None) -> int:
        """Return a whole number.

        Raises:
            InputError: naming the field, if it is missing or no whole number.
        """
        value = self.get(name)
        if value is None:
            if otherwise is not None:
                return otherwise
            raise InputError(f"{self.where}: none of {', '.join(self.names(name))} is given")
        if isinstance(value, list) and value and len({str(v) for v in value}) == 1:
            value = value[0]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{self.where}: {name} is {value!r}; it must be a whole number")
        return value

    def flag(self, name: str, otherwise: bool = False) -> bool:
        """Return a truth value."""
        value = self.get(name)
        return otherwise if value is None else bool(value)

    def section(self, name: str) -> HfConfig | None:
        """Return a section of this one, None if the file has none."""
        given = self.given.get(name)
        if not isinstance(given, Mapping):
            return None
        assumed = dict(self.defaults.get(name) or {})
        kind = str(given.get("model_type") or assumed.get("model_type") or f"{self.kind}.{name}")
        defaults = dict(_defaults().get(kind, {}))
        if kind == assumed.get("model_type"):
            defaults |= assumed
        return HfConfig(f"{self.where}: {name}", kind, given, defaults)


@contextmanager
def readable(section: HfConfig | None, where: str) -> Iterator[None]:
    """Turn values of another kind than their names promise into a message.

    Args:
        section: which is read, to name its field that was read last; None: no field is named.
        where: file and section.

    Raises:
        InputError: naming it.
    """
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        for name in section.asked if section is not None else ():
            if section is not None and name in section.given:
                where += f": {name} is {str(section.given[name])[:60]!r}"
        raise InputError(f"{where}: cannot be used: {error}") from error


def load_json(file: Path, what: str) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        InputError: if it cannot be read or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: there is no such file; give the folder of a model in Hugging Face's format, "
            "which holds a config.json"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: cannot be read as {what}: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: {what} must be a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A model's ``config.json``.

    Attributes:
        file: where it is.
        folder: the model's folder; None if the file stands alone.
        raw: everything it says of what an engine loads.
        top: its outermost section.
        text: the language model's section; ``top`` itself if there is no other.
        vision: the vision tower's, if there is one.
    """

    file: Path
    folder: Path | None
    raw: Mapping[str, Any]
    top: HfConfig
    text: HfConfig
    vision: HfConfig | None


def read_config_file(path: Path) -> ConfigFile:
    """Return a ``config.json``, given itself or by its folder.

    Raises:
        InputError: if there is none, or it is not a language model's.
    """
    folder = path if path.is_dir() else None
    file = path / "config.json" if folder else path
    raw = load_json(file, "a model's config.json")
    kind = str(raw.get("model_type") or "")
    if not kind:
        raise InputError(
            f"{file}: it names no model_type, so it is not the configuration of a language model; "
            "give the folder of a model in Hugging Face's format"
        )
    if isinstance(thinker := raw.get("thinker_config"), Mapping):
        kind = f"{kind}_thinker"  # the part that writes; engines leave out the one that speaks
        shared = ("dtype", "torch_dtype", "quantization_config")
        raw = {**{k: v for k, v in raw.items() if k in shared}, **thinker, "model_type": kind}
    flat = dict(raw)
    for name in ("attn_config", "ffn_config"):  # DBRX and MPT nest what others do not
        if isinstance(raw.get(name), Mapping):
            flat = {**raw[name], **flat}
    top = HfConfig(str(file), kind, flat, _defaults().get(kind, {}))
    text = _language_model(top)
    vision = top.section("vision_config")
    return ConfigFile(
        file,
        folder or (file.parent if file.name == "config.json" else None),
        raw,
        top,
        text,
        vision,
    )


def _language_model(top: HfConfig) -> HfConfig:
    """Return the section of the language model: the outermost, unless it has one inside."""
    assumed = (top.defaults.get("text_config") or {}).get("model_type")
    found = next((p for n in TEXT_SECTIONS if (p := top.section(n)) is not None), None)
    if found is None:
        # Older files of models with images hold the language model's sizes outside of any section.
        inside = assumed and any(top.given.get(n) for n in top.names("num_hidden_layers"))
        if not assumed:
            return top
        given = top.given if inside else {}
        defaults = {**_defaults().get(str(assumed), {}), **top.defaults["text_config"]}
        return HfConfig(top.where, str(assumed), given, defaults)
    shared = ("tie_word_embeddings", "dtype", "torch_dtype")
    given = {k: v for k, v in top.given.items() if k in shared and v is not None}
    return HfConfig(found.where, found.kind, {**given, **found.given}, found.defaults)


_LENGTH_FIELDS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_UNSCALED_ROPE = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default",
     "mrope", "proportional"}
)  # fmt: skip
_USUAL_LENGTH = 2048


def derived_max_model_len(file: ConfigFile) -> int:
    """Return the longest prompt plus output that vLLM takes by default."""
    text = file.text
    found = [v for n in _LENGTH_FIELDS if isinstance(v := _length(file, n), int)]
    longest: float = min(found) if found else float("inf")
    if isinstance(own := _length(file, "model_max_length"), int) and own:
        longest = own
    if file.folder is not None and (path := file.folder / "tokenizer_config.json").is_file():
        limit = load_json(path, "a tokenizer's configuration").get("model_max_length")
        if isinstance(limit, int | float) and limit > 0:
            longest = min(longest, limit)
    if longest == float("inf"):
        return _USUAL_LENGTH
    parameters = list(_rope_parameters(text))
    if "gemma3" not in file.top.kind:
        factor = 1.0
        for rope in parameters:
            if _rope_type(rope) not in _UNSCALED_ROPE:
                factor = float(rope.get("factor") or factor)
        longest *= factor
    if any(_rope_type(rope) in ("longrope", "su") for rope in parameters):
        longest = next(
            (int(v) for s in (text.given, *parameters)
             if (v := s.get("original_max_position_embeddings"))), longest,
        )  # fmt: skip
    return int(longest)


def _length(file: ConfigFile, name: str) -> Any:
    """Return one of the fields that give a length, by this very name."""
    section = file.text
    if name in section.given:
        return section.given[name]
    alias = section.defaults.get("aliases", {}).get(name)
    if alias and alias in section.given:
        return section.given[alias]
    if any(n in section.given for n in section.names("max_position_embeddings")):
        return None  # written by another name: the default of this one does not hold
    return section.defaults.get(name)


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_parameters(text: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what is said of rotary embeddings, one a kind of layer where it is said by kind."""
    for name in ("rope_parameters", "rope_scaling"):
        value = text.given.get(name)
        if not isinstance(value, Mapping) or not value:
            continue
        nested = [v for v in value.values() if isinstance(v, Mapping)]
        yield from nested or [value]
        return
