"""The longest sequence of a model, as vLLM derives it (``_get_and_verify_max_len``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from samullm_plugin.checkpoints.hf_config import ConfigFile, load_json

_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_UNSCALED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default",
     "mrope", "proportional"}
)  # fmt: skip
_NONE_GIVEN = 2048


def derived_max_model_len(file: ConfigFile) -> int:
    """Return the longest prompt plus output that vLLM takes by default."""
    text = file.text
    found = [v for n in _LENGTHS if isinstance(v := _length(file, n), int)]
    longest: float = min(found) if found else float("inf")
    if isinstance(own := _length(file, "model_max_length"), int) and own:
        longest = own
    if file.folder is not None and (path := file.folder / "tokenizer_config.json").is_file():
        limit = load_json(path, "a tokenizer's configuration").get("model_max_length")
        if isinstance(limit, int | float) and limit > 0:
            longest = min(longest, limit)
    if longest == float("inf"):
        return _NONE_GIVEN
    parameters = list(_rope_parameters(text))
    if "gemma3" not in file.top.kind:
        factor = 1.0
        for rope in parameters:
            if _rope_type(rope) not in _UNSCALED:
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
