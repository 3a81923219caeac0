"""Parts of a model: their parameters, and what they keep per token and per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from samullm_plugin.model.kv_cache import KvCacheKind


@dataclass(frozen=True, slots=True)
class Part:
    """A group of weights that is stored, quantised and spread alike.

    Attributes:
        module: one of its modules, as checkpoints name it; quantisation leaves out modules by name.
        matrices: parameters in weight matrices of linear layers, which quantisation may shrink.
        others: parameters that keep their type: embeddings, norms, biases, convolutions, routers.
        outputs: rows of all its matrices together, for scales of one a row.
        experts: whether the matrices are experts'.
    """

    module: str
    matrices: int = 0
    others: int = 0
    outputs: int = 0
    experts: bool = False

    @property
    def parameters(self) -> int:
        """Return all its parameters."""
        return self.matrices + self.others


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer.

    Attributes:
        kind: how long an entry is needed.
        heads: query heads.
        kv_heads: key-value heads; 1 for a latent.
        entry_size: numbers kept per token and key-value head, keys and values together.
        part: its weights.
        window: of a sliding window or chunk, in tokens.
        keeps: whether it has entries of its own (else it reads an earlier layer's).
        side_bytes: bytes of an index kept per token besides, whatever the type of the entries.
    """

    kind: KvCacheKind
    heads: int
    kv_heads: int
    entry_size: int
    part: Part
    window: int = 0
    keeps: bool = True
    side_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StateSpace:
    """A layer part that keeps a state per sequence.

    Attributes:
        part: its weights.
        conv_size: numbers of the convolution's state.
        ssm_size: numbers of the recurrent state.
        ssm_dtype: type of the recurrent state; empty: as the model.
    """

    part: Part
    conv_size: int
    ssm_size: int
    ssm_dtype: str = ""


@dataclass(frozen=True, slots=True)
class Mlp:
    """The MLP of one layer.

    Attributes:
        parts: its weights: dense, or experts, shared experts and router.
        width: of the dense MLP, or of one expert.
        experts: routed experts, 0 if dense.
        active: experts of one token.
        active_matrices: matrix parameters that one token passes through.
    """

    parts: tuple[Part, ...]
    width: int
    experts: int = 0
    active: int = 0
    active_matrices: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: what it has of the three."""

    attention: Attention | None = None
    state: StateSpace | None = None
    mlp: Mlp | None = None
    others: int = 0

    def parts(self) -> list[Part]:
        """Return its groups of weights."""
        found = [p for p in (self.attention, self.state) if p is not None]
        return [
            *(f.part for f in found),
            *(self.mlp.parts if self.mlp else ()),
            Part("norm", others=self.others),
        ]


@dataclass(frozen=True, slots=True)
class Layers:
    """All layers of a language model, and the parts around them.

    Attributes:
        layers: in order.
        outside: embedding, head, vision tower and the like.
        notes: parts that are not loaded or not counted, for people.
    """

    layers: Sequence[Layer]
    outside: Sequence[Part] = field(default_factory=tuple)
    notes: tuple[str, ...] = ()

    def parts(self) -> list[Part]:
        """Return every group of weights."""
        return [*self.outside, *(p for layer in self.layers for p in layer.parts())]

    @property
    def parameters(self) -> int:
        """Return the parameters of all parts."""
        return sum(p.parameters for p in self.parts())


def linear(
    module: str,
    *shapes: tuple[int, int],
    bias: bool = False,
    others: int = 0,
    experts: bool = False,
) -> Part:
    """Return the part of linear layers of some (inputs, outputs)."""
    outputs = sum(o for _, o in shapes)
    return Part(
        module, sum(i * o for i, o in shapes), others + (outputs if bias else 0), outputs, experts
    )


def mlp_shapes(hidden: int, width: int, *, gated: bool) -> list[tuple[int, int]]:
    """Return the matrices of an MLP."""
    return [(hidden, width)] * (2 if gated else 1) + [(width, hidden)]
