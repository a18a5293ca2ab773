"""Head and negative log-likelihood (NLL) in chunks of rows: the (tokens, vocabulary) logits never exist as a whole.

With a small hidden size, logits take most of a step's memory and bandwidth. Gradients are computed in the forward pass, while the
probabilities of a chunk are still in cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_core.config import IGNORE_INDEX

# Logits in a chunk, by device: enough for a matrix product at full speed.
_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}

# Rows of an fp16 chunk: the gradient summed over more rows of one token overflows, and loss scaling comes too late to help.
_FP16_ROWS = 2048


def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """NLL of each target in nats, (...), fp32, without gradients; 0 at IGNORE_INDEX.

    hidden: (..., C), weight: (V, C), targets: (...).
    """
    with torch.no_grad():
        rows, labels = _compute_dtype(hidden.reshape(-1, hidden.shape[-1])), targets.reshape(-1)
        matrix = _compute_dtype(weight)
        chunk = chunk_rows(rows.device.type, weight.shape[0])
        memory = rows.new_empty(min(chunk, len(rows)), weight.shape[0])
        chunks = [_probabilities(r, matrix, t, memory)[1] for r, t in zip(rows.split(chunk), labels.split(chunk), strict=True)]
        return torch.cat(chunks).view_as(targets)


def nll_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the NLL in nats over all targets but IGNORE_INDEX, fp32; 0 (not NaN) if there are none.

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
            chunk = min(chunk, _FP16_ROWS)
        memory = rows.new_empty(min(chunk, len(rows)), weight.shape[0])  # reused by all chunks
        for start in range(0, rows.shape[0], chunk):
            span = slice(start, min(start + chunk, len(rows)))
            valid = (targets[span] != IGNORE_INDEX).unsqueeze(1)
            labels = targets[span].unsqueeze(1).clamp(min=0)
            probabilities, nll = _probabilities(rows[span], matrix, targets[span], memory)
            total += nll.sum()
            # d nll / d logits = softmax - one_hot, and 0 at IGNORE_INDEX.
            grad_logits = probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, -1))
            if not valid.all():
                grad_logits *= valid
            grad_logits = grad_logits.to(matrix.dtype)
            torch.mm(grad_logits, matrix, out=grad_rows[span])
            if matrix.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), rows[span], beta=min(start, 1))  # beta 0 ignores the uninitialized memory
            elif start == 0:
                grad_weight.copy_(grad_logits.t() @ rows[span])
            else:
                grad_weight += (grad_logits.t() @ rows[span]).float()
        ctx.gradients = (grad_rows.to(hidden.dtype), grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients  # scaled in place, so they can be used only once
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None


def _probabilities(rows: Tensor, matrix: Tensor, targets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows @ matrix.T, (N, V), and the NLL of the targets, (N,), 0 at IGNORE_INDEX; both fp32.

    rows: (N, C), matrix: (V, C), targets: (N,). memory: at least (N, V), overwritten by the product and by an fp32 softmax.
    """
    index = targets.unsqueeze(1).clamp(min=0)
    logits = torch.mm(rows, matrix.t(), out=memory[: len(rows)]).float()
    probabilities = torch.softmax(logits, dim=1, out=logits)  # in place: each row passes through the cache once
    nll = probabilities.gather(1, index).log_().neg_().squeeze(1)
    if not nll.isfinite().all():  # a probability underflows in fp32, or an input is not finite
        inexact = ~nll.isfinite()
        scores = (rows[inexact] @ matrix.t()).float()
        nll[inexact] = scores.logsumexp(1) - scores.gather(1, index[inexact]).squeeze(1)
    return probabilities, nll.masked_fill_(targets == IGNORE_INDEX, 0.0)


def _compute_dtype(tensor: Tensor) -> Tensor:
    """Casts as autocast would: it does not cover custom functions."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """Rows of a chunk: tokens whose logits are computed together; a multiple of 64, for fast matrix products."""
    return max(64, _CHUNK_ELEMENTS.get(device_type, 1 << 23) // vocab_size // 64 * 64)
