"""One description of a model: parameters, bytes, KV cache, limits, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from samullm_plugin.checkpoints.asking import ask_vllm, count_parameters
from samullm_plugin.checkpoints.decoder import NotModelledError
from samullm_plugin.checkpoints.families import FAMILIES, NOT_MODELLED
from samullm_plugin.checkpoints.hf_config import (
    ConfigFile,
    derived_max_model_len,
    read_config_file,
    readable,
)
from samullm_plugin.checkpoints.parts import Attention, Layers, Part
from samullm_plugin.checkpoints.quantization import DTYPE_BYTES, Quantization, online
from samullm_plugin.checkpoints.quantization_config import read_quantization
from samullm_plugin.checkpoints.stacks import read_layers, tied
from samullm_plugin.checkpoints.weight_files import StoredWeights, read_weights
from samullm_plugin.errors import InputError
from samullm_plugin.model.application import EngineOptions
from samullm_plugin.model.architecture import ModelArchitecture
from samullm_plugin.model.kv_cache import KvCacheLayers

Source = Literal["config.json", "safetensors", "transformers", "vllm", "bundled figures"]


_NO_DECODERS = frozenset({"whisper", "bart", "t5", "clip"})
_UNLIKE = frozenset({*NOT_MODELLED, *_NO_DECODERS})


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What is known of a checkpoint.

    Attributes:
        file: the ``config.json``.
        layers: its parts.
        parameters: of everything an engine loads.
        quantization: how its matrices are stored; None: in the model's type.
        dtype: of the model, as vLLM's ``auto`` resolves it on a GPU.
        max_model_len: as vLLM derives it.
        stored: what the safetensors files hold; None without any.
        source: where parameters and bytes come from.
        not_modelled: what an engine may need besides, one sentence each.
    """

    file: ConfigFile
    layers: Layers
    parameters: int
    quantization: Quantization | None
    dtype: str
    max_model_len: int
    stored: StoredWeights | None
    source: Source
    not_modelled: tuple[str, ...] = ()

    def weight_bytes(self, engine: EngineOptions | None = None) -> float:
        """Return the bytes of all weights as an engine holds them.

        Args:
            engine: its settings: ``dtype`` and ``quantization`` matter. None: vLLM's defaults.

        Raises:
            InputError: for a quantisation that the checkpoint cannot be loaded with.
        """
        engine = engine or EngineOptions()
        wanted = _extra(engine).get("quantization")
        dtype = self.dtype if engine.dtype == "auto" else engine.dtype
        size = dtype_bytes(dtype, self.file.file)
        found = self.quantization
        if found is None and isinstance(wanted, str):
            found = online(wanted, self.file.file)
        elif self.stored is not None:
            stored = self.stored
            return stored.stored_bytes - stored.float_bytes + stored.float_numbers * size
        if found is None:
            return self.parameters * size
        parts = self.layers.parts()
        if not found.shrinks(parts):
            raise InputError(
                f"{self.file.file}: quantization {found.method}: none of the modules that it names "
                "is known, so its sizes would be a guess; give them under `architecture` in "
                "app.yaml, or a folder with its safetensors files"
            )
        read = sum(found.stored_bytes(part, size) for part in parts)
        return read * self.parameters / self.layers.parameters

    def kv_cache(self, engine: EngineOptions | None = None) -> tuple[KvCacheLayers, ...]:
        """Return the kinds of layers by what they keep, as an engine keeps it.

        Args:
            engine: its settings: ``dtype`` and ``kv_cache_dtype`` matter. None: vLLM's defaults.
        """
        engine = engine or EngineOptions()
        dtype = self.dtype if engine.dtype == "auto" else engine.dtype
        model_bytes = dtype_bytes(dtype, self.file.file)
        wanted = str(_extra(engine).get("kv_cache_dtype") or "auto")
        if wanted == "auto" and self.quantization and self.quantization.kv_cache_dtype:
            wanted = self.quantization.kv_cache_dtype
        entry = model_bytes if wanted == "auto" else dtype_bytes(wanted, self.file.file)
        state_dtype = str(_extra(engine).get("mamba_ssm_cache_dtype") or "auto")
        found: dict[tuple[Any, ...], int] = {}
        for layer in self.layers.layers:
            if (a := layer.attention) is not None and a.keeps:
                head_bytes = a.entry_size * entry + a.side_bytes
                key = a.kind, a.kv_heads, head_bytes, 0.0, a.window
                found[key] = found.get(key, 0) + 1
            if (s := layer.state) is not None:
                own = state_dtype if state_dtype != "auto" else s.ssm_dtype
                ssm = model_bytes if own in ("", "auto") else dtype_bytes(own, self.file.file)
                state = s.conv_size * model_bytes + s.ssm_size * ssm
                key = "mamba", 1, 0.0, float(state), 0
                found[key] = found.get(key, 0) + 1
        return tuple(
            KvCacheLayers(kind, count, heads, size, state, window)
            for (kind, heads, size, state, window), count in found.items()
        )

    def architecture(self, engine: EngineOptions | None = None) -> ModelArchitecture:
        """Return the figures that costs follow from, for an engine's settings."""
        layers = self.layers.layers
        attentions = [x.attention for x in layers if x.attention is not None]
        mlps = [x.mlp for x in layers if x.mlp is not None]
        usual = max(mlps, key=lambda m: m.experts, default=None)
        text = self.file.text
        hidden = text.number("hidden_size")
        heads, kv_heads, head_dim = _heads(attentions)
        mixers = [m for x in layers for m in (x.attention, x.state) if m is not None]
        active = sum(m.active_matrices for m in mlps) + sum(m.part.matrices for m in mixers)
        weights = self.weight_bytes(engine)
        return ModelArchitecture(
            num_layers=len(layers),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=usual.width if usual else 2 * hidden,
            vocab_size=text.number("vocab_size"),
            mlp="plain" if usual and _plain(self) else "gated",
            num_experts=usual.experts if usual else 0,
            num_active_experts=usual.active if usual else 0,
            dtype_bytes=weights / max(self.parameters, 1),
            parameters=self.parameters,
            active_parameters=active,
            stored_bytes=weights,
            kv_cache=self.kv_cache(engine),
        )


