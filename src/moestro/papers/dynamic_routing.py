"""21 Dynamic routing: every token takes the fewest experts whose probabilities pass p, beside fixed top-1 and top-2."""

from __future__ import annotations

import functools
from typing import Any

from ..experts.config import Gated
from ..losses.config import PerUnitBalance, RoutingEntropy
from ..models.config import Decoder
from ..moe.config import MoELayer
from ..nn.config import Attention
from ..routers.config import Raw, Renormalised, Router, Select, TopK, TopP
from .catalogue import entry
from .later import later
from .paper import Arm, Claim, Computed, Counted, Difference, Figures, Lines, Paper, Published

S, B, E = 128, 8, 16
DOMAINS = ("gutenberg_domains", "gsm8k", "bbh")
EXPECTED = 2.8  # experts per token that top-p arms are counted with: the mean over the updates of a trial
SWEEP = (0.2, 0.4, 0.6, 0.8)


def decoder(select: Select, beta: float | None, smoke: bool) -> Decoder:
    """Weights of top-p and of top-1 are raw probabilities, those of top-2 add up to 1."""
    entropy = () if beta is None else (RoutingEntropy(coefficient=beta),)
    weigh = Renormalised() if isinstance(select, TopK) and select.k > 1 else Raw()
    layer = MoELayer(
        num_experts=E,
        router=Router(select=select, weigh=weigh),
        experts=Gated(width=8 if smoke else 64),
        losses=(PerUnitBalance(coefficient=0.01), *entropy),
    )
    size: dict[str, Any] = {"dim": 16, "num_layers": 1} if smoke else {"dim": 64, "num_layers": 3}
    return Decoder(vocab_size=262, attention=Attention(num_heads=4), moe=layer, context=S, **size)


def arms(smoke: bool) -> list[Arm]:
    def dynamic(name: str, about: str, beta: float) -> Arm:
        return Arm(name=name, about=about, model=decoder(TopP(p=0.4, expected=EXPECTED), beta, smoke), seq_len=S)

    top1, top2 = (decoder(TopK(k=k), None, smoke) for k in (1, 2))
    return [
        dynamic("dynamic", "top-p 0.4, entropy loss 1e-3", 1e-3),
        dynamic("beta 1e-4", "the published coefficient, 1e-4", 1e-4),
        dynamic("beta 0", "no entropy loss", 0.0),
        Arm(name="top-1", about="one expert per token", model=top1, seq_len=S),
        Arm(name="top-2", about="two experts per token", model=top2, seq_len=S),
        Arm(name="top-2 flops", about="top-2 at the system's FLOPs", model=top2, seq_len=S, equal="flops"),
    ]


def by_difficulty(figures: Figures) -> float:
    """How many more experts the text of the highest loss takes than that of the lowest, as a share of the latter's."""
    bits = figures["top-2"]
    easy, *_, hard = sorted(DOMAINS, key=lambda name: bits[f"bits_{name}"])
    return figures["dynamic"][f"experts_{hard}"] / figures["dynamic"][f"experts_{easy}"] - 1


def ours(name: str) -> Computed:
    return Computed(text=f"{name} of dynamic", function=lambda figures: figures["dynamic"][name])


@functools.cache
def counted() -> tuple[Counted, ...]:
    """The published model: 24 routed layers, width 1024, 16 experts of width 2816 (inferred), 32000 tokens."""

    def size(select: Select) -> Decoder:
        layer = MoELayer(num_experts=16, router=Router(select=select, weigh=Raw()), experts=Gated(width=2816))
        return Decoder(vocab_size=32_000, dim=1024, num_layers=24, attention=Attention(num_heads=16), moe=layer)

    top1, top2, dynamic = (size(s) for s in (TopK(k=1), TopK(k=2), TopP(p=0.4, expected=1.76)))
    active = dynamic.num_active_params()
    return (
        Counted(what="parameters", ours=top1.num_params(), published=3.5e9),
        Counted(what="active parameters, top-1", ours=top1.num_active_params(), published=374e6),
        Counted(what="active parameters, top-2", ours=top2.num_active_params(), published=581e6),
        Counted(what="active parameters at 1.76 experts per token", ours=active),
        Counted(what="the same, as a share of top-2's", ours=active / top2.num_active_params(), published=0.9),
    )


US, CUT = "dynamic", "top-2 flops"
FALL = Difference(figure="experts", of=US, than=US, than_figure="experts_start")
BELOW = Computed(text="2.2 minus experts of dynamic", function=lambda figures: 2.2 - figures[US]["experts"])
LOSS = Difference(figure="bits", of=US, than="top-2", relative=True, within=0.01)
HARDER = Computed(
    text="experts of dynamic where top-2's loss is highest, over where lowest, - 1", function=by_difficulty
)
TOKENS = Difference(figure="experts_hard", of=US, than=US, than_figure="experts_easy", better="higher")

