"""Muon: momentum whose update is made orthogonal, for the matrices inside the blocks.

Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express: the coefficients), Li et al. 2025 (NorMuon: the norm of each row),
Liu et al. 2025 (Moonlight: the scale of the update).
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm_core.distributed.sharding import full_tensor, own_shard
from llm_core.training.uncompiled import Uncompiled

# a, b, c of each iteration x <- a x + b (x x^T) x + c (x x^T)^2 x: the composition that brings all singular values from
# 0.001 to 1 closest to 1 (Amsel et al. 2025, section 3, with the same safety factor).
_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SAFETY = 1.02  # rounding may leave a norm above 1, from which the iteration diverges

# Decay of the mean square of each row.
_ROW_BETA = 0.95

# Elements of the parameters that move together: products of small matrices are fast together, and the temporary tensors are
# several times as large.
_ELEMENTS_AT_ONCE = 1 << 23

# Root mean square of an update at a learning rate of 1: about that of AdamW's.
_UPDATE_RMS = 0.2


class Muon(Uncompiled):
    """Nesterov momentum, orthogonalized; each row scaled to the same mean size, each matrix to AdamW's root mean square.

    Several matrices may be stacked in one parameter (query, key and value; gate and up): `rows` of a parameter group gives the
    rows of each, and every one is orthogonalized by itself. Matrices of equal shape are multiplied as one batch. Sharded
    parameters are gathered one by one, and every rank computes all updates.

    dtype: of the matrix products. bf16 is enough where the device has it.
    """

    def __init__(
        self, groups: list[dict[str, Any]], momentum: float, weight_decay: float, dtype: torch.dtype, lr: float = 1.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": None})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon does not support closures"
        work: list[tuple[nn.Parameter, dict[str, Any]]] = []
        elements = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    work.append((parameter, group))
                    elements += parameter.numel()
                    if elements >= _ELEMENTS_AT_ONCE:
                        self._move(work)
                        work, elements = [], 0
        self._move(work)

    def _move(self, work: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Moves these parameters by one step. work: each with its group."""
        updates = [self._momentum(parameter, group["momentum"]) for parameter, group in work]
        stacks: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for update, (_, group) in zip(updates, work, strict=True):
            for matrix in _matrices(update, group["rows"]):
                stacks[_flat_shape(matrix)].append(matrix)
        for matrices in stacks.values():
            orthogonalize(matrices, self.dtype)
        for update, (parameter, group) in zip(updates, work, strict=True):
            self._apply(parameter, update, group)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Updates the momentum and returns the Nesterov update: a new tensor, gathered."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["row_squares"] = torch.zeros(len(parameter), 1, device=grad.device)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = grad.lerp(mean, momentum)
        return full_tensor(update)

    def _apply(self, parameter: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
        """Scales an orthogonal update and moves the parameter by it."""
        squares = self.state[parameter]["row_squares"]
        squares.lerp_(update.square().mean(1, keepdim=True), 1 - _ROW_BETA)
        update /= squares.sqrt().clamp(min=1e-10)
        for matrix in _matrices(update, group["rows"]):
            matrix *= _UPDATE_RMS / matrix.square().mean().sqrt().clamp(min=1e-10)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(own_shard(update, parameter), alpha=-group["lr"])


def _matrices(tensor: Tensor, rows: list[int] | None) -> tuple[Tensor, ...]:
    """Views of the matrices that a tensor consists of."""
    return tensor.split(rows) if rows is not None else (tensor,)


def _flat_shape(matrix: Tensor) -> tuple[int, int]:
    """(rows, columns) of a matrix that lies on its longer side."""
    return min(matrix.shape), max(matrix.shape)


def orthogonalize(matrices: list[Tensor], dtype: torch.dtype) -> None:
    """Moves all singular values of each matrix close to 1, in place; the matrices are of one shape, some may be transposed.

    dtype: of the products.
    """
    flat = [matrix if matrix.shape == _flat_shape(matrix) else matrix.mT for matrix in matrices]
    x = torch.stack(flat)  # (N, rows, columns): the products are smaller this way round
    x = (x / (x.norm(dim=(1, 2), keepdim=True) * _SAFETY).clamp(min=1e-30)).to(dtype)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    for matrix, orthogonal in zip(flat, x, strict=True):
        matrix.copy_(orthogonal)
