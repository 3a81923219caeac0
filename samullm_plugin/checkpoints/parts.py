"""Parts of a model: their parameters, and what they keep per token and per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from samullm_plugin.model.kv_cache import KvCacheKind


@dataclass(frozen=True, slots=True)
class Matrix:
    """Equal weight matrices of linear layers.

    Attributes:
        module: the first of them, as checkpoints name it.
        inputs: numbers of a token that go in.
        outputs: numbers that come out.
        count: how many there are.
    """

    module: str
    inputs: int
    outputs: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A group of weights that is stored, quantised and spread alike.

    Attributes:
        module: one of its modules, as checkpoints name it.
        linears: its weight matrices of linear layers, which quantisation may shrink by their names.
        others: parameters that keep their type: embeddings, norms, biases, convolutions, routers.
        experts: whether the matrices are experts'.
    """

    module: str
    linears: tuple[Matrix, ...] = ()
    others: int = 0
    experts: bool = False

    @property
    def matrices(self) -> int:
        """Return the parameters of its matrices."""
        return sum(m.count * m.inputs * m.outputs for m in self.linears)

    @property
    def outputs(self) -> int:
        """Return the rows of its matrices."""
        return sum(m.count * m.outputs for m in self.linears)

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
    names: Sequence[str] = (),
    bias: bool = False,
    others: int = 0,
    experts: int = 0,
) -> Part:
    """Return the part of linear layers of some (inputs, outputs).

    Args:
        module: one of them.
        shapes: of each.
        names: last part of the name of each; none: all are called as the module.
        bias: each has one.
        others: parameters that are no matrices.
        experts: there are as many of each, in experts; 0: one, in no expert.
    """
    stem = module.rpartition(".")[0]
    called = [f"{stem}.{name}" for name in names] or [module] * len(shapes)
    count = max(experts, 1)
    found = tuple(Matrix(name, i, o, count) for name, (i, o) in zip(called, shapes, strict=True))
    biases = count * sum(o for _, o in shapes) if bias else 0
    return Part(module, found, others + biases, experts > 0)


def mlp_shapes(hidden: int, width: int, *, gated: bool) -> list[tuple[int, int]]:
    """Return the matrices of an MLP."""
    return [(hidden, width)] * (2 if gated else 1) + [(width, hidden)]


def mlp_names(*, gated: bool) -> list[str]:
    """Return what the matrices of an MLP are called."""
    return ["gate_proj", "up_proj", "down_proj"] if gated else ["up_proj", "down_proj"]
