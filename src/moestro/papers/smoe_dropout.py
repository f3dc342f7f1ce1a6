"""41 SMoE-Dropout: a frozen random router whose number of experts grows, beside dense models and learned routers."""

from __future__ import annotations

from typing import Any

from ..experts.config import MLP
from ..losses.config import SwitchBalance
from ..models.config import Decoder
from ..moe.config import MoELayer
from ..nn.config import PlainFeedForward
from ..routers.config import Frozen, Linear, Router, SoftmaxKept, TopK
from ..train.knobs import LinearRamp
from .catalogue import entry
from .later import later
from .paper import Arm, Claim, Computed, Counted, Difference, Figures, Lines, Paper, Published

B, S, DIM, LAYERS, EXPERTS, WIDTH = 16, 128, 64, 3, 16, 16
SHOWN = (1, 2, 4, 8, 12, 16)
FEW = 30_000  # characters of the text that is read many times
TIE = 0.005  # bits per byte that 16 experts may be worse than 8
RAMP = LinearRamp(start=EXPERTS // 2, end=EXPERTS)


def decoder(ffn: PlainFeedForward | MoELayer, smoke: bool) -> Decoder:
    parts: dict[str, Any] = {"moe" if isinstance(ffn, MoELayer) else "ffn": ffn}
    parts |= {"dim": 16, "num_layers": 1} if smoke else {"dim": DIM, "num_layers": LAYERS}
    return Decoder(vocab_size=262, context=S, init_std=None, **parts)


def experts(k: int, frozen: bool, scale: float = EXPERTS**0.5) -> MoELayer:
    """scale: of the mean of chosen experts; at the root of their number they begin as loud as the dense layer."""
    score = Linear(bias=True, init_std=0.02)
    router = Router(score=Frozen(inner=score) if frozen else score, select=TopK(k=k), weigh=SoftmaxKept(scale=scale))
    return MoELayer(
        num_experts=EXPERTS,
        router=router,
        experts=MLP(width=WIDTH, activation="relu", bias=True),
        losses=() if frozen else (SwitchBalance(coefficient=0.01),),
    )


def arms(smoke: bool) -> list[Arm]:
    dense = decoder(PlainFeedForward(width=EXPERTS * WIDTH, bias=True), smoke)
    paid = decoder(experts(12, frozen=True), smoke).flops_per_token(S, "train")  # what growing costs on the mean

    def fixed(name: str, about: str, k: int, frozen: bool) -> Arm:
        return Arm(name=name, about=about, model=decoder(experts(k, frozen), smoke), seq_len=S)

    def grows(name: str, about: str, frozen: bool = True, scale: float = EXPERTS**0.5, **options: Any) -> Arm:
        model = decoder(experts(EXPERTS, frozen, scale), smoke)
        return Arm(name=name, about=about, model=model, cost=paid, options={"grows": True, **options})

    def plain(name: str, about: str, **more: Any) -> Arm:
        return Arm(name=name, about=about, model=dense, seq_len=S, **more)

    return [
        grows("smoe-dropout", "frozen random router, K from 8 to 16"),
        plain("dense", "one MLP as wide as all experts"),
        plain("dense, equal FLOPs", "the same, stopped at the system's FLOPs", equal="flops"),
        grows("plain mean", "the system with the published combine", scale=1.0),
        fixed("frozen, K 8", "frozen random router, no schedule", 8, frozen=True),
        grows("learned, K grows", "learned router with the schedule", frozen=False),
        fixed("learned, K 8", "learned router, balance loss", 8, frozen=False),
        fixed("learned, K 2", "learned router, balance loss", 2, frozen=False),
        grows("few: smoe-dropout", "the system on a short text, many times", few=True),
        plain("few: dense", "dense on a short text, many times", options={"few": True}),
    ]


def rises(figures: Figures) -> float:
    own = figures["smoe-dropout"]
    steps = [own[f"K {a}"] - own[f"K {b}"] for a, b in ((1, 2), (2, 4), (4, 8))]
    return min(*steps, own["K 8"] - own["K 16"] + TIE)


def overfits(figures: Figures) -> float:
    own = figures["learned, K 2"]
    return own["K 16"] - min(own[f"K {k}"] for k in SHOWN)


def counted() -> tuple[Counted, ...]:
    routed, dense = (decoder(f, False) for f in (experts(16, True), PlainFeedForward(width=256, bias=True)))
    more = LAYERS * ((EXPERTS - 1) * DIM + EXPERTS * (DIM + 1))
    return (
        Counted(what="mean share of experts at work, K from 8 to 16", ours=RAMP.mean(4000) / EXPERTS, published=0.75),
        Counted(what="parameters beyond the dense model", ours=routed.num_params() - dense.num_params()),
        Counted(what="of which output biases and routers", ours=more),
    )


def against(other: str, within: float = 0.0, of: str = "smoe-dropout") -> Difference:
    return Difference(figure="bits", of=of, than=other, relative=True, within=within)


PAPER = Paper(
    entry=entry("smoe-dropout"),
    parts={
        "frozen random score": "moestro.routers.config:Frozen",
        "softmax over kept": "moestro.routers.config:SoftmaxKept",
        "schedule of the number of experts": "moestro.train.knobs:LinearRamp",
        "evaluation over K": "moestro.train.sweep:evaluate_over",
        "dense layer into experts": "moestro.convert.config:Modular",
        "redundancy of experts": "moestro.trace.diversity:diversity_of_model",
    },
    example=(
        "from moestro.models.config import Decoder\n"
        "from moestro.convert.config import Modular\n"
        "dense = Decoder(dim=16, num_layers=1).build()\n"
        "sparse, receipt = Modular(num_experts=16, top_k=16).build(dense)\n"
        "print(receipt.exact, receipt.measured.relative)"
    ),
    data=later("smoe_dropout", "load"),
    sample=later("smoe_dropout", "sample"),
    arms=arms,
    system="smoe-dropout",
    updates=260,
    train=later("smoe_dropout", "train"),
    grid=(1e-2, 2e-2),
    tuning=0.25,
    figures={
        "bits": "per byte, lower is better; growing arms at K = 16, others at their own K",
        **{f"K {k}": f"the same with {k} experts" for k in SHOWN},
        "redundancy": "mean cosine of two experts' weights",
    },
    claims=(
        Claim(
            text="better with every doubling of K",
            effect=Computed(
                text=f"bits: least gain of K 1 to 2, 2 to 4, 4 to 8, and 8 to 16 plus {TIE}", function=rises
            ),
        ),
        Claim(
            text="a router learned at K = 2 is worse at K = 16 than at its best K",
            effect=Computed(text="bits: K 16 minus the least over K, of learned, K 2", function=overfits),
            threshold=0.005,
        ),
        Claim(text="with all experts within 1 percent of dense at equal updates", effect=against("dense", 0.01)),
        Claim(text="not worse than dense at equal FLOPs", effect=against("dense, equal FLOPs")),
        Claim(text="better than with the published mean", effect=against("plain mean"), main=False),
        Claim(text="the schedule helps", effect=against("frozen, K 8"), main=False),
        Claim(text="freezing helps", effect=against("learned, K grows"), main=False),
        Claim(
            text="better than dense where text is short and read many times",
            effect=against("few: dense", of="few: smoe-dropout"),
            main=False,
        ),
    ),
    picture=Lines(curve="slimmed", x="experts per token, K", y="bits per byte"),
    published=(
        Published(what="ASDiv-A over dense BERT", figure=1.03, unit="points", why="pre-trained BERT"),
        Published(what="MAWPS over dense BERT", figure=0.78, unit="points", why="pre-trained BERT"),
        Published(what="SVAMP over dense BERT", figure=1.09, unit="points", why="pre-trained BERT"),
    ),
    counted=counted,
    preset="smoe-dropout",
    notes=(
        "Ten books of seven domains as bytes stand in for enwik8: three pre-norm blocks of width 64, sixteen experts "
        "of width 16 beside a dense MLP of 256, 16 windows of 128 bytes per update, 260 updates with each of ten arms.",
        "The paper takes the mean of the chosen experts, whatever their number. That mean begins a quarter as loud as "
        "the dense layer here, and an update of Adam moves it a sixteenth as far; after 200 updates it was 6.7 percent "
        "behind dense (on validation text). So the mean is multiplied by 4, the root of the number of experts, in all "
        "arms with experts but one, which shows the published form.",
        "The ingredients apart, at this size: fewer experts all the time cost nothing as long as they are not changed "
        "(frozen, K 8), and a router that learns under the schedule is a little better and loses less when slimmed. "
        "What the paper says of learned routers shows in the one trained with two experts.",
        "The frozen router is as released: weights normal(0, 0.02), bias 0. Left out: dropout inside experts, and the "
        "recurrent memory of Transformer-XL.",
        "A growing K is counted, not timed, at 75 percent of the dense layer's FLOPs; the dense twin stops there.",
        "The arms with few text read 30,000 characters about 18 times; who is better there is reported, not promised.",
    ),
)
