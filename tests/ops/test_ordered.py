"""Products whose rows do not depend on each other."""

import pytest
import torch

from moestro.core.errors import UserError
from moestro.ops import native, ordered
from moestro.testing.compare import assert_close
from ops.ops_cases import randn

needs_kernels = pytest.mark.skipif(native.load() is None, reason=f"no CPU kernels: {native.reason()}")


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 7, 5), (130, 65, 33), (200, 64, 32), (3, 1, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_and_its_gradients(shape: tuple[int, int, int], biased: bool) -> None:
    T, I, O = shape
    tensors = [randn(T, I), randn(O, I, seed=1), *([randn(O, seed=2)] if biased else [])]
    mine, exact = ([t.detach().to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    grad = randn(T, O, seed=3)
    y = ordered.linear(*mine)
    want = torch.nn.functional.linear(*exact)
    y.backward(grad)
    want.backward(grad.double())
    assert_close("y", y.detach(), want.detach(), 1e-6)
    for name, a, b in zip(("x", "weight", "bias"), mine, exact):
        assert_close(name, a.grad, b.grad, 1e-6)  # type: ignore[arg-type]


@needs_kernels
def test_rows_are_equal_alone_and_in_a_batch() -> None:
    x, weight = randn(300, 70).requires_grad_(), randn(40, 70, seed=1)
    y = ordered.linear(x, weight)
    y.sum().backward()
    for rows in (slice(0, 1), slice(17, 30), slice(200, 300)):
        part = x.detach()[rows].requires_grad_()
        again = ordered.linear(part, weight)
        again.sum().backward()
        assert torch.equal(again, y[rows])
        assert x.grad is not None
        assert torch.equal(part.grad, x.grad[rows])  # type: ignore[arg-type]


@needs_kernels
def test_the_op_keeps_its_promises() -> None:
    tensors = randn(4, 6).requires_grad_(), randn(5, 6, seed=1).requires_grad_(), True
    torch.library.opcheck(torch.ops.moestro.ordered_product.default, tensors)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="float64"):
        ordered.linear(randn(2, 3).double(), randn(4, 3).double())
