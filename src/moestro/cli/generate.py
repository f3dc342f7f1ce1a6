"""`moestro generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..core.errors import UserError
from ..models.config import EncoderDecoder
from ..train.models import language_model
from .parse import parse

if TYPE_CHECKING:
    from ..tasks.tokenizer import Tokenizer
    from ..train.load import Loaded

__all__ = ["Writer", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a text with the model of a run. The new text goes to stdout as it is made.

    A run on translations translates: every line of the prompt by itself, with --beams, without draws."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """The run folder (RUN/dense for its dense twin)."""
    prompt: str
    """The text to continue, or the lines to translate; - reads it from stdin."""
    max_tokens: int = 256
    """The most tokens to add; fewer where the model's context is full."""
    temperature: float = 0.8
    """0 = always the most probable token; 1 = the model's own probabilities."""
    top_p: float = 0.95
    """Draw from the fewest tokens that hold this share of the probability; 1 = from all."""
    top_k: int | None = None
    """Draw from the most probable k tokens; None = from all."""
    beams: int = 4
    """Of translations: unfinished sentences that are followed at once; 1 = always the most probable token."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""
    state: Literal["best", "last"] = "best"
    """The weights that were best in validation, or those of the last state."""
    weights: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Bits per weight of experts, FFNs, attention and head; int8 and int4 in blocks of 32 with a scale each."""
    measure: bool = True
    """With packed weights: also measure the bits per byte on the validation text, before and after."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print one line of JSON at the end instead of the text as it comes."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="generate")
    prompt = sys.stdin.buffer.read() if options.prompt == "-" else options.prompt.encode(errors="surrogateescape")
    from ..serve.generate import generate
    from ..train.load import load

    loaded = load(options.run, state=options.state, device=options.device)
    weights = None
    if options.weights != "fp32":
        from .packing import pack_loaded

        weights = pack_loaded(loaded, options.weights, options.measure, sys.stderr)
    if isinstance(loaded.config.model, EncoderDecoder):
        _translate(options, loaded, prompt.decode(errors="replace"), weights)
        return 0
    context = language_model(loaded.config.model, f"{options.run}: generate").context
    writer = Writer(loaded.tokenizer, None if options.json else sys.stdout)
    made = generate(
        loaded.model,
        [int(i) for i in loaded.tokenizer.encode(prompt).ids],
        options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stream=lambda _, token: writer.add(token),
    )
    text = writer.end()
    if options.json:
        about = {"prompt": prompt.decode(errors="replace"), "text": text, "tokens": len(made.tokens)}
        about |= {"reason": made.reason, "seed": options.seed}
        print(json.dumps(about if weights is None else {**about, "weights": weights}))
    elif made.reason == "context":
        print(f"the model's context of {context} tokens is full", file=sys.stderr)
    return 0


def _translate(options: Options, loaded: Loaded, prompt: str, weights: Any) -> None:
    """Print the translation of every line."""
    from ..serve.translate import beam_search
    from ..tasks.vocabulary_file import VocabularyTokenizer

    assert isinstance(loaded.tokenizer, VocabularyTokenizer)
    vocabulary, most = loaded.tokenizer.vocabulary, loaded.config.seq_len - 1
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    if not lines:
        raise UserError("generate: the prompt is empty; give a line to translate")
    texts: list[str] = []
    for line in lines:
        source = [*vocabulary.encode(line)[:most], vocabulary.eos]
        limit = min(options.max_tokens, most)
        best: Any = beam_search(loaded.model, source, limit, beams=options.beams, stop=[vocabulary.eos])  # type: ignore[arg-type]
        texts.append(vocabulary.decode(best[0].tokens.tolist()))
        if not options.json:
            print(texts[-1], flush=True)
    if options.json:
        about = {"prompt": prompt, "text": "\n".join(texts), "beams": options.beams}
        print(json.dumps(about if weights is None else {**about, "weights": weights}))


class Writer:
    """Writes text as tokens come: nothing is written before it can no longer change (characters of several tokens)."""

    def __init__(self, tokenizer: Tokenizer, stream: Any | None) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.tokens: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self._write(self.tokenizer.decode(self.tokens).rstrip("\ufffd"))

    def end(self) -> str:
        """Write what is left; returns all text."""
        self._write(self.tokenizer.decode(self.tokens))
        if self.stream is not None:
            print(file=self.stream, flush=True)
        return self.text

    def _write(self, text: str) -> None:
        if len(text) > len(self.text):
            if self.stream is not None:
                print(text[len(self.text) :], end="", file=self.stream, flush=True)
            self.text = text
