"""The methods that turn a dense layer into a routed one. Each returns (new model, Receipt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...routers.config import Constant
from ..change.conduct import generator, watch
from ..change.mlp import DenseMLP, Place
from ..change.samples import Samples
from ..config import Cluster, Copy, GranularSplit, Modular, PartialReinit, Taylor
from ..receipt import ConversionError, Receipt
from .neurons import importance, kmeans
from .routed import Inputs, Layer, balanced_weigh, copies_weigh, router_rows, sums_to_one, upcycle

__all__ = ["cluster", "copy", "granular", "modular", "reinit", "taylor"]

Converted = tuple[nn.Module, Receipt]


def copy(options: Copy, model: nn.Module, **given: Any) -> Converted:
    """E identical experts whose weights sum to 1: the output is that of the dense model.

    With K = 1 and the default weight, 1, every bit of a token's path is that of the dense layer.
    """

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        share = 0.5 if options.shared else 1.0
        one = place.mlp if share == 1.0 else place.mlp.scaled(share)
        return Layer(
            experts=[one] * count,
            rows=router_rows(options, place, count, inputs),
            weigh=copies_weigh(options),
            shared=one if options.shared else None,
            exact=sums_to_one(options),
        )

    return upcycle(options, model, make, "identical experts give the output of the dense model", **given)


def granular(options: GranularSplit, model: nn.Module, **given: Any) -> Converted:
    """Slices of F / G neurons, G per copy with one router row: each token meets all slices of the copies it chooses.

    The chosen weights of one copy's slices are equal, 1 / G of the copy's; the slices' outputs are scaled by G.
    """
    G = options.granularity

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        slices = _slices(place, G, "granularity")
        rows = router_rows(options, place, count // G, inputs)
        return Layer(
            experts=slices * (count // G),
            rows=rows.repeat_interleave(G, dim=0),
            weigh=copies_weigh(options),
            exact=sums_to_one(options),
        )

    def proof(new: nn.Module, paths: Sequence[str], samples: Samples) -> str:
        """Every token's choices are each slice equally often."""
        times, met = options.top_k // G, 0
        want = torch.arange(G).repeat_interleave(times)
        for batch in samples.batches:
            for path, seen in watch(new, paths, batch).items():
                slices = (seen.plan.expert % G).sort(dim=1).values.cpu()
                wrong = int((slices != want).any(1).sum())
                if wrong:
                    raise ConversionError(
                        f"{path}: {wrong} of {len(slices)} tokens do not meet each slice {times} times"
                    )
                met += len(slices)
        return f"each of {met} routed tokens met each slice exactly {'once' if times == 1 else f'{times} times'}"

    claim = "each token meets each slice of the dense layer once per copy"
    return upcycle(options, model, make, claim, proof=proof, **given)


def modular(options: Modular, model: nn.Module, **given: Any) -> Converted:
    """N slices of F / N neurons, outputs times N, each with the whole bias; weights of the K chosen ones sum to 1.

    Exact with all N taken at weight 1 / N. The published combine, a softmax over the kept logits, is near that where
    logits are narrow; how the weights of a trained layer are split and rescaled for it was never published.
    """
    weigh = Constant() if options.weigh is None else options.weigh

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        return Layer(
            experts=_slices(place, count, "num_experts"),
            rows=router_rows(options, place, count, inputs),
            weigh=weigh,
            exact=options.top_k == count and weigh == Constant(),
            frozen=options.frozen,
        )

    return upcycle(options, model, make, "the mean of all slices is the dense layer", **given)


def _slices(place: Place, count: int, name: str) -> list[DenseMLP]:
    """Equal parts of the layer, in order; their mean is the layer."""
    F = place.mlp.width
    if F % count:
        raise UserError(f"{place.path}: width {F} is no multiple of {name} {count}")
    return [place.mlp.neurons(ids).scaled(count, bias_factor=1.0) for ids in torch.arange(F).view(count, -1)]


def reinit(options: PartialReinit, model: nn.Module, **given: Any) -> Converted:
    """Copies with a share of neurons, drawn for each expert, whose weights are drawn anew (Drop-Upcycling)."""

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        experts = [
            _redrawn(place.mlp, options.share, generator(options.seed, f"{place.path}.{e}")) for e in range(count)
        ]
        new = round(options.share * place.mlp.width)
        return Layer(
            experts=experts,
            rows=router_rows(options, place, count, inputs),
            weigh=copies_weigh(options),
            exact=new == 0 and sums_to_one(options),
            invented=f"{new} of {place.mlp.width} neurons of each expert drawn anew" if new else None,
        )

    return upcycle(options, model, make, "identical experts give the output of the dense model", **given)


