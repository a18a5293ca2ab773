"""Negative log-likelihood of the head, in row chunks: the (tokens, vocabulary) logits never exist as a whole.

At small hidden sizes the logits are most of a step's memory and traffic. The gradients are made in the forward pass, while a
chunk's probabilities are still in cache, so nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Target of positions that carry no loss: the padding of the last window."""

_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}  # logits of one chunk: enough for a matrix product at full speed

_FP16_ROWS = 2048


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """NLL of each token in nats without gradients: (...), fp32, 0 where ignored. hidden: (..., C), weight: (V, C)."""
    with torch.no_grad():
        rows, labels = _compute_dtype(hidden.reshape(-1, hidden.shape[-1])), targets.reshape(-1)
        matrix = _compute_dtype(weight)
        chunk = chunk_rows(rows.device.type, weight.shape[0])
        memory = rows.new_empty(min(chunk, len(rows)), weight.shape[0])
        pieces = [_probabilities(r, matrix, t, memory)[1] for r, t in zip(rows.split(chunk), labels.split(chunk), strict=True)]
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
        grad_weight = torch.empty_like(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = chunk_rows(rows.device.type, weight.shape[0])
        if matrix.dtype == torch.float16:
            # A sum over many rows of one token would overflow, and the loss scale, which comes later, could not help.
            chunk = min(chunk, _FP16_ROWS)
        memory = rows.new_empty(min(chunk, len(rows)), weight.shape[0])  # one piece for all chunks
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, min(start + chunk, len(rows)))
            valid = (targets[part] != IGNORE_INDEX).unsqueeze(1)
            labels = targets[part].unsqueeze(1).clamp(min=0)
            probabilities, nll = _probabilities(rows[part], matrix, targets[part], memory)
            total += nll.sum()
            # d nll / d logits = softmax - one_hot, 0 where there is no target.
            grad_logits = probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, -1))
            if not valid.all():
                grad_logits *= valid
            grad_logits = grad_logits.to(matrix.dtype)
            torch.mm(grad_logits, matrix, out=grad_rows[part])
            if matrix.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), rows[part], beta=min(start, 1))  # 0: what lay there before is not read
            elif start == 0:
                grad_weight.copy_(grad_logits.t() @ rows[part])
            else:
                grad_weight += (grad_logits.t() @ rows[part]).float()
        ctx.gradients = (grad_rows.to(hidden.dtype), grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients  # scaled where they lie, which can be done only once
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None


def _probabilities(rows: Tensor, matrix: Tensor, targets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows @ matrix.T (rows, V), and the NLL of the targets (rows,), 0 where ignored; both fp32.

    memory: at least (rows, V), for the product; fp32 probabilities lie there too.
    """
    index = targets.unsqueeze(1).clamp(min=0)
    logits = torch.mm(rows, matrix.t(), out=memory[: len(rows)]).float()
    probabilities = torch.softmax(logits, dim=1, out=logits)  # in one pass of each row through the cache
    nll = probabilities.gather(1, index).log_().neg_().squeeze(1)
    if not nll.isfinite().all():  # a probability too small for fp32, or values that are not finite
        far = ~nll.isfinite()
        scores = (rows[far] @ matrix.t()).float()
        nll[far] = scores.logsumexp(1) - scores.gather(1, index[far]).squeeze(1)
    return probabilities, nll.masked_fill_(targets == IGNORE_INDEX, 0.0)


def _compute_dtype(tensor: Tensor) -> Tensor:
    """Follows autocast by hand: a custom function is outside of its list."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """Tokens whose logits are computed at once; a multiple of 64, which matrix products like."""
    return max(64, _CHUNK_ELEMENTS.get(device_type, 1 << 23) // vocab_size // 64 * 64)
