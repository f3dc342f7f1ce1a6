"""Which neurons of a dense layer belong together, and which matter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ..change.mlp import Place
from ..change.samples import Samples, next_token_loss

__all__ = ["importance", "kmeans"]


@torch.no_grad()
def kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, rounds: int = 20, *, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """(cluster of each point [N] int64, centroids [C, D] float64) by Lloyd's rounds from points that lie far apart.

    balanced: all clusters equally large (the first N mod C get one more): pairs of point and cluster are accepted in
    the order of their distance while there is room. An empty cluster takes the point that lies farthest from its own.
    Raises `UserError` for fewer points than clusters.
    """
    N = points.shape[0]
    if clusters > N:
        raise UserError(f"{N} points cannot form {clusters} clusters")
    points = points.detach().double().cpu()
    centres = _far_apart(points, clusters, generator)
    label = torch.full((N,), -1)
    for _ in range(rounds):
        distance = torch.cdist(points, centres)
        after = _fill(distance) if balanced else _nearest(distance)
        if torch.equal(after, label):
            break
        label = after
        centres = torch.stack([points[label == c].mean(0) for c in range(clusters)])
    return label, centres


def _far_apart(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn with the squared distance to the nearest one so far as its weight."""
    chosen = [int(torch.randint(0, points.shape[0], (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        weight = nearest.clone()
        weight[chosen] = 0
        if not float(weight.sum()) > 0:  # all points lie on a centre: take any other
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _nearest(distance: Tensor) -> Tensor:
    label = distance.argmin(1)
    own = distance.gather(1, label[:, None])[:, 0]
    for c in range(distance.shape[1]):
        if not bool((label == c).any()):
            alone = torch.bincount(label, minlength=distance.shape[1])[label] == 1
            farthest = int(torch.where(alone, -1.0, own).argmax())
            label[farthest], own[farthest] = c, 0.0
    return label


def _fill(distance: Tensor) -> Tensor:
    N, clusters = distance.shape
    room = [N // clusters + (c < N % clusters) for c in range(clusters)]
    label = [-1] * N
    left = N
    for pair in distance.flatten().argsort(stable=True).tolist():
        n, c = divmod(pair, clusters)
        if label[n] < 0 and room[c]:
            label[n], room[c] = c, room[c] - 1
            left -= 1
            if not left:
                break
    return torch.tensor(label)


def importance(
    model: nn.Module, places: Sequence[Place], samples: Samples, loss: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, Tensor]:
    """path -> [F] float64: sum over tokens of |a * dL/da| for each neuron's activation a (brief 01; Molchanov 2019).

    loss: (model, batch) -> the loss to derive, summed or averaged; the next token's nats if not given. No gradient of
    the model is touched: the layer's output is derived for, and dL/da = dL/dy times the neuron's column.
    """
    total = {p.path: torch.zeros(p.mlp.width, dtype=torch.float64) for p in places}
    for batch in samples.batches:
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad(), contextlib.ExitStack() as stack:
            for place in places:
                module = model.get_submodule(place.path)
                stack.callback(module.register_forward_hook(_add_leaf(kept, place.path)).remove)
            value = next_token_loss(model, batch)[0] if loss is None else loss(model, batch)
            gradients = torch.autograd.grad(value, [kept[p.path][1] for p in places])
        for place, gradient in zip(places, gradients, strict=True):
            x = kept[place.path][0]
            with torch.no_grad():
                activation = place.mlp.hidden(x)
                slope = gradient.flatten(0, -2).to(activation) @ place.mlp.down
                total[place.path] += (activation * slope).double().abs().sum(0).cpu()
    return total


def _add_leaf(kept: dict[str, tuple[Tensor, Tensor]], path: str) -> Callable[..., Any]:
    """A hook that adds zeros to a layer's output: their gradient is that of the output."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out
        leaf = torch.zeros_like(y, requires_grad=True)
        kept[path] = args[0].detach().flatten(0, -2), leaf
        return (y + leaf, *out[1:]) if isinstance(out, tuple) else y + leaf

    return hook
