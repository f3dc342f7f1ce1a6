"""`linear` with every entry summed over the inputs in their order, whatever the other rows are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from .. import native

__all__ = ["linear", "supported"]

_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("ordered_product(Tensor a, Tensor b, bool turned) -> Tensor")


def supported(x: Tensor) -> tuple[bool, str]:
    """Whether products of such rows can be had in a fixed order, and why (not)."""
    if x.device.type != "cpu":
        return False, f"only the CPU kernels fix the order, not {x.device.type}'s"
    if x.dtype != torch.float32:
        return False, f"the CPU kernels have fp32 only, not {str(x.dtype).removeprefix('torch.')}"
    return native.load() is not None, native.reason()


def _product(a: Tensor, b: Tensor, turned: bool) -> Tensor:
    able, reason = supported(a)
    if not able:
        raise UserError(f"deterministic=True: {reason}; leave it out")
    library = native.load()
    assert library is not None
    a, b = a.contiguous(), b.contiguous()
    (m, K), N = a.shape, b.shape[0 if turned else 1]
    threads = torch.get_num_threads()
    out = a.new_empty(m, N)
    scratch = a.new_empty(threads * library.moestro_ordered_scratch(K))
    pointers = (out.data_ptr(), a.data_ptr(), b.data_ptr())
    library.moestro_ordered(*pointers, turned, m, N, K, scratch.data_ptr(), threads)
    return out


_LIBRARY.impl("ordered_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::ordered_product")
def _(a: Tensor, b: Tensor, turned: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0 if turned else 1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.turned = inputs
    ctx.save_for_backward(a, b)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    d_a = _OP(grad, b, not ctx.turned) if ctx.needs_input_grad[0] else None
    d_b = None
    if ctx.needs_input_grad[1]:  # a sum over rows, which depends on all of them anyhow
        d_b = grad.t() @ a if ctx.turned else a.t() @ grad
    return d_a, d_b, None


torch.library.register_autograd("moestro::ordered_product", _differentiate, setup_context=_keep)
_OP = torch.ops.moestro.ordered_product.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; the gradient of x too has rows that do not depend on each other.

    Shapes: x [T, I], weight [O, I], bias [O] or None -> [T, O]. Raises `UserError` where no such product can be had.
    """
    y = _OP(x, weight, True)
    return y if bias is None else y + bias
