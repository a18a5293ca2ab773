"""A decoder-only transformer of the Llama family. Read from the top: norm, rotary positions, attention, MLP, block, model.

Pre-normalization (Xiong et al. 2020), RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU
(Shazeer 2020) and grouped-query attention (Ainslie et al. 2023). No biases.

Shapes in comments: B windows, T tokens, C hidden size, H query heads, K key-value heads, D head width, F MLP width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_core.config import ModelConfig
from llm_core.model.attention import Backend, DocumentMask, causal_attention
from llm_core.model.fused_ops import apply_rotary_emb, rms_norm, swiglu
from llm_core.model.loss import nll_sum, token_nll
from llm_core.recipe import InitialStd, initial_std


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 and cast back after the multiplication by the weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (max_length, D/2), in fp32: bf16 cannot represent positions above 256 exactly."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim  # (D/2,)
    positions = torch.arange(config.max_length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, config.rope_theta**-exponents)  # (max_length, D/2)
    return angles.cos(), angles.sin()


@dataclass
class KVCache:
    """Keys and values of the tokens decoded so far, in each layer."""

    keys: Tensor  # (layers, B, max_length, K, D), filled up to `length`
    values: Tensor  # (layers, B, max_length, K, D)
    length: int = 0

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        shape = (config.num_layers, batch, config.max_length, config.num_kv_heads, config.head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v, (B, T, K, D), and returns all keys and values of the layer, (B, length + T, K, D).

        `length` stays: it grows once all layers have appended.
        """
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


class Attention(nn.Module):
    """Causal self-attention with grouped queries; one matrix product yields query, key and value."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], backend: Backend, documents: DocumentMask | None, cache: KVCache | None
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H+2K, D)
        q, k, v = apply_rotary_emb(qkv, *rotary, self.heads)
        if cache is None:
            y = causal_attention(q, k, v, backend, documents)  # (B, T, H, D)
        else:
            k, v = cache.append(self.layer, k, v)
            y = _attend_to_cache(q, k, v)
        return self.out(y.flatten(2))  # (B, T, C)


def _attend_to_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S tokens to all S. q: (B, T, H, D), k and v: (B, S, K, D). Returns (B, T, H, D)."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T > 1 else None
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return y.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); one matrix product yields gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))  # (B, T, C) -> (B, T, 2F) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        backend: Backend,
        documents: DocumentMask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), rotary, backend, documents, cache))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head. Calling it returns the loss; `logits` is for decoding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, eot_id: int = 0) -> None:
        super().__init__()
        self.config = config
        self.eot_id = eot_id
        self.backend: Backend = "sdpa"
        self.gradient_checkpointing = False
        self.on_phase: Callable[[str], None] = lambda phase: None  # called at the end of each phase of a forward pass
        # nn.Embedding(...) would draw weights, and on the meta device load PyTorch's compiler for it, which takes seconds.
        rows = torch.empty(config.padded_vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_tables(config, torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def materialize(self, device: torch.device, sharded: bool = False) -> None:
        """Moves a model from the meta device to `device`; its weights are uninitialized."""
        if sharded:
            self.to_empty(device=device)
        else:  # `to_empty` loads sympy, which takes a second
            empty = {
                name: torch.empty(weight.shape, dtype=weight.dtype, device=device) for name, weight in self.named_parameters()
            }
            self.load_state_dict(empty, strict=False, assign=True)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.cos, self.sin = (table.to(device) for table in rotary_tables(self.config))

    def initial_weights(self, seed: int, std: InitialStd) -> Iterator[tuple[str, Tensor]]:
        """Draws every matrix from a normal distribution and one seed, on the CPU; norms are one.

        One at a time, since a sharded model may not fit into its memory.
        """
        by_name = {"embedding": std.embedding, "head": std.head, "out": std.outputs, "down": std.outputs}
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                yield name, torch.ones(parameter.shape)
            else:
                module = name.split(".")[-2]
                yield name, torch.empty(parameter.shape).normal_(0.0, by_name.get(module, std.inputs), generator=generator)

    @torch.no_grad()
    def init_weights(self, seed: int, std: InitialStd | None = None) -> None:
        """Sets all weights to `initial_weights`; the model must not be sharded. std: default AdamW's."""
        parameters = dict(self.named_parameters())
        std = std or initial_std("adamw", self.config.num_layers, self.config.tie_embeddings)
        for name, weight in self.initial_weights(seed, std):
            parameters[name].copy_(weight)

    def hidden(self, inputs: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of token ids (B, T). With a cache, the ids continue the cached tokens."""
        documents = None
        if self.config.document_masking and cache is None:
            documents = DocumentMask.from_inputs(inputs, self.eot_id, self.backend)
            rotary = (self.cos[documents.positions].unsqueeze(2), self.sin[documents.positions].unsqueeze(2))  # (B, T, 1, D/2)
        else:
            start = cache.length if cache is not None else 0
            span = slice(start, start + inputs.shape[1])
            rotary = (self.cos[span].unsqueeze(1), self.sin[span].unsqueeze(1))  # (T, 1, D/2)
        x = self.embedding(inputs)  # (B, T, C)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, self.backend, documents, use_reentrant=False)
            else:
                x = block(x, rotary, self.backend, documents, cache)
        if cache is not None:
            cache.length += inputs.shape[1]
        return self.norm(x)

    def logits(self, inputs: Tensor, cache: KVCache | None = None) -> Tensor:
        """Scores (B, T, V) of the next token."""
        return F.linear(self.hidden(inputs, cache), self._head_weight())

    def _head_weight(self) -> Tensor:
        """(V, C): the padding rows of the head never take part. Without padding no slice, which would copy the gradient."""
        weight = self.head.weight  # (padded V, C)
        return weight if len(weight) == self.config.vocab_size else weight[: self.config.vocab_size]

    def forward(self, inputs: Tensor, targets: Tensor, per_token: bool = False) -> Tensor:
        """Negative log-likelihood of `targets` in nats, fp32: the sum (), or with `per_token` (B, T) without gradients.

        inputs and targets: (B, T); where a target is IGNORE_INDEX, the NLL is 0.
        """
        hidden = self.hidden(inputs)
        self.on_phase("forward")
        nll = token_nll if per_token else nll_sum
        loss = nll(hidden, self._head_weight(), targets)
        self.on_phase("loss head")
        return loss

    def flops_per_token(self) -> int:
        return self.config.flops_per_token
