"""The encoder-decoder: a decoder whose blocks look at what an encoder made of another sequence."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.account import cost
from ..core.carry import Carry
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.cross import CrossAttention, Memory
from .config import EncoderDecoder as EncoderDecoderConfig
from .decoder import Decoder
from .encoder import Encoder
from .stack import TiedEmbedding

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """`(source, target, signals, carry, source_signals) -> (logits, carry, trail)`; `decode(target, encode(source))`.

    Shapes: source [B, N], target [B, S] int64 -> logits [B, S, V]. `signals` are those of the target's tokens, [B*S];
    `source_signals` those of the source's, [B*N] (padding: their `valid`); without them the source has the seed,
    progress, knobs, keep and quiet of the target. Carry and trail: paths are those of the modules, such as
    "encoder.layers.3.ffn" and "decoder.layers.0.cross". What streams between layers ends with the encoder.

    Cached decoding: a carry made by `new_cache` keeps keys and values of the target so far and, from the first pass on,
    those of the memory, which need not be given again.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        encoder, decoder = config.sides()
        made = Decoder(decoder)
        embed = TiedEmbedding(made.embed, encoder.embedding_scale) if config.shared else None
        self.encoder = Encoder(encoder, embed)
        self.decoder = made

    def initialise(self, seed: int | None = None) -> None:
        """(Re)draw all parameters from the config's seed, or from another."""
        for side, drawn in zip((self.encoder, self.decoder), self.config.seeds(seed)):
            side.initialise(drawn)

    def encode(
        self, source: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Memory, Carry, Trail]:
        """What the decoder looks at. signals: of the source."""
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        h, after, trail = self.encoder(source, signals.at("encoder"), carry.at("encoder"))
        valid = None if signals.valid is None else signals.valid.view(source.shape)
        after = changed(carry.back("encoder", after), state=carry.state, ahead=carry.ahead)
        return Memory(h, valid), after, trail.under("encoder")

    def hidden(
        self,
        target: Tensor,
        memory: Memory | None = None,
        signals: Signals | None = None,
        carry: Carry | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """What the head takes, [B, S, D]. memory None: it is in the carry."""
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        h, after, trail = self.decoder.hidden(target, signals.at("decoder"), carry.at("decoder"), memory)
        return h, carry.back("decoder", after), trail.under("decoder")

    def decode(
        self,
        target: Tensor,
        memory: Memory | None = None,
        signals: Signals | None = None,
        carry: Carry | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """Logits [B, S, V] of the target's next tokens. memory None: it is in the carry."""
        h, carry, trail = self.hidden(target, memory, signals, carry)
        return self.decoder.head(h), carry, trail

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        source_signals: Signals | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        memory, carry, left = self.encode(source, _of_source(signals, source_signals), carry)
        logits, carry, trail = self.decode(target, memory, signals, carry)
        return logits, carry, left | trail

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        targets: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        source_signals: Signals | None = None,
    ) -> tuple[Tensor, Tensor, Carry, Trail]:
        """(sum of nats [], number of targets [] int64, carry, trail), without ever holding all logits.

        Shapes: source [B, N]; target, what the decoder reads, and targets, what it is to say, [B, S]; targets of -1 and
        padding (`signals.valid`) do not count.
        """
        memory, carry, left = self.encode(source, _of_source(signals, source_signals), carry)
        h, carry, trail = self.hidden(target, memory, signals, carry)
        valid = None if signals is None else signals.valid
        total, count = self.decoder.nats(h, targets, valid)
        return total, count, carry, left | trail

    def new_cache(self, capacity: int | None = None) -> Carry:
        """A carry for cached decoding of at most `capacity` tokens (default: the decoder's context)."""
        made = self.decoder.new_cache(capacity)
        return Carry(own={f"decoder.{name}": state for name, state in made.own.items()})

    def flops(self, source_len: int, target_len: int, train: bool = False) -> int:
        """Matrix FLOPs of one pair of sequences, forward, or forward and backward. Unlike `flops_per_token`, which is
        this for equal lengths divided by the length, it knows both lengths."""
        N, S = source_len, target_len
        here, there = cost(self.encoder, N), cost(self.decoder, S)
        forward, extra = N * here.flops + S * there.flops, N * here.backward_extra + S * there.backward_extra
        for part in self.decoder.modules():
            if isinstance(part, CrossAttention):  # counted as if there were S units to look at
                forward += S * (part.extra_flops(N) - part.extra_flops(S))
                forward += (N - S) * (cost(part.k).flops + cost(part.v).flops)
                extra += S * (part.extra_backward_flops(N) - part.extra_backward_flops(S))
        return 3 * forward + extra if train else forward


def _of_source(signals: Signals | None, given: Signals | None) -> Signals | None:
    if given is not None or signals is None:
        return given
    return Signals(
        seed=signals.seed,
        progress=signals.progress,
        knobs=signals.knobs,
        keep=signals.keep,
        quiet=signals.quiet,
    )
