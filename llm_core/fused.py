"""The elementwise steps of the model with their gradients written by hand, so that each keeps only what its backward pass needs.

PyTorch's autograd keeps the result of every operation in the chain. These functions keep their input and compute the rest
again: a training step then takes about a fifth less memory, and on a CPU, where such steps cost what they move, less time.
torch.compile does the same by itself, out of the plain formulas; the tests compare the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), in fp32, returned in the dtype of x."""
    if torch.compiler.is_compiling():
        return plain_rms_norm(x, weight, eps)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).type_as(x)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * scale: d weight = sum of grad n, and d x = scale (grad weight - n mean(grad weight n)).
        x, weight, scale = ctx.saved_tensors
        grad32, normed = grad.float(), x.float() * scale
        product = grad32 * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad32 * weight).sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.type_as(x), grad_weight.type_as(weight), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up: (..., 2F), gate first; returns (..., F)."""
    if torch.compiler.is_compiling():
        return plain_swiglu(gate_up)
    gated: Tensor = _SwiGLU.apply(gate_up)
    return gated


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of the first `heads` heads by its position's angle (Su et al. 2021), in fp32.

    x: (B, T, H, D), which is overwritten and returned; the heads after the first `heads` stay as they are.
    cos and sin: (..., T, 1, D/2).
    """
    if torch.compiler.is_compiling():
        return torch.cat((plain_rotate(x[:, :, :heads], cos, sin), x[:, :, heads:]), dim=2)
    turned: Tensor = _Rotate.apply(x, cos, sin, heads)
    return turned


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        _rotate_in_place(x[:, :, :heads], cos, sin)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone()  # autograd's own
        _rotate_in_place(grad[:, :, : ctx.heads], cos, -sin)
        return grad, None, None, None


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    x[..., half:] = torch.addcmul(second * cos, first, sin)
    x[..., :half] = turned
