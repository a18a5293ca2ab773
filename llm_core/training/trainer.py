"""The trainer: the optimizer step, and the state between two steps."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_core.checkpoint.state import RunIdentity, TrainingState, require_same
from llm_core.config import ModelConfig, ResolvedTrainConfig, micro_batch_size
from llm_core.dataset import Indices, rank_micro_batches
from llm_core.distributed.launch import StopRequest
from llm_core.distributed.ranks import Ranks
from llm_core.distributed.sharding import (
    full_tensor,
    gather_full,
    gather_full_weights,
    gradient_sync,
    load_model_state,
    load_optimizer_state,
    parallelize,
)
from llm_core.errors import DataError, UserError
from llm_core.model.attention import choose_backend
from llm_core.model.precision import DTYPES, autocast, resolve_precision
from llm_core.model.transformer import Transformer
from llm_core.recipe import initial_std
from llm_core.training.cost import require_memory
from llm_core.training.optim import build_optimizers, learning_rate, set_learning_rate
from llm_core.training.performance import PhaseClock
from llm_core.training.run_data import TrainingData


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on every rank."""

    loss: float  # mean NLL per target over the global batch, nats
    grad_norm: float  # global norm before clipping
    learning_rate: float
    skipped: bool  # gradients were not finite, nothing was updated
    stop: bool  # a rank was asked to stop
    save_failed: bool  # rank 0 could not write the last checkpoint