PAPER = Paper(
    entry=entry("dynamic-routing"),
    parts={
        "top-p choice": "moestro.routers.config:TopP",
        "raw weights": "moestro.routers.config:Raw",
        "entropy loss": "moestro.losses.config:RoutingEntropy",
        "balance with any number of choices": "moestro.losses.config:PerUnitBalance",
        "experts by layer": "moestro.trace.spending:experts_by_layer",
        "experts by domain or difficulty": "moestro.trace.spending:experts_by_label",
        "other p on a trained model": "moestro.train.sweep:evaluate_over",
        "the authors' checkpoints": "moestro.convert.authors.dynamic_moe:FAMILY",
    },
    example="""import torch
from moestro.losses.config import PerUnitBalance, RoutingEntropy
from moestro.moe.config import MoELayer
from moestro.routers.config import Raw, Router, TopP

layer = MoELayer(
    num_experts=16,
    router=Router(select=TopP(p=0.4), weigh=Raw()),
    losses=(PerUnitBalance(coefficient=1e-2), RoutingEntropy(coefficient=1e-4)),
).build(dim=32)
_, _, trail = layer(torch.randn(64, 32))
print("experts per token:", float(trail[("", 0)].demand.sum()) / 64)""",
    data=later("dynamic_routing", "load"),
    sample=later("dynamic_routing", "sample"),
    arms=arms,
    system="dynamic",
    updates=1100,
    train=later("dynamic_routing", "train"),
    grid=(4e-3, 8e-3),
    tuning=0.2,
    figures={
        "bits": "bits per byte, mean over domains, lower is better",
        **{f"bits_{name}": f"the same of {name}" for name in DOMAINS},
        "experts": "experts per token and layer",
        **{f"experts_{name}": f"the same of {name}" for name in DOMAINS},
        "experts_easy": "the same of the quarter of tokens with the lowest loss",
        "experts_hard": "of the quarter with the highest",
        "experts_start": "in the first twentieth of training",
        "experts_train": "over all of training",
        "experts_first": "in the first layer",
        "experts_last": "in the last layer",
        "sweep": "least rise of experts per token from one p to the next, 0.2 to 0.8, on the trained model",
    },
    claims=(
        Claim(text="experts per token fall during training", effect=FALL, threshold=0.5),
        Claim(text="and end below 2.2", effect=BELOW),
        Claim(text="the loss is within 1 percent of top-2's", effect=LOSS),
        Claim(text="and lower than that of top-2 at equal FLOPs", effect=Difference(figure="bits", of=US, than=CUT)),
        Claim(text="harder text takes more experts", effect=HARDER, threshold=0.03),
        Claim(
            text="without the entropy loss more are taken", effect=Difference(figure="experts", of=US, than="beta 0")
        ),
        Claim(text="harder tokens take more experts", effect=TOKENS, main=False),
        Claim(text="compute follows p after training", effect=ours("sweep"), main=False),
    ),
    published=(
        Published(what="experts per token at the end of training", figure=1.82, ours=ours("experts")),
        Published(what="the same early: after 8 percent; in our first 5", figure=2.42, ours=ours("experts_start")),
        Published(what="mean accuracy above top-2's", figure=0.7, unit="points", why="needs models of billions"),
    ),
    counted=counted,
    picture=Lines(curve="experts", x="update", y="experts per token"),
    preset="dynamic-routing",
    notes=(
        "Bytes of books, worked problems and task prompts, as many of each; 16 experts of width 64 in 3 layers, "
        "1100 updates of 1024 bytes. The paper trains on 100 billion tokens.",
        "Entropy loss of 1e-3 where the paper has 1e-4, since training is much shorter: in a trial of 450 updates "
        "1e-3 left 2.91 experts per token, none 3.00. The published coefficient is an arm beside it.",
        "FLOPs of top-p arms are counted at 2.8 experts per token, the mean of a trial's training; experts_train "
        "says what runs took. Training begins with 6 experts of 16, so at equal FLOPs top-2 gets more updates, not "
        "fewer.",
        "Losses are summed over layers; F is the share of tokens that chose an expert: L_b is the mean number of "
        "experts where all is uniform. The paper does not say either.",
        "1.76 experts per token are 0.88 of top-2's in the experts alone; with attention and embeddings 0.91.",
        "Difficulty of a token is the model's own loss.",
        "Where claims do not hold. Learning rates are chosen after a fifth of training: top-p arms took 8e-3, top-2"
        " 4e-3. Tried afterwards: dynamic at 4e-3, first seed, has 2.455 bits per byte where top-2 has 2.503, and "
        "2.465 at equal FLOPs, but then takes 2.87 experts to the end. So either the loss or the number of experts "
        "is as predicted.",
        "The entropy loss costs: without it the loss is 0.9 percent above top-2's, with 1e-4 1.1, with 1e-3 2.3.",
        "Domains differ in the predicted direction in every seed, but by 1.7 percent and not by 3; tokens by 18.",
    ),
)
