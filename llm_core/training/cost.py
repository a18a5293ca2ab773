"""What a run costs, known before it trains: `python -m llm_core.train ... --explain`, and the check of its memory."""

import os
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_core.config import ModelConfig, ResolvedTrainConfig, decay_start, micro_batch_size
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.model.loss import chunk_rows
from llm_core.model.precision import DTYPES, Precision, autocast, resolve_precision
from llm_core.model.transformer import Transformer
from llm_core.training.performance import duration, measure_peak_flops
from llm_core.training.run_data import TrainingData

# Share of the measured peak FLOPs that the time estimate assumes; the run reports its actual share as MFU.
_UTILIZATION = 0.5

# Share of the memory that a run may be planned to need.
_MEMORY_SHARE = 0.8

# Bytes that the allocator and the matrix library take beside our tensors, measured on a CPU.
_WORKSPACE = 200_000_000


def explain(config: ResolvedTrainConfig, data: TrainingData, ranks: Ranks) -> dict[str, str]:
    """Size, memory, tokens and time of a run, as text."""
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
    breakdown = ", ".join(f"{name} {_bytes(size)}" for name, size in vars(memory).items())
    checkpoint = 4 * (parameters + _optimizer_elements(config, model))
    copied = "; rank 0 needs as much CPU memory to write it in the background" if config.background_save else ""
    accumulation = config.batch_size // (micro * ranks.world_size)
    return {
        "parameters": f"{parameters:,}",
        "FLOPs per token": f"{flops:,} forward and backward",
        "memory per rank": f"{_bytes(memory.total)}: {breakdown}",
        "each checkpoint": f"{_bytes(checkpoint)}{copied}",
        "training tokens": f"{tokens:,} in {config.max_steps:,} steps of {tokens_per_step:,}",
        "epochs": f"{config.max_steps * config.batch_size / len(data.train):.2f} of {len(data.train):,} windows",
        **_mixture(config, data),
        "optimizer": describe_rates(config),
        "schedule": f"{config.warmup_steps:,} steps of warm-up, {config.lr_schedule} decay from step {decay_start(config):,} "
        f"to {config.min_lr / config.learning_rate:.0%}",
        "tokens per parameter": f"{tokens / parameters:.1f} (about 20 is compute-optimal, Hoffmann et al. 2022)",
        "ranks": f"{ranks.world_size} on {ranks.device.type}, {precision}, micro batch {micro} x {accumulation}",
        "expected time": f"{duration(seconds)} at {_UTILIZATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s just measured",
    }


def describe_rates(config: ResolvedTrainConfig) -> str:
    """The optimizer and its peak rates."""
    rates = {"learning rate": config.learning_rate, "embedding": config.embedding_lr, "head": config.head_lr}
    return ", ".join([config.optimizer, *(f"{name} {rate:.2g}" for name, rate in rates.items() if rate is not None)])


