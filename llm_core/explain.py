"""What a run would cost, worked out without training: `python -m llm_core.train ... --explain`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_core.config import ModelConfig, TrainConfig
from llm_core.distributed import Ranks
from llm_core.loss import chunk_rows
from llm_core.model import Transformer
from llm_core.precision import DTYPES, Precision, autocast, resolve_precision
from llm_core.throughput import duration, measure_peak_flops
from llm_core.trainer import micro_batch_size
from llm_core.training_data import TrainingData

_UTILIZATION = 0.5
"""Share of the measured matrix-product peak that the time estimate assumes; the run's own log shows what it is."""


_WORKSPACE = 200_000_000
"""Bytes that the allocator and the matrix library hold beside our tensors, as measured on a CPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank's training needs at its peak, the program itself not counted."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from the forward for the backward pass, and one block's share again while it runs backward
    loss: int  # gradients made in the loss, and one chunk of logits
    workspace: int = _WORKSPACE

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    config: TrainConfig,
    vocab_size: int,
    micro_batch_size: int,
    precision: Precision,
    world_size: int = 1,
    device_type: str = "cpu",
) -> Memory:
    """Asks autograd what it would keep: the forward pass runs on tensors that have shapes and no memory."""
    model_config = ModelConfig.of(config, vocab_size)
    kept: dict[int, int] = {}
    with FakeTensorMode():
        model = Transformer(model_config).train()
        model.gradient_checkpointing = config.gradient_checkpointing
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        inputs = torch.zeros(micro_batch_size, model_config.max_length, dtype=torch.long)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        def bytes_kept(checkpointing: bool) -> int:
            kept.clear()
            model.gradient_checkpointing = checkpointing
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, inputs.device):
                model.hidden(inputs)
            return sum(kept.values())

        one_block = bytes_kept(checkpointing=False) // model_config.num_layers
        activations = bytes_kept(config.gradient_checkpointing) + one_block
        parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    all_parameters, moments = sum(parameters.values()), _moments(config, parameters)
    tokens = inputs.numel()
    # FSDP holds a share of everything, and whole what is at work: embedding and head, and two blocks, the next one being fetched.
    sharers = world_size if config.sharding == "fsdp" else 1
    in_blocks = sum(size for name, size in parameters.items() if name.startswith("blocks."))
    at_work = all_parameters - in_blocks + 2 * in_blocks // model_config.num_layers if sharers > 1 else 0
    chunk = min(tokens, chunk_rows(device_type, vocab_size)) * vocab_size
    return Memory(
        weights=4 * (all_parameters // sharers + at_work),
        gradients=4 * (all_parameters // sharers + at_work),
        optimizer=4 * moments // sharers,
        activations=activations,
        loss=4 * (vocab_size * model_config.hidden_size + tokens * model_config.hidden_size + 2 * chunk),
    )


def _moments(config: TrainConfig, parameters: dict[str, int]) -> int:
    """Numbers that the optimizer keeps. parameters: the size of each by its name."""
    moments = 2 * sum(parameters.values())
    if config.optimizer == "muon":
        moments -= sum(size for name, size in parameters.items() if name.startswith("blocks.") and "norm" not in name)
    return moments


def explain(config: TrainConfig, data: TrainingData, ranks: Ranks) -> dict[str, str]:
    """The figures of a resolved configuration, ready to print."""
    precision = resolve_precision(config, ranks.device)
    micro = micro_batch_size(config, ranks.world_size)
    with torch.device("meta"):
        model = Transformer(ModelConfig.of(config, data.tokenizer.vocab_size))
    parameters, flops = model.config.num_parameters, model.flops_per_token()
    memory = estimate_memory(config, data.tokenizer.vocab_size, micro, precision, ranks.world_size, ranks.device.type)
    tokens_per_step = config.batch_size * data.train.max_length
    tokens = tokens_per_step * config.max_steps
    peak = measure_peak_flops(ranks.device, DTYPES[precision]) * ranks.world_size
    seconds = flops * tokens / (peak * _UTILIZATION)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in vars(memory).items())
    checkpoint = 4 * (parameters + _moments(config, {name: parameter.numel() for name, parameter in model.named_parameters()}))
    copied = "; as much of the first rank's CPU memory, from which it is written" if config.background_save else ""
    accumulation = config.batch_size // (micro * ranks.world_size)
    return {
        "parameters": f"{parameters:,}",
        "FLOPs per token": f"{flops:,} forward and backward",
        "memory per rank": f"{_bytes(memory.total)}: {parts}",
        "each checkpoint": f"{_bytes(checkpoint)}{copied}",
        "training tokens": f"{tokens:,} in {config.max_steps:,} steps of {tokens_per_step:,}",
        "epochs": f"{config.max_steps * config.batch_size / len(data.train):.2f} of {len(data.train):,} windows",
        **_mixture(config, data),
        "tokens per parameter": f"{tokens / parameters:.1f} (about 20 is compute-optimal, Hoffmann et al. 2022)",
        "ranks": f"{ranks.world_size} on {ranks.device.type}, {precision}, micro batch {micro} x {accumulation}",
        "expected time": f"{duration(seconds)} at {_UTILIZATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s just measured",
    }


def _mixture(config: TrainConfig, data: TrainingData) -> dict[str, str]:
    if data.parts is None:
        return {}
    parts = data.mixture(config)
    return {"mixture": ", ".join(f"{part['share']:.1%} {part['part']} ({part['epochs']:.2f} epochs)" for part in parts)}


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
