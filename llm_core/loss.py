"""Negative log-likelihood of the head, in row chunks: the (tokens, vocabulary) logits never exist as a whole.

At small hidden sizes the logits are most of a step's memory and traffic. The gradients are made in the forward pass, while a
chunk's probabilities are still in cache, so nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Target of positions that carry no loss: the padding of the last window."""

_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits of one chunk: about a CPU's last-level cache, a GPU's full occupancy

_FP16_ROWS = 2048


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """NLL of each token in nats without gradients: (...), fp32, 0 where ignored. hidden: (..., C), weight: (V, C)."""
    with torch.no_grad():
        rows, labels = _compute_dtype(hidden.reshape(-1, hidden.shape[-1])), targets.reshape(-1)
        matrix = _compute_dtype(weight)
        chunk = chunk_rows(rows.device.type, weight.shape[0])
        pieces = [
            F.cross_entropy((r @ matrix.t()).float(), t, reduction="none", ignore_index=IGNORE_INDEX)
            for r, t in zip(rows.split(chunk), labels.split(chunk), strict=True)
        ]
        return torch.cat(pieces).view_as(targets)


def nll_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the NLL in nats over the targets that are not IGNORE_INDEX, fp32; 0 (not NaN) where there is none.

    hidden: (..., C), weight: (V, C), targets: (...).
    """
    if not torch.is_grad_enabled():
        return token_nll(hidden, weight, targets).sum()
    loss: Tensor = _ChunkedNLL.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    return loss


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows, matrix = _compute_dtype(hidden), _compute_dtype(weight)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = chunk_rows(rows.device.type, weight.shape[0])
        if matrix.dtype == torch.float16:
            # A sum over many rows of one token would overflow, and the loss scale, which comes later, could not help.
            chunk = min(chunk, _FP16_ROWS)
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            valid = (targets[part] != IGNORE_INDEX).unsqueeze(1)
            labels = targets[part].unsqueeze(1).clamp(min=0)
            log_probs = F.log_softmax((rows[part] @ matrix.t()).float(), dim=1)  # (rows, V)
            total -= (log_probs.gather(1, labels) * valid).sum()
            # d nll / d logits = softmax - one_hot, 0 where there is no target.
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=grad_logits.dtype))
            if not valid.all():
                grad_logits *= valid
            grad_logits = grad_logits.to(matrix.dtype)
            torch.mm(grad_logits, matrix, out=grad_rows[part])
            if matrix.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), rows[part])
            else:
                grad_weight += (grad_logits.t() @ rows[part]).float()
        ctx.save_for_backward(grad_rows.to(hidden.dtype), grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output.to(grad_hidden.dtype), grad_weight * grad_output, None


def _compute_dtype(tensor: Tensor) -> Tensor:
    """Follows autocast by hand: a custom function is outside of its list."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """Tokens whose logits are computed at once."""
    return max(64, _CHUNK_ELEMENTS.get(device_type, 1 << 23) // vocab_size)
