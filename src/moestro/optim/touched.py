"""Steps for touched experts only: what optimisers do with gradients that are sparse over the expert axis.

Banks with `sparse_grad=True` leave gradients [E, ...] that hold the experts that met a unit. Two ways on:

- `TouchedExperts` shows an optimiser of anybody (and `clip_grad_norm_`) the experts one by one. Untouched experts have
  no gradient there, so the optimiser passes over them, and the norm is the one of the full gradient.
- `moestro.optim.AdamW` steps touched experts by itself.

Passing over an expert is the same as a full update with a gradient of zeros for SGD without momentum and weight decay,
and for Adagrad without either decay. It is another method for optimisers with a memory (momentum, Adam, AdamW: the
moments of an untouched expert do not fade, its step count stands still, its weights do not decay), as with
`torch.optim.SparseAdam`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import describe

__all__ = ["TouchedExperts", "settle", "stored"]


def stored(grad: Tensor) -> Tensor:
    """The numbers of a gradient: all of a dense one; the touched experts' of a sparse one, as a view where it has been
    settled."""
    return grad.coalesce().values() if grad.is_sparse else grad


def settle(parameters: Iterable[Tensor]) -> None:
    """Add up, expert by expert, what several backward passes left in sparse gradients."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()


class TouchedExperts:
    """The parameters of a model with experts one by one, for any optimiser.

        bridge = TouchedExperts(model)
        optimizer = torch.optim.AdamW(bridge.parameters())
        loss.backward()
        bridge.collect()
        torch.nn.utils.clip_grad_norm_(bridge.parameters(), 1.0)
        optimizer.step()
        bridge.clear()

    The experts' tensors share memory with the model's parameters; make the bridge after the model has been moved to its
    device and dtype. Not for DDP and FSDP.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plain: list[Tensor] = []
        self._stacked: list[tuple[nn.Parameter, list[Tensor]]] = []
        infos = describe(model)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if infos[name].expert_axis == 0:
                alone = [view.requires_grad_() for view in parameter.detach().unbind(0)]
                self._stacked.append((parameter, alone))
            else:
                self._plain.append(parameter)

    def parameters(self) -> list[Tensor]:
        """Everything trainable: experts' parameters as E tensors, all others as they are."""
        return [*self._plain, *(view for _, alone in self._stacked for view in alone)]

    def collect(self) -> None:
        """Hand the gradients that backward passes left over to the experts; untouched experts get None."""
        for parameter, alone in self._stacked:
            if parameter.data_ptr() != alone[0].data_ptr() or parameter.dtype != alone[0].dtype:
                raise UserError("TouchedExperts: the model's parameters have been moved; make the bridge after that")
            grad, parameter.grad = parameter.grad, None
            for view in alone:
                view.grad = None
            if grad is None:
                continue
            grad = grad.coalesce() if grad.is_sparse else grad
            touched = grad.indices()[0].tolist() if grad.is_sparse else range(len(alone))
            for e, value in zip(touched, stored(grad).unbind(0)):
                alone[e].grad = value

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters(), *(parameter for parameter, _ in self._stacked)):
            tensor.grad = None