def _mixture(config: ResolvedTrainConfig, data: TrainingData) -> dict[str, str]:
    if data.groups is None:
        return {}
    usages = data.mixture(config)
    return {"mixture": ", ".join(f"{usage.share:.1%} {usage.group} ({usage.epochs:.2f} epochs)" for usage in usages)}


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in bytes, without the program itself."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # saved for the backward pass, and once more those of the block whose backward pass runs
    loss: int  # gradients computed in the loss, and one chunk of logits
    workspace: int = _WORKSPACE

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    config: ResolvedTrainConfig,
    vocab_size: int,
    micro_batch_size: int,
    precision: Precision,
    world_size: int = 1,
    device_type: str = "cpu",
) -> Memory:
    """Estimates the memory of a resolved configuration without allocating it."""
    model_config = ModelConfig.of(config, vocab_size)
    with torch.device("meta"):
        model = Transformer(model_config)
    parameters = model_config.num_parameters
    # FSDP shards everything. Full tensors exist only of embedding and head, of the block at work and of the next one.
    shards = world_size if config.sharding == "fsdp" else 1
    in_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    unsharded = parameters - in_blocks + 2 * in_blocks // model_config.num_layers if shards > 1 else 0
    tokens = micro_batch_size * model_config.max_length
    chunk = min(tokens, chunk_rows(device_type, vocab_size)) * vocab_size
    return Memory(
        weights=4 * (parameters // shards + unsharded),
        gradients=4 * (parameters // shards + unsharded),
        optimizer=4 * _optimizer_elements(config, model) // shards,
        activations=_activation_bytes(model_config, micro_batch_size, precision, config.gradient_checkpointing),
        loss=4 * (vocab_size * model_config.hidden_size + tokens * model_config.hidden_size + 2 * chunk),
    )


def _activation_bytes(model_config: ModelConfig, micro_batch_size: int, precision: Precision, checkpointing: bool) -> int:
    """Bytes that autograd saves in a forward pass. It runs on tensors that have shapes but no memory."""
    with FakeTensorMode():
        model = Transformer(model_config).train()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        inputs = torch.zeros(micro_batch_size, model_config.max_length, dtype=torch.long)

        def saved_bytes(checkpointing: bool) -> int:
            saved: dict[int, int] = {}

            def save(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    saved[storage._cdata] = storage.nbytes()
                return tensor

            model.gradient_checkpointing = checkpointing
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast(precision, inputs.device):
                model.hidden(inputs)
            return sum(saved.values())

        one_block = saved_bytes(checkpointing=False) // model_config.num_layers
        return saved_bytes(checkpointing) + one_block


def _optimizer_elements(config: ResolvedTrainConfig, model: Transformer) -> int:
    """Elements of the optimizer's state: two for each parameter, with Muon one for each matrix in a block."""
    elements = 2 * model.config.num_parameters
    if config.optimizer == "muon":
        elements -= sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.dim() == 2)
    return elements


def device_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine, swap included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def _ranks_on(device: torch.device) -> int:
    """How many ranks share the memory of a device."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def largest_micro_batch(config: ResolvedTrainConfig, vocab_size: int, precision: Precision, ranks: Ranks) -> int | None:
    """The most windows per rank and forward pass that divide its batch and fit into its memory by estimate; None if none does."""
    available = _MEMORY_SHARE * device_memory(ranks.device) / _ranks_on(ranks.device)

    def needed(windows: int) -> int:
        return estimate_memory(config, vocab_size, windows, precision, ranks.world_size, ranks.device.type).total

    one, two = needed(1), needed(2)
    of_rank = config.batch_size // ranks.world_size
    divisors = (windows for windows in range(of_rank, 0, -1) if of_rank % windows == 0)
    return next((windows for windows in divisors if one + (windows - 1) * (two - one) <= available), None)


def require_memory(config: ResolvedTrainConfig, model: ModelConfig, micro_batch_size: int, ranks: Ranks) -> None:
    """Refuses a run that cannot fit into the memory of this machine.

    The lower bound counts weights, gradients, optimizer state and one half-precision activation per token and block; `--explain`
    estimates the peak.

    Raises:
        UserError: even the lower bound does not fit.
    """
    per_parameter = 4 + 4 + (8 if config.optimizer == "adamw" else 4)
    shards = ranks.world_size if config.sharding == "fsdp" else 1
    tokens = micro_batch_size * model.max_length
    fixed = per_parameter * model.num_parameters // shards
    needed = fixed + 2 * tokens * model.hidden_size * model.num_layers
    processes = _ranks_on(ranks.device)
    fixed, needed = fixed * processes, needed * processes
    available = device_memory(ranks.device)
    where = "the GPU has" if ranks.device.type == "cuda" else "this machine has"
    if needed > available:
        smaller = "a smaller model" if fixed > available else "a smaller model, --micro_batch_size or --max_length"
        raise UserError(
            f"--hidden_size {model.hidden_size} --num_layers {model.num_layers}: {model.num_parameters:,} parameters and a "
            f"micro-batch of {micro_batch_size:,} windows of {model.max_length:,} tokens need at least {needed / 1e9:,.1f} GB, "
            f"{where} {available / 1e9:,.1f} GB; choose {smaller}"
        )
