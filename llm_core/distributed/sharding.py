"""Data parallelism: DDP keeps a copy of the model on each rank, FSDP2 (`fully_shard`) a shard of every tensor.

Checkpoints are the same for both: `gather_full` collects the full tensors, `scatter_from_rank0` distributes them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_core.distributed.ranks import Ranks
from llm_core.errors import DataError
from llm_core.model.transformer import Transformer
from llm_core.recipe import InitialStd

if TYPE_CHECKING:
    # Loading it takes seconds: only a sharded model does.
    from torch.distributed.tensor import DTensor

Sharding = Literal["ddp", "fsdp"]


def parallelize(model: Transformer, ranks: Ranks, sharding: Sharding, seed: int, std: InitialStd) -> nn.Module:
    """Moves a model from the meta device to the ranks and initializes it. Returns the module to train; on one rank, `model`."""
    sharded = sharding == "fsdp" and ranks.world_size > 1
    if sharded:
        # Block by block: no device holds more than its shards and the full tensors of one block.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.materialize(ranks.device, sharded)
    if not sharded:
        model.init_weights(seed, std)
        return model if ranks.world_size == 1 else _replicated(model, ranks)
    parameters = model.state_dict()
    for name, weight in model.initial_weights(seed, std):
        # Every rank draws the same full tensor and keeps its shard.
        parameters[name].copy_(own_shard(weight.to(ranks.device), parameters[name]))
    return model


def _replicated(model: Transformer, ranks: Ranks) -> nn.Module:
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,  # the rotary tables are the same everywhere
    )


def gradient_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of one micro-batch: DDP synchronizes gradients once per step, with the `last` one.

    FSDP reduces them after each micro-batch: keeping full gradients until the last would take the memory that it saves.
    """
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def is_sharded(value: object) -> "TypeGuard[DTensor]":
    """Whether this rank holds a shard of a tensor."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All ranks call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of `full`, which every rank has; all of it unless the parameter is sharded."""
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather_full_weights(model: Transformer, keep: bool) -> dict[str, Tensor]:
    """`gather_full` of a model's weights; a tied matrix stays one tensor."""
    state = model.state_dict()
    tied = {"head.weight": "embedding.weight"} if model.config.tie_embeddings else {}
    full = {name: gather_full(tensor, keep) for name, tensor in state.items() if name not in tied}
    return {name: full[name] if name in full else full[tied[name]].detach() for name in state}


def gather_full(value: Any, keep: bool) -> Any:
    """A state dict with every sharded tensor gathered. All ranks call it; those that do not `keep` it get empty tensors."""
    if isinstance(value, dict):
        return {name: gather_full(item, keep) for name, item in value.items()}
    if isinstance(value, list):
        return [gather_full(item, keep) for item in value]
    if is_sharded(value):
        full = value.full_tensor()
        return full.cpu() if keep else full.new_empty(0)
    return value


def scatter_from_rank0(parameter: Tensor, full: Tensor, ranks: Ranks) -> Tensor:
    """This rank's shard of `full`: the weight of a parameter, or part of its optimizer state.

    All ranks call this together. On rank 0 `full` has its content, on the others it is on the meta device
    (`Ranks.broadcast_from_main`).
    """
    if ranks.world_size == 1:
        return full
    full = full.to(ranks.device).contiguous() if ranks.is_main else torch.empty(full.shape, dtype=full.dtype, device=ranks.device)
    if full.shape != parameter.shape:
        dist.broadcast(full, src=0)
        return full.cpu()  # AdamW's step count
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full, parameter.device_mesh, parameter.placements)
    dist.broadcast(full, src=0)
    return full


@torch.no_grad()
def load_model_state(model: nn.Module, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Loads rank 0's full weights one by one: the other ranks hold at most one full tensor beside their shards.

    Raises:
        DataError: names or shapes differ from the model's.
    """
    parameters = model.state_dict()
    names = parameters.keys() ^ state.keys() or {name for name in parameters if parameters[name].shape != state[name].shape}
    if names:
        raise DataError(f"the checkpoint's weights are not those of this model: {', '.join(sorted(names))} differ")
    for name, full in state.items():
        parameters[name].copy_(scatter_from_rank0(parameters[name], full, ranks))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks) -> None:
    """Loads rank 0's full optimizer state in the same way; it numbers the parameters across all groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {
            name: scatter_from_rank0(parameters[number], value, ranks) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shards})
