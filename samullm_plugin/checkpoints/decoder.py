"""What the builders of a model's parts share: the configuration, and what its family is like."""

from __future__ import annotations

from dataclasses import dataclass

from samullm_plugin.checkpoints.families import RECURRENT
from samullm_plugin.checkpoints.hf_config import ConfigFile, HfConfig
from samullm_plugin.checkpoints.layer_kinds import layer_kinds


@dataclass(frozen=True, slots=True)
class Decoder:
    """A language model whose layers are being read.

    Attributes:
        file: its ``config.json``.
        c: the language model's section.
        flags: of its family.
        kinds: what each layer has (``layer_kinds``).
        hidden: numbers of a token between layers.
        heads: query heads; 0 without attention.
        gated: MLPs have a gate.
        bias: all linear layers have biases.
    """

    file: ConfigFile
    c: HfConfig
    flags: frozenset[str]
    kinds: tuple[str, ...]
    hidden: int
    heads: int
    gated: bool
    bias: bool

    @property
    def count(self) -> int:
        """Return the number of layers."""
        return len(self.kinds)


def read_decoder(file: ConfigFile, flags: frozenset[str]) -> Decoder:
    """Return what a configuration says of all layers.

    Raises:
        InputError: naming a field that is missing or wrong.
    """
    c = file.text
    if c.kind in ("falcon", "mpt"):
        bias = c.flag("bias", not c.flag("no_bias", True))
    else:
        bias = "bias" in flags and c.flag("use_bias", True)
    return Decoder(
        file,
        c,
        flags,
        tuple(layer_kinds(file, flags)),
        c.number("hidden_size"),
        0 if c.kind in RECURRENT else c.number("num_attention_heads"),
        "plain" not in flags,
        bias,
    )
