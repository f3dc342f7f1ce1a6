"""Configs of expert banks. Built with (dim, num_experts)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu"]


def _widths(width: int | tuple[int, ...], where: str) -> None:
    for w in (width,) if isinstance(width, int) else width:
        if w < 1:
            raise UserError(f"{where}: every width must be at least 1, found {w}")
    if isinstance(width, tuple) and not width:
        raise UserError(f"{where}: an empty tuple; give one width, or one per expert")


@config
class Experts(Config):
    """Base of expert banks: what is built follows `core.protocols.Experts`."""


@config
class Gated(Experts):
    """Gated MLP experts (SwiGLU by default): down(act(gate(x)) * up(x)), stacked, no bias."""

    builds: ClassVar[str] = "moestro.experts.gated:GatedBank"
    width: int | tuple[int, ...] = 256
    """Hidden width of each expert; a tuple gives every expert its own."""
    activation: Activation = "silu"
    """Activation of the gate."""
    deterministic: bool = False
    """Whether a row comes out bitwise equal alone and in any batch; slower for few tokens."""
    sparse_grad: bool = False
    """Whether gradients are kept for experts that met a unit only (optim/touched.py); one process, not compiled."""

    def __post_init__(self) -> None:
        _widths(self.width, "Gated.width")
        if self.sparse_grad and isinstance(self.width, tuple):
            raise UserError("Gated.sparse_grad: blocks of unequal widths have no expert axis; give one width")


@config
class MLP(Experts):
    """Plain MLP experts: down(act(up(x))), stacked, with or without biases."""

    builds: ClassVar[str] = "moestro.experts.mlp:MLPBank"
    width: int = 512
    """Hidden width of each expert."""
    activation: Activation = "gelu"
    """Activation between the two maps."""
    bias: bool = False
    """Whether both maps have a bias."""
    alike: bool = False
    """Whether all experts start with the same values, as in code that copies one expert E times."""
    deterministic: bool = False
    """Whether a row comes out bitwise equal alone and in any batch; slower for few tokens."""
    sparse_grad: bool = False
    """Whether gradients are kept for experts that met a unit only (optim/touched.py); one process, not compiled."""

    def __post_init__(self) -> None:
        _widths(self.width, "MLP.width")


@config
class GatedExtension(Experts):
    """Plain MLP experts times a linear branch that starts at one: down(act(up(x)) * (new(x) + new_bias)) (brief 34).

    At the start they are the plain experts: an enlargement that changes nothing (`convert.config.Extend` makes it of
    any bank of plain MLPs).
    """

    builds: ClassVar[str] = "moestro.experts.extended:ExtendedBank"
    width: int = 512
    """Hidden width of each expert."""
    activation: Activation = "gelu"
    """Activation of the old branch."""
    bias: bool = False
    """Whether the two old maps have a bias."""

    def __post_init__(self) -> None:
        _widths(self.width, "GatedExtension.width")


@config
class ClampedGated(Experts):
    """Gated MLP experts with biases whose gate and up are clamped, and up is raised by one (GPT-OSS)."""

    builds: ClassVar[str] = "moestro.experts.clamped:ClampedGatedBank"
    width: int = 256
    """Hidden width of each expert."""
    alpha: float = 1.702
    """Factor inside the sigmoid: the gate g becomes g * sigmoid(alpha * g)."""
    limit: float = 7.0
    """The gate is clamped above at this, up on both sides."""
    bias: bool = True
    """Whether all three maps have a bias."""
    sparse_grad: bool = False
    """Whether gradients are kept for experts that met a unit only (optim/touched.py); one process, not compiled."""

    def __post_init__(self) -> None:
        _widths(self.width, "ClampedGated.width")
        self.positive("limit")


@config
class Unit(Config):
    """Base of single experts, for `Modules`. Built with (dim): a module from rows [R, D] to rows [R, D']."""


@config
class FeedForward(Unit):
    """One MLP with biases: Linear, activation, Linear."""

    builds: ClassVar[str] = "moestro.experts.units:FeedForward"
    width: int = 256
    """Hidden width."""
    activation: Activation = "gelu"
    """Activation between the two maps."""


@config
class Convolution(Unit):
    """One residual-free convolution on units [C, H, W]: depthwise, activation, pointwise."""

    builds: ClassVar[str] = "moestro.experts.units:Convolution"
    kernel: int = 3
    """Side of the depthwise kernel, odd."""
    activation: Activation = "gelu"
    """Activation between the two maps."""

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"Convolution.kernel: must be odd, found {self.kernel}")


@config
class Modules(Experts):
    """A bank of arbitrary modules, of equal or of different kinds. Slower than a stacked bank."""

    builds: ClassVar[str] = "moestro.experts.modules:ModuleBank"
    experts: tuple[Config, ...] = (FeedForward(),)
    """One config per expert, each built with (dim); a single one stands for all."""

    def __post_init__(self) -> None:
        if not self.experts:
            raise UserError("Modules.experts: an empty tuple; give one config per expert, or one for all")


def examples() -> dict[str, Experts]:
    """Tiny members of every kind of bank, for 4 experts and any dim; tests are generated from them."""
    return {
        "gated": Gated(width=12),
        "gated_gelu": Gated(width=7, activation="gelu_tanh"),
        "gated_widths": Gated(width=(4, 12, 7, 9)),
        "clamped": ClampedGated(width=9, alpha=1.5, limit=0.3),
        "clamped_unbiased": ClampedGated(width=6, bias=False),
        "mlp": MLP(width=12),
        "mlp_bias": MLP(width=10, bias=True, activation="relu"),
        "mlp_relu2": MLP(width=9, activation="relu2"),
        "mlp_leaky": MLP(width=9, activation="leaky_relu"),
        "mlp_alike": MLP(width=10, bias=True, alike=True),
        "extension": GatedExtension(width=9),
        "extension_bias": GatedExtension(width=12, bias=True, activation="relu"),
        "modules": Modules(experts=(FeedForward(width=8),)),
        "modules_mixed": Modules(
            experts=(
                FeedForward(width=4),
                FeedForward(width=12),
                FeedForward(width=7, activation="silu"),
                FeedForward(),
            )
        ),
    }
