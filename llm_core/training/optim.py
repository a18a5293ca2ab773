"""The learning rate schedule, parameter groups and optimizers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm_core.config import TrainConfig, decay_start


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of the 0-based optimizer step, a pure function: nothing to save or restore.

    Linear warm-up from above 0, then the decay of the schedule. It reaches min_lr at the last step and stays there.
    """
    peak, lowest, warmup = config.learning_rate, config.min_lr, config.warmup_steps
    assert lowest is not None and warmup is not None, "learning_rate needs a resolved configuration"
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; norms and the embedding without.

    The embedding is excluded because decay would shrink the rows of rare tokens even at steps that do not read them. A matrix
    tied to the head counts as the embedding.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() >= 2 and "embedding" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for everything, or Muon for the matrices inside the blocks.

    Muon's update is scaled to the size of AdamW's, so both use the same learning rate.
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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized and scaled to AdamW's root mean square, and decoupled weight decay (Liu et al. 2025).

    Differs from `torch.optim.Muon` only in the dtype of the iteration on a CPU: fp32 instead of bf16, which took 24 times as long
    for a 192 x 768 matrix on a CPU without bf16 instructions.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon does not support closures"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = newton_schulz(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))


# Coefficients and iterations of Jordan et al. (2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def newton_schulz(matrix: Tensor) -> Tensor:
    """Orthogonalizes (M, N): moves all singular values close to 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration.

    Runs and returns in bf16 on a GPU, fp32 on a CPU.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