def _heads(attentions: Sequence[Attention]) -> tuple[int, int, int]:
    """Return heads, key-value heads and head width of the most common attention."""
    if not attentions:
        return 1, 1, 1
    usual = max(attentions, key=lambda a: sum(b.entry_size == a.entry_size for b in attentions))
    return usual.heads, usual.kv_heads, max(usual.entry_size // 2, 1)


def _plain(description: ModelDescription) -> bool:
    return "plain" in FAMILIES.get(description.file.text.kind, ())


def _extra(engine: EngineOptions) -> Mapping[str, object]:
    return dict(engine.extra)


def dtype_bytes(name: str, file: Path) -> float:
    """Return the bytes of a number.

    Raises:
        InputError: naming the types that are known.
    """
    found = DTYPE_BYTES.get(str(name).removeprefix("torch."))
    if found is None:
        raise InputError(f"{file}: type {name!r} is not known; known: {', '.join(DTYPE_BYTES)}")
    return found


def describe(path: Path, *, ask: bool = False) -> ModelDescription:
    """Return what is known of a checkpoint.

    Args:
        path: its folder, or a ``config.json``.
        ask: let transformers, where it is installed, count the parameters of a checkpoint without
            weights here; it, and then vLLM, are asked anyway of families that are not known.

    Raises:
        InputError: naming file and field, or the feature that is not modelled.
    """
    file = read_config_file(path)
    counted: int | None = None
    source = "config.json"
    try:
        with readable(file.text, file.text.where):
            layers = read_layers(file)
    except NotModelledError as refusal:
        try:
            counted, layers = _counted(file, refusal)
        except NotModelledError:
            counted, layers, source = None, _asked(file, refusal), "vllm"
    count = max(len(layers.layers), file.text.number("num_hidden_layers", 0))
    stored = read_weights(file.folder, count) if file.folder else None
    quantization = read_quantization(file)
    if layers.parameters < 1:
        raise InputError(f"{file.text.where}: its sizes make a model without parameters")
    with readable(None, f"{file.text.where}: its length"):
        longest = derived_max_model_len(file)
    parameters = layers.parameters
    if stored is not None:
        layers, parameters = _with_head(layers, file, stored), layers.parameters
        if not stored.packed:
            parameters = stored.numbers
        source = "safetensors"
    else:
        if ask and counted is None and source != "vllm":
            counted = count_parameters(file, tied(file))
        if counted is not None:
            parameters, source = counted, "transformers"
    return ModelDescription(
        file,
        layers,
        parameters,
        quantization,
        _dtype(file),
        longest,
        stored,
        source,  # type: ignore[arg-type]  # one of those above
        layers.notes,
    )


def _with_head(layers: Layers, file: ConfigFile, stored: StoredWeights) -> Layers:
    """Return the layers with a head of their own, if the files hold one against the configuration.

    vLLM then loads it, and ties it again only if it equals the embedding.
    """
    if stored.has_head == (not tied(file)) or not stored.has_head:
        return layers
    embedding = layers.outside[0]
    return replace(layers, outside=(*layers.outside, replace(embedding, module="lm_head")))


def _counted(file: ConfigFile, refusal: NotModelledError) -> tuple[int, Layers]:
    """Return the parameters as transformers counts them, and layers that agree with the count.

    Raises:
        NotModelledError: the refusal, where transformers does not help.
    """
    if file.text.kind in _UNLIKE or file.top.kind in _UNLIKE:
        raise refusal  # known not to be a plain decoder: a count says no more
    counted = count_parameters(file, tied(file))
    if counted is None:
        raise refusal
    if refusal.only_towers:
        return counted, _counted_towers(file, counted, refusal)
    return counted, _checked_guess(file, counted, refusal)


def _asked(file: ConfigFile, refusal: NotModelledError) -> Layers:
    """Return the layers as vLLM has them.

    Raises:
        NotModelledError: the refusal, where vLLM does not help: of a quantised checkpoint it says
            how many parameters there are, and not which of them are stored how.
    """
    found = None
    if file.text.kind not in _NO_DECODERS and read_quantization(file) is None:
        found = ask_vllm(file)
    if found is None:
        raise refusal
    return found


def _counted_towers(file: ConfigFile, counted: int, refusal: NotModelledError) -> Layers:
    """Return a language model, and as its towers what a count of the whole leaves over.

    Raises:
        NotModelledError: if the count is less than the language model, so of something else.
    """
    language = read_layers(file, towers=False)
    towers = counted - language.parameters
    if towers < 0:
        raise refusal
    return replace(language, outside=(*language.outside, Part("towers", others=towers)))


def _checked_guess(file: ConfigFile, counted: int, refusal: NotModelledError) -> Layers:
    """Return a model of an unknown family read as a plain decoder, if its parameters say it is one.

    Raises:
        InputError: if it is not.
    """
    try:
        layers = read_layers(file, guess=True)
    except InputError as error:
        raise refusal from error
    if abs(layers.parameters / counted - 1) > 0.01:
        raise refusal
    return layers


def _dtype(file: ConfigFile) -> str:
    """Return the type that vLLM's ``auto`` gives a model on a GPU: 32-bit models become 16-bit."""
    given = (
        file.raw.get("dtype") or file.raw.get("torch_dtype")
        or file.text.given.get("dtype") or file.text.given.get("torch_dtype")
    )  # fmt: skip
    name = str(given or "").removeprefix("torch.")
    if name in ("", "auto", "float32", "float", "float64"):
        return "bfloat16"
    return name
