"""How a model lies on its ranks: DDP keeps a copy on each of them, FSDP2 (`fully_shard`) a share of every tensor.

Checkpoints do not know the difference: `whole` gathers what is saved, `share_of` takes this rank's part of what is loaded.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llm_core.distributed import Ranks
from llm_core.model import Transformer

Sharding = Literal["ddp", "fsdp"]


def spread(model: Transformer, ranks: Ranks, sharding: Sharding) -> nn.Module:
    """Puts a model onto the ranks' devices and returns what the training step calls; one rank alone calls the model itself."""
    if ranks.world_size == 1:
        return model.to(ranks.device)
    if sharding == "fsdp":
        # Block by block: no device ever holds more than its share and one block.
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model.to(ranks.device)  # the rotary tables, which are no parameters
    return DistributedDataParallel(
        model.to(ranks.device),
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # the rotary tables are the same everywhere
    )


def gradient_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of one micro-batch: under DDP gradients travel once per step, with the last one.

    FSDP adds them up in shares, after each micro-batch: to keep them whole until the last would take the memory it is there to
    save.
    """
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def whole_weights(model: Transformer, keep: bool) -> dict[str, Tensor]:
    """`whole` of a model's weights: what is one matrix under two names stays one."""
    state = model.state_dict()
    tied = {"head.weight": "embedding.weight"} if model.config.tie_embeddings else {}
    found = {name: whole(tensor, keep) for name, tensor in state.items() if name not in tied}
    return {name: found[name] if name in found else found[tied[name]].detach() for name in state}


def whole(value: Any, keep: bool) -> Any:
    """A state with every shared tensor gathered; the ranks that do not `keep` it take part and get empty tensors."""
    if isinstance(value, dict):
        return {name: whole(item, keep) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else full.new_empty(0)
    return value


def share_of(parameter: Tensor, full: Tensor) -> Tensor:
    """This rank's part of a tensor that belongs to `parameter` and has its shape: the weight itself or a moment of it."""
    if not isinstance(parameter, DTensor) or full.shape != parameter.shape:
        return full
    full = full.to(parameter.device)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole weights, strictly."""
    present = model.state_dict()
    shares = {name: share_of(present[name], tensor) if name in present else tensor for name, tensor in state.items()}
    model.load_state_dict(shares, strict=True)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads whole moments; the numbers in `state` count the parameters through all groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        number: {
            name: share_of(parameters[number], value) if isinstance(value, Tensor) else value for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shares})
