"""Parameter groups and their optimizers."""

from typing import Any

import torch
from torch import nn

from llm_core.config import TrainConfig
from llm_core.muon import Muon
from llm_core.schedule import learning_rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the parameters in two: matrices with weight decay, norms and the embedding without.

    The embedding is left out on purpose: decay shrinks the rows of rare tokens at every step, seen or not. A matrix shared
    with the head counts as the embedding. Every parameter stands in exactly one group, a shared one once.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() >= 2 and "embedding" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for everything, or Muon for the matrices inside the blocks.

    Muon's update is scaled to AdamW's, so that one learning rate serves both.
    """
    decayed, plain = parameter_groups(model, config.weight_decay)
    groups = [decayed, plain]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        inside = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("blocks.")}
        matrices = [parameter for parameter in decayed["params"] if id(parameter) in inside]
        rest = [parameter for parameter in decayed["params"] if id(parameter) not in inside]
        groups = [decayed | {"params": rest}, plain] if rest else [plain]
        rate = learning_rate(0, config)
        optimizers.append(Muon(matrices, rate, momentum=config.muon_momentum, weight_decay=config.weight_decay))
    adamw = torch.optim.AdamW(
        groups, lr=learning_rate(0, config), betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True
    )
    return [*optimizers, adamw]
