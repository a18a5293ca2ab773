"""Causal attention: the flash-attn package where it runs, else PyTorch's scaled dot product attention."""

from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_core.errors import UserError

Backend = Literal["flash", "sdpa"]


def choose_backend(
    requested: Literal["auto", "flash", "sdpa"], device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """Picks the implementation. flash-attn needs CUDA with compute capability 8.0, bf16 or fp16, and heads up to 256 wide.

    Raises:
        UserError: flash is requested and cannot run here.
    """
    if requested == "sdpa":
        return "sdpa"
    obstacles = []
    if device.type != "cuda":
        obstacles.append(f"device is {device.type}, not cuda")
    elif _is_before_ampere(device):
        obstacles.append("the GPU is older than compute capability 8.0")
    if dtype not in (torch.bfloat16, torch.float16):
        obstacles.append(f"precision is {dtype}, not bf16 or fp16")
    if head_dim > 256:
        obstacles.append(f"heads are {head_dim} wide, more than 256")
    try:
        import_module("flash_attn")
    except ImportError as error:  # not installed, or built for another PyTorch
        obstacles.append(f'the package flash-attn cannot be loaded ({error}; pip install -c constraints.txt -e ".[gpu]")')
    if not obstacles:
        return "flash"
    if requested == "flash":
        raise UserError(f"--attention flash: {'; '.join(obstacles)}; use --attention auto or sdpa")
    return "sdpa"


def _is_before_ampere(device: torch.device) -> bool:
    # get_device_capability would break a compiled graph here.
    return torch.cuda.get_device_properties(device).major < 8


@dataclass(frozen=True)
class DocumentMask:
    """Keeps attention inside each document of a window.

    Built once per batch, outside the blocks: all of them share it, and compiled graphs do not contain it.
    """

    positions: Tensor  # (B, T) position of each token in its document
    mask: Tensor | None = None  # for sdpa: (B, 1, T, T), true where a query attends to a key: same document, not later
    bounds: Tensor | None = None  # for flash: int32, start of each document in the flattened batch, then its end
    longest: int = 0  # for flash: tokens of the longest document

    @classmethod
    def from_inputs(cls, inputs: Tensor, eot_id: int, backend: Backend) -> "DocumentMask":
        """Each end-of-text token begins a document; a window may begin inside one. inputs: (B, T)."""
        starts = inputs == eot_id
        index = torch.arange(inputs.shape[1], device=inputs.device)
        positions = index - torch.where(starts, index, 0).cummax(dim=1).values
        if backend == "sdpa":
            ids = starts.cumsum(dim=1)  # (B, T) number of each token's document
            return cls(positions, mask=(ids[:, None, :, None] == ids[:, None, None, :]).tril())
        bounds = F.pad(torch.nonzero((positions == 0).flatten()).flatten(), (0, 1), value=inputs.numel()).to(torch.int32)
        return cls(positions, bounds=bounds, longest=int(bounds.diff().max()))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend, documents: DocumentMask | None = None) -> Tensor:
    """Attention of each token to itself and to earlier tokens, with `documents` only of the same document.

    q: (B, T, H, D), k and v: (B, T, KV, D) with KV dividing H. Returns (B, T, H, D).
    """
    if backend == "flash":
        return _flash_attention(q, k, v, documents)
    mask = documents.mask if documents is not None else None
    if q.is_cuda and q.shape[2] != k.shape[2] and (mask is not None or q.dtype == torch.float32 or _is_before_ampere(q.device)):
        # On CUDA only PyTorch's flash kernel supports grouped heads, but neither masks nor fp32 nor older GPUs. Without this,
        # PyTorch falls back to the kernel that materializes all T x T scores.
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, H, T, D)
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, documents: DocumentMask | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # the extra `gpu`: not installed on CPU machines

    if documents is None:
        out: Tensor = flash_attn_func(q, k, v, causal=True)
        return out
    packed = flash_attn_varlen_func(
        q.flatten(0, 1),  # (B*T, H, D)
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=documents.bounds,
        cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        causal=True,
    )
    return packed.view_as(q)
