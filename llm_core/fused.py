"""The elementwise steps of the model with their gradients written by hand, so that each keeps only what its backward pass needs.

PyTorch's autograd keeps the result of every operation in the chain. These functions keep their input and compute the rest
again: a training step then takes about a fifth less memory, and on a CPU, where such steps cost what they move, less time.
torch.compile does the same by itself, out of the plain formulas; the tests compare the two.
"""

from collections.abc import Sequence
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


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Splits qkv into query, key and value heads, and turns each pair (x[i], x[i + D/2]) of the first two by its position's angle
    (Su et al. 2021), in fp32.

    qkv: (B, T, H + 2K, D); cos and sin: (..., T, 1, D/2); heads: H, K, K. Returns (B, T, H, D) and twice (B, T, K, D).
    """
    if torch.compiler.is_compiling():
        q, k, v = qkv.split(heads, dim=2)
        return plain_rotate(q, cos, sin), plain_rotate(k, cos, sin), v
    turned: tuple[Tensor, Tensor, Tensor] = _Rotate.apply(qkv, cos, sin, heads)
    return turned


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        turned = torch.empty_like(qkv)
        sections = qkv.split(heads, dim=2), turned.split(heads, dim=2)
        return _rotate_into(*sections, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        batch, length, _, width = grads[0].shape
        grad = grads[0].new_empty(batch, length, sum(ctx.heads), width)
        _rotate_into(grads, grad.split(ctx.heads, dim=2), cos, -sin)
        return grad, None, None, None


def _rotate_into(sources: Sequence[Tensor], results: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Query and key turned, the value as it is."""
    for x, result in zip(sources[:2], results[:2], strict=True):
        x, turned = x.float(), result if result.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
        (first, second), (turned_first, turned_second) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
        torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
        if turned is not result:
            result.copy_(turned)
    results[2].copy_(sources[2])
    return results
