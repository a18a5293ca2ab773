"""The learning rate schedule, parameter groups and optimizers."""

import math
from typing import Any

import torch
from torch import nn

from llm_core.config import ResolvedTrainConfig, decay_start
from llm_core.model.precision import Precision
from llm_core.model.transformer import Block, Transformer
from llm_core.recipe import OUTPUT_RATE
from llm_core.training.muon import Muon
from llm_core.training.uncompiled import AdamW


def learning_rate(step: int, config: ResolvedTrainConfig) -> float:
    """Learning rate of the 0-based optimizer step, a pure function: nothing to save or restore.

    Linear warm-up from above 0, then the decay of the schedule. It reaches min_lr at the last step and stays there.
    """
    peak, lowest, warmup = config.learning_rate, config.min_lr, config.warmup_steps
    last, start = config.max_steps - 1, decay_start(config)
    if step >= last:
        return lowest
    if step < warmup:
        return peak * (step + 1) / warmup
    if step <= start:
        return peak
    progress = (step - start) / (last - start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return lowest + (peak - lowest) * shape


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Sets the rate of all parameter groups. rate: that of the matrices in the blocks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("relative_rate", 1.0)


def build_optimizers(
    model: Transformer, config: ResolvedTrainConfig, precision: Precision = "fp32"
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    precision: of the run. fp16 has too few exponents for Muon's products.
    """
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        groups = muon_groups(model, config)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        optimizers.append(Muon(groups, config.muon_momentum, config.weight_decay, dtype))
    groups = adamw_groups(model, config)
    optimizers.append(AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True))
    set_learning_rate(optimizers, learning_rate(0, config))
    return optimizers


def adamw_groups(model: Transformer, config: ResolvedTrainConfig) -> list[dict[str, Any]]:
    """The parameters of AdamW: without Muon all of them. Each group has its weight decay and its `relative_rate`.

    Norms and the embedding are never decayed: decay would shrink the rows of rare tokens even at steps that do not read them. A
    matrix tied to the head counts as the embedding.
    """
    matrices = _matrices(model) if config.optimizer == "adamw" else []
    norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    embedding = [model.embedding.weight]
    head = [model.head.weight] if not config.tie_embeddings else []
    if config.embedding_lr is None and config.head_lr is None:
        # The state of an optimizer numbers the parameters by group: checkpoints of version 0.1 have these two.
        return [
            {"params": matrices + head, "weight_decay": config.weight_decay},
            {"params": embedding + norms, "weight_decay": 0.0},
        ]
    peak = config.learning_rate
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": head, "weight_decay": config.weight_decay, "relative_rate": (config.head_lr or peak) / peak},
        {"params": embedding, "weight_decay": 0.0, "relative_rate": (config.embedding_lr or peak) / peak},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def muon_groups(model: Transformer, config: ResolvedTrainConfig) -> list[dict[str, Any]]:
    """The matrices inside the blocks. `rows` are those of each matrix where one parameter stacks several."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    shape = model.config
    heads = [count * shape.head_dim for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    groups: list[dict[str, Any]] = [
        {"params": [block.attention.qkv.weight for block in blocks], "rows": heads},
        {"params": [block.mlp.gate_up.weight for block in blocks], "rows": [shape.intermediate_size] * 2},
    ]
    outputs = [weight for block in blocks for weight in (block.attention.out.weight, block.mlp.down.weight)]
    return [*groups, {"params": outputs, "relative_rate": OUTPUT_RATE}]


def _matrices(model: Transformer) -> list[nn.Parameter]:
    return [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
