"""How a model lies on its ranks: DDP keeps a copy on each of them, FSDP2 (`fully_shard`) a share of every tensor.

Checkpoints do not know the difference: `whole` gathers what is saved, `share_of` takes this rank's part of what is loaded.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llm_core.distributed import Ranks
from llm_core.errors import DataError
from llm_core.model import Transformer

Sharding = Literal["ddp", "fsdp"]


def spread(model: Transformer, ranks: Ranks, sharding: Sharding, seed: int) -> nn.Module:
    """Gives a model that was made on the meta device its place and its first weights; returns what the training step calls.

    One rank alone calls the model itself.
    """
    shared = sharding == "fsdp" and ranks.world_size > 1
    if shared:
        # Block by block: no device ever holds more than its share and one block.
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.materialize(ranks.device)
    if not shared:
        model.init_weights(seed)
        return model if ranks.world_size == 1 else _replicated(model, ranks)
    present = model.state_dict()
    for name, weight in model.initial_weights(seed):
        # Every rank draws the same whole tensor and keeps its part.
        parameter = cast(DTensor, present[name])
        own = distribute_tensor(weight.to(ranks.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(own)
    return model


def _replicated(model: Transformer, ranks: Ranks) -> nn.Module:
    return DistributedDataParallel(
        model,
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


def share_of(parameter: Tensor, full: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of a tensor that the main rank holds, of a `parameter`: the weight itself, a moment or a number of it.

    All ranks call this together; the others give an outline of the tensor (`Ranks.from_main`).
    """
    if ranks.world_size == 1:
        return full
    full = full.to(ranks.device).contiguous() if ranks.is_main else torch.empty(full.shape, dtype=full.dtype, device=ranks.device)
    if full.shape != parameter.shape:
        dist.broadcast(full, src=0)
        return full.cpu()  # a number of steps, which is not the device's
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    dist.broadcast(full, src=0)
    return full


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Loads the main rank's whole weights, tensor by tensor: no rank but that ever holds more than its share and one of them.

    Raises:
        DataError: they are not those of such a model.
    """
    present = model.state_dict()
    names = present.keys() ^ state.keys() or {name for name in present if present[name].shape != state[name].shape}
    if names:
        raise DataError(f"the checkpoint's weights are not those of this model: {', '.join(sorted(names))} differ")
    for name, full in state.items():
        present[name].copy_(share_of(present[name], full, ranks))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks) -> None:
    """Loads the main rank's whole moments likewise; the numbers in `state` count the parameters through all groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        number: {
            name: share_of(parameters[number], value, ranks) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shares})