class Trainer:
    """Trains one model on one dataset, as one of the ranks. It writes no files: `loop.TrainingLoop` does.

    All ranks make the same decisions from the same numbers.
    """

    def __init__(self, config: ResolvedTrainConfig, data: TrainingData, ranks: Ranks, stop: StopRequest) -> None:
        self.config, self.data, self.ranks, self.stop = config, data, ranks, stop
        self.save_failed = False  # set by rank 0 when its checkpoint writer failed; each step shares it with all ranks
        self.run_id = data.run_id(config)
        self.micro_batch_size = micro_batch_size(config, ranks.world_size)
        self.accumulation_steps = config.batch_size // (self.micro_batch_size * ranks.world_size)
        self.precision = resolve_precision(config, ranks.device)

        model_config = ModelConfig.of(config, data.tokenizer.vocab_size)
        require_memory(config, model_config, self.micro_batch_size, ranks)
        with torch.device("meta"):
            self.model = Transformer(model_config, data.tokenizer.eot_id)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.model.backend = choose_backend(config.attention, ranks.device, DTYPES[self.precision], self.model.config.head_dim)
        if config.compile_model:
            ranks.raise_on_all_ranks(_compile_error(ranks.device))
            _compile_blocks(self.model, ranks.device)
        std = initial_std(config.optimizer, config.num_layers, config.tie_embeddings)
        self.module = parallelize(self.model, ranks, config.sharding, config.seed, std)
        self.optimizers = build_optimizers(self.model, config, self.precision)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "fp16")
        self.phases = PhaseClock()
        self.step = 0  # optimizer steps done
        self.tokens_seen = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0

    # One step.

    def train_step(self) -> StepResult:
        """Runs optimizer step `self.step` on its global batch.

        Raises:
            DataError: max_skipped_steps steps in a row had a loss or gradient that is not finite.
        """
        config, ranks = self.config, self.ranks
        torch.manual_seed(_step_seed(config.seed, self.step, ranks.rank))  # dropout
        windows = self.data.order.windows_of_step(self.step, config.batch_size)
        targets = self.data.train.num_targets(windows)
        rate = learning_rate(self.step, config)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        set_learning_rate(self.optimizers, rate)
        self.phases.lap("optimizer")

        nll = self._accumulate_gradients(windows, targets)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf, foreach=True)
        norm = full_tensor(norm)
        flags = torch.tensor([self.stop.requested, self.save_failed], dtype=nll.dtype, device=ranks.device)
        nll_sum, stops, failures = ranks.sum(torch.cat((nll[None], flags))).tolist()
        loss, grad_norm = nll_sum / targets, norm.item()
        skipped = not (math.isfinite(grad_norm) and math.isfinite(loss))
        self.phases.lap("clip")
        if not skipped:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        # Every rank lowers the scale after a skip, since with FSDP only one of them may hold the shard that overflowed.
        overflow = skipped and self.scaler.is_enabled()
        self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor() if overflow else None)
        if overflow:  # setting the scale explicitly does not reset the count of good steps until it grows
            self.scaler.load_state_dict(self.scaler.state_dict() | {"_growth_tracker": 0})
        self.phases.lap("optimizer")

        self.step += 1
        self.tokens_seen += targets
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= config.max_skipped_steps:
            raise DataError(
                f"step {self.step}: loss {loss}, gradient norm {grad_norm}; "
                f"{self.skipped_in_a_row} steps in a row were not finite. The last one read the windows {windows.tolist()}; "
                "check their text, or start a new run with a lower --learning_rate"
            )
        return StepResult(loss, grad_norm, rate, skipped, stop=stops > 0, save_failed=failures > 0)

    def _accumulate_gradients(self, windows: Indices, targets: int) -> Tensor:
        """Accumulates the gradients of this rank's micro-batches and returns the sum of their NLL, fp32."""
        micro_batches = rank_micro_batches(windows, self.micro_batch_size, self.ranks.rank, self.ranks.world_size)
        nll = torch.zeros((), device=self.ranks.device)
        for number, micro_batch in enumerate(micro_batches):
            inputs, labels = self._to_device(self.data.train.batch(micro_batch))
            self.phases.lap("data")
            with gradient_sync(self.module, last=number == len(micro_batches) - 1):
                with autocast(self.precision, self.ranks.device):
                    micro_nll = self.module(inputs, labels)
                # DDP averages over the ranks; the loss is the mean over all targets of all ranks.
                self.scaler.scale(micro_nll * (self.ranks.world_size / targets)).backward()
            self.phases.lap("backward")
            nll += micro_nll.detach()
        return nll

    def _to_device(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        device = self.ranks.device
        if device.type == "cpu":
            return tensors
        inputs, targets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
        return inputs, targets

    # State.

    def state(self) -> TrainingState:
        """The state that `restore` takes, the same with DDP and FSDP. All ranks call this together.

        Keys are those of the bare model; a tied matrix is stored once. With FSDP only rank 0 gets the tensors.
        """
        return {
            "model": gather_full_weights(self.model, self.ranks.is_main),
            "optimizers": [gather_full(optimizer.state_dict(), self.ranks.is_main) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            **self._identity(),
        }

    def _identity(self) -> RunIdentity:
        """The part of the state that is the same at every step."""
        return {
            "run_id": self.run_id,
            "dataset_id": self.data.manifest.dataset_id,
            "tokenizer_id": self.data.tokenizer.tokenizer_id,
            "parent_checkpoint_id": self.data.parent_checkpoint_id,
            "eot_id": self.data.tokenizer.eot_id,
            "model_config": self.model.config.model_dump(mode="json"),
            "train_config": self.config.identity(),
        }

    def start_from(self, path: Path, state: TrainingState) -> None:
        """Loads the weights only: optimizer, schedule and data start from the beginning. All ranks call this together.

        state: on other ranks than 0 its tensors have no content (`Ranks.broadcast_from_main`).

        Raises:
            UserError: shape or tokenizer differ; the message names the difference.
        """
        require_same(path, _shape(state), _shape(self._identity()))
        load_model_state(self.model, state["model"], self.ranks)

    def restore(self, path: Path, state: TrainingState) -> None:
        """Loads a saved state. All ranks call this together; see `start_from`.

        Raises:
            UserError: model, configuration or dataset differ; the message names the difference.
        """
        require_same(path, _compared(state), _compared(self._identity()))
        load_model_state(self.model, state["model"], self.ranks)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer_state(optimizer, saved, self.ranks)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def _compared(state: RunIdentity) -> dict[str, Any]:
    """The values that must be equal to resume a run."""
    ids = {name: state[name] for name in ("dataset_id", "tokenizer_id", "parent_checkpoint_id", "run_id")}
    return state["model_config"] | state["train_config"] | ids


def _shape(state: RunIdentity) -> dict[str, Any]:
    """The values that must be equal to start from another run's weights: those that determine their shape and meaning."""
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "tie_embeddings")
    config = {name: state["model_config"][name] for name in (*names, "rope_theta", "norm_eps")}
    return config | {"tokenizer_id": state["tokenizer_id"]}


def _compile_error(device: torch.device) -> UserError | None:
    """Compiles a function of one line: what is missing on this machine is reported before the training starts."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to load

    try:
        if device.type == "cpu":
            get_cpp_compiler()  # the function may have been compiled by an earlier run
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        lines = str(getattr(error, "inner_exception", error)).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
        return UserError(
            f"--compile_model: torch.compile does not work on this machine ({reason.strip()}); install a C and C++ compiler with "
            "Python's headers, which CC and CXX may name, or leave the option out"
        )
    return None


def _compile_blocks(model: Transformer, device: torch.device) -> None:
    """Compiles each block in place: parameter names stay the same."""
    if device.type == "cpu":  # other kernels do not reproduce bit for bit
        torch.use_deterministic_algorithms(True)
    for block in model.blocks:
        block.compile()


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
