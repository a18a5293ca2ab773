"""Optimizers that do not load PyTorch's compiler.

PyTorch's own load it to keep themselves out of compiled graphs. That takes seconds at each start, and no graph here contains an
optimizer: `--compile_model` compiles the blocks of the model.
"""

from inspect import unwrap

import torch
from torch.optim import Optimizer


class Uncompiled(Optimizer):
    """An optimizer whose methods are those of PyTorch without the wrappers for its compiler."""

    add_param_group = unwrap(Optimizer.add_param_group)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    zero_grad = unwrap(Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
