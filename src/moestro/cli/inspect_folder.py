"""`moestro inspect` on a model of Hugging Face's transformers: its own router, its own tokenizer, our trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .passage import BATCH, Seen, publish, read_text

__all__ = ["inspect_folder"]

LOGITS = 2**26  # entries of the logits of one forward pass, at most


def inspect_folder(
    folder: Path,
    data: str,
    out: Path,
    tokens: int = 65_536,
    seq_len: int = 512,
    device: str = "cpu",
    command: str = "",
) -> dict[str, Any]:
    """Run a model of transformers over the first `tokens` tokens of a text; write trace, report and summary to `out`.

    Returns the summary, as `inspect` does. Raises `UserError` for a folder without safetensors, tokenizer.json or
    experts that can be watched, and for unusable text and sizes.
    """
    import torch

    from ..tasks.tokenizer_file import read_tokenizer
    from ..trace.record import Recorder
    from ..train.layout import is_run

    try:
        from ..convert.hf import use
        from ..convert.hf.trace import load_folder, watch
    except ImportError as error:
        raise UserError(f"{folder}: reading it needs transformers ({error}); pip install 'moestro[hf]'") from None
    if tokens < 2 or seq_len < 1:
        raise UserError("inspect: needs at least 2 tokens and a seq_len of at least 1")
    if is_run(out):
        raise UserError(f"{out}: holds a run; choose another folder with --out")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json; save the model's tokenizer beside it")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    model, config = load_folder(folder, device)
    use(model)  # also says so where there is nothing to watch
    V, context = model.get_input_embeddings().weight.shape[0], _context(config)
    text = read_text(data, tokenizer, tokens)
    if int(text.ids.max()) >= V:
        raise UserError(f"{folder}: its tokenizer has id {int(text.ids.max())}, its model only {V} tokens")
    S = min(seq_len, len(text.ids) - 1, context)
    windows = (len(text.ids) - 1) // S
    recorder = Recorder(
        labels=text.names,
        tokenizer="bytes" if tokenizer.vocab_size == 256 else "tokenizer.json",
        pieces=None if tokenizer.vocab_size == 256 else lambda i: tokenizer.decode([i]),
        run={"folder": str(folder), "step": 0, "seq_len": S},
        model=_plain(config),
        data={"title": data, "tokens": len(text.ids)},
    )
    per_pass = max(1, min(BATCH, LOGITS // V) // S)
    nats, targets, text_bytes = 0.0, 0, 0
    with watch(model) as seen, torch.inference_mode():
        for number, first in enumerate(range(0, windows, per_pass)):
            n = min(per_pass, windows - first)
            at = slice(first * S, (first + n) * S)
            after = slice(at.start + 1, at.stop + 1)
            ids, wanted = (torch.from_numpy(text.ids[part]).to(device) for part in (at, after))
            logits = model(input_ids=ids.view(n, S), use_cache=False).logits.reshape(n * S, -1)
            nats += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
            targets += n * S
            text_bytes += int(text.lengths[after].sum())
            trail = seen.take()
            recorder.count(number + 1, trail)
            if number == 0:
                columns = {name: values[at] for name, values in text.labels.items()}
                columns |= {"token": text.ids[at], "position": torch.arange(S).repeat(n)}
                recorder.sample(1, "text", trail, {**columns, "segment": torch.arange(n).repeat_interleave(S)})
    about = Seen(source=str(folder), step=0, data=data, seq_len=S, nats=nats, targets=targets, text_bytes=text_bytes)
    return publish(out, recorder, text, about, _plain(config), command)


def _context(config: Any) -> int:
    """The most tokens of a sequence; where a config says nothing, as many as one wants."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _plain(config: Any) -> dict[str, Any]:
    """The config as JSON can hold it."""
    import json

    return json.loads(config.to_json_string(use_diff=False))