def _redrawn(mlp: DenseMLP, share: float, draws: torch.Generator) -> DenseMLP:
    """`share` of the neurons with new rows and columns, normal with each matrix' own mean and standard deviation."""
    made, count = mlp.clone(), round(share * mlp.width)
    ids = torch.randperm(mlp.width, generator=draws)[:count].to(mlp.up.device)
    for name, tensor in made.tensors().items():
        if name == "down_bias" or not count:
            continue
        axis = 1 if name == "down" else 0
        shape = list(tensor.shape)
        shape[axis] = count
        mean, std = float(tensor.double().mean()), float(tensor.double().std(correction=0))
        tensor.index_copy_(axis, ids, torch.empty(shape).normal_(mean, std, generator=draws).to(tensor))
    return made


def cluster(options: Cluster, model: nn.Module, **given: Any) -> Converted:
    """Neurons grouped by k-means; a router row is the mean direction in which its expert's neurons look.

    The weights are 1 on average, K times the renormalised ones; with every expert taken at weight 1 the output is that
    of the dense layer. The output's bias is dealt out evenly over K choices.
    """

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        mlp = place.mlp
        if count > mlp.width:
            raise UserError(f"{place.path}: {mlp.width} neurons cannot form {count} experts")
        if options.by == "weights":
            points = mlp.reads if mlp.up_bias is None else torch.cat([mlp.reads, mlp.up_bias[:, None]], 1)
        else:
            points = mlp.hidden(inputs(place.path)).abs().t()
        points = points.float()
        points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
        draws = generator(options.seed, f"{place.path}.clusters")
        label, _ = kmeans(points, count, draws, options.iterations, balanced=options.balanced)
        groups = [torch.where(label == c)[0].to(mlp.up.device) for c in range(count)]
        experts = [mlp.neurons(ids, bias_share=1 / options.top_k) for ids in groups]
        weigh = balanced_weigh(options, count)
        if options.router == "centroids":
            rows = router_rows(options, place, count, inputs)
        else:
            rows = _looks(options.router_std, experts)
        whole = options.top_k == count and weigh == Constant(value=1.0)
        sizes = tuple(e.width for e in experts)
        return Layer(experts=experts, rows=rows, weigh=weigh, exact=whole, notes=(f"neurons per expert: {sizes}",))

    return upcycle(options, model, make, "all groups of neurons together are the dense layer", **given)


def _looks(std: float, experts: Sequence[DenseMLP]) -> Tensor:
    """[E, D]: mean directions of each expert's rows, of standard deviation `std`."""
    rows = torch.stack([e.reads.float().mean(0) for e in experts])
    return rows / rows.std(dim=1, keepdim=True, correction=0).clamp_min(1e-12) * std


def taylor(
    options: Taylor, model: nn.Module, *, loss: Callable[[nn.Module, Any], Any] | None = None, **given: Any
) -> Converted:
    """The most important neurons to a shared expert with the output's bias; the rest dealt round robin by importance.

    loss: (model, batch) -> what importance is derived from; the next token's nats if not given.
    """
    scores: dict[str, Tensor] = {}

    def prepare(places: Sequence[Place], samples: Samples) -> None:
        scores.update(importance(model, places, samples, loss))

    def make(place: Place, count: int, inputs: Inputs) -> Layer:
        mlp = place.mlp
        order = scores[place.path].argsort(descending=True, stable=True).to(mlp.up.device)
        head = max(1, round(options.shared * mlp.width))
        if mlp.width - head < count:
            raise UserError(f"{place.path}: {mlp.width - head} neurons are left for {count} experts; lower shared")
        rest = order[head:]
        bare = mlp if mlp.down_bias is None else mlp.changed(down_bias=torch.zeros_like(mlp.down_bias))
        weigh = balanced_weigh(options, count)
        return Layer(
            experts=[bare.neurons(rest[e::count].sort().values) for e in range(count)],
            rows=router_rows(options, place, count, inputs),
            weigh=weigh,
            shared=mlp.neurons(order[:head].sort().values),
            exact=options.top_k == count and weigh == Constant(value=1.0),
        )

    return upcycle(options, model, make, "all experts together are the dense layer", prepare=prepare, **given)
