"""Makes the plan of a run with `train_minutes`: measures the machine with the run's own steps on the run's own text."""

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_core.checkpoint import Parent, named_checkpoint, starting_parent
from llm_core.config import ModelConfig, ResolvedTrainConfig, TrainConfig, divide_batch, round_up
from llm_core.dataset import DatasetManifest
from llm_core.distributed.launch import StopRequest
from llm_core.distributed.ranks import Ranks
from llm_core.errors import Preempted, UserError
from llm_core.layout import RunFolder
from llm_core.model.precision import DTYPES, Precision, resolve_precision
from llm_core.recipe import expected_bits_per_byte
from llm_core.system import write_json
from llm_core.training.cost import largest_micro_batch, require_memory
from llm_core.training.mixture import plan_mixture
from llm_core.training.performance import measure_peak_flops
from llm_core.training.plan import (
    SHAPES,
    Plan,
    Shape,
    Speed,
    choose_shape,
    find_plan,
    machine,
    request_id,
    resolve,
    shape_options,
)
from llm_core.training.run_data import TrainingData
from llm_core.training.trainer import Trainer

# Share of the peak FLOPs that shapes reach, until one is measured.
_UTILIZATION = 0.4

# Shapes to measure at most: the first is a guess, the second is what its speed asks for.
_MEASUREMENTS = 3

# Seconds of steps to measure for each shape, and the most steps.
_SECONDS, _STEPS = 4.0, 20


def planned(
    options: TrainConfig,
    data_dir: Path,
    manifest: DatasetManifest,
    run_dir: Path,
    ranks: Ranks,
    stop: StopRequest,
    *,
    checkpoint: str | None = None,
    restarts: bool = False,
) -> tuple[TrainConfig, Plan | None]:
    """The options with a plan in place of `train_minutes`, and the plan. All ranks call this together, with the same options.

    A plan is kept in the run folder: the same options, text and machine have the same one, and a resumed run keeps its own on any
    machine. checkpoint: that the run is resumed from. restarts: another process will train, which has to start first.

    Raises:
        Preempted: a rank was asked to stop.
        UserError: the options do not fit this text or this machine.
    """
    if options.train_minutes is None:
        return options, None
    loading = time.time() - psutil.Process().create_time()
    parent, plan = ranks.broadcast_from_main(lambda: _kept_plan(options, manifest, run_dir, checkpoint, ranks))
    if plan is None:
        planner = _Planner(options, data_dir, manifest, parent, ranks, stop)
        plan = planner.plan(spent_elsewhere=loading if restarts else 0.0)
        resolve(plan.applied(options), manifest)  # what does not fit the steps that were chosen is not kept
        ranks.broadcast_from_main(partial(_keep, plan, run_dir))
    return plan.applied(options), plan


def _kept_plan(
    options: TrainConfig, manifest: DatasetManifest, run_dir: Path, checkpoint: str | None, ranks: Ranks
) -> tuple[Parent | None, Plan | None]:
    """The parent of the run, and its plan if there is one. Without one, the run folder is made: it must be writable."""
    resumed_from = named_checkpoint(checkpoint) if checkpoint is not None else None
    if resumed_from is None and (manifests := RunFolder(run_dir).checkpoint_manifests()):
        resumed_from = manifests[0].with_suffix("")
    parent = starting_parent(options.init_from, resumed_from)
    request = request_id(options, manifest, parent.checkpoint_id if parent is not None else None)
    if resumed_from is not None:
        return parent, find_plan(resumed_from.parent, request, None) or find_plan(run_dir, request, None)
    run_dir.mkdir(parents=True, exist_ok=True)
    return parent, find_plan(run_dir, request, _machine(options, ranks))


def _keep(plan: Plan, run_dir: Path) -> None:
    write_json(RunFolder(run_dir).plan(plan.request_id), plan.model_dump(mode="json"))


def _machine(options: TrainConfig, ranks: Ranks) -> str:
    return machine(options, ranks.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class _Planner:
    """Measures shapes until the speed of the best one is known. Every rank measures, and all take rank 0's numbers."""

    def __init__(
        self,
        options: TrainConfig,
        data_dir: Path,
        manifest: DatasetManifest,
        parent: Parent | None,
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        assert options.train_minutes is not None, "the budget"
        self._options, self._manifest, self._parent, self._ranks, self._stop = options, manifest, parent, ranks, stop
        self._seconds = options.train_minutes * 60
        self._settled = ranks.broadcast_from_main(lambda: shape_options(options))
        self._shapes = SHAPES if self._settled is None else [Shape(self._settled["hidden_size"], self._settled["num_layers"])]
        self._speeds: dict[Shape, float] = {}  # tokens per second
        self._batches: dict[Shape, int] = {}  # windows of the steps that were measured: larger batches are faster
        self._compiling = 0.0  # seconds
        if options.batch_size is not None:
            divide_batch(options.batch_size, options.micro_batch_size, ranks.world_size)
        config = self._trial(self._shapes[0], tokens=1)
        self._length = config.max_length
        self._precision: Precision = resolve_precision(config, ranks.device)
        ranks.require_same({"precision": self._precision})
        self._peaks = ranks.broadcast_from_main(self._measure_peaks)
        self._data = TrainingData.open(data_dir, manifest, config, parent)
        mixture = plan_mixture(config, data_dir, manifest, parent.known if parent is not None else None)
        shares = mixture.shares if mixture is not None else [1.0]
        self._windows = sum(size for size, share in zip(self._data.train.sizes, shares, strict=True) if share)
        self._most_tokens = int(options.max_source_epochs * self._windows) * self._length

    def plan(self, spent_elsewhere: float) -> Plan:
        """The plan for the time that is left of this process. spent_elsewhere: seconds of other processes.

        Raises:
            UserError: no model fits into memory.
        """
        shapes, measurements = list(self._shapes), 0
        while True:
            chosen = shapes[self._ranks.broadcast_from_main(partial(self._best, shapes))]
            trial = self._trial(chosen, self._tokens(chosen))
            if self._batches.get(chosen) == trial.batch_size or measurements == _MEASUREMENTS + 1:
                return self._ranks.broadcast_from_main(partial(self._plan, chosen, spent_elsewhere))
            if (micro := self._micro_batch(trial)) is None:
                if len(shapes) == 1:
                    require_memory(trial, self._model(chosen), 1, self._ranks)
                    raise UserError(f"--max_length {self._length}: not even one window fits into memory; use shorter windows")
                shapes.remove(chosen)
                continue
            self._speeds[chosen], self._batches[chosen] = self._measure(trial, micro), trial.batch_size
            measurements += 1
            if measurements == _MEASUREMENTS:  # it may go back and forth between two sizes
                shapes = list(self._speeds)

    def _best(self, shapes: list[Shape]) -> int:
        return shapes.index(choose_shape(shapes, self._parameters, self._tokens))

    def _micro_batch(self, trial: ResolvedTrainConfig) -> int | None:
        """Windows per forward pass that fit into the memory of every rank; None if not one does."""
        ranks, own = self._ranks, trial.micro_batch_size
        if own is None:
            own = largest_micro_batch(trial, self._data.tokenizer.vocab_size, self._precision, ranks)
        of_all = torch.zeros(ranks.world_size, device=ranks.device)
        of_all[ranks.rank] = own or 0
        return int(ranks.sum(of_all).min().item()) or None

    def _plan(self, shape: Shape, spent_elsewhere: float) -> Plan:
        spent = time.time() - psutil.Process().create_time() + spent_elsewhere + self._compiling
        self._seconds = max(self._seconds / 2, self._seconds - spent)
        config = self._trial(shape, self._tokens(shape))
        validations = config.validations(config.max_steps)
        # A forward pass takes a third of the time of a forward and a backward pass.
        with_validation = 1 + validations * config.eval_tokens / (3 * config.max_steps * config.batch_size * self._length)
        possible = self._speeds[shape] * self._seconds / with_validation
        config = self._trial(shape, min(possible, self._most_tokens))
        chosen = {"batch_size": config.batch_size, "max_steps": config.max_steps}
        if self._options.micro_batch_size is None:
            micro = largest_micro_batch(config, self._data.tokenizer.vocab_size, self._precision, self._ranks)
            if micro is not None and micro * self._ranks.world_size < config.batch_size:
                chosen["micro_batch_size"] = micro
        tokens = config.max_steps * config.batch_size * self._length
        return Plan(
            request_id=request_id(self._options, self._manifest, self._parent.checkpoint_id if self._parent else None),
            machine=_machine(self._options, self._ranks),
            options=self._sizes(shape) | chosen,
            speeds=[
                Speed(hidden_size=width, num_layers=layers, tokens_per_second=round(speed, 1))
                for (width, layers), speed in self._speeds.items()
            ],
            gflops={name: round(flops / 1e9, 1) for name, flops in self._peaks.items()},
            tokens=tokens,
            epochs=tokens / (self._windows * self._length),
            minutes=tokens / self._speeds[shape] * with_validation / 60,
            enough_text=possible <= self._most_tokens,
            bits_per_byte=expected_bits_per_byte(self._parameters(shape), tokens),
        )

    def _sizes(self, shape: Shape) -> dict[str, int]:
        return self._settled or shape.options

    def _trial(self, shape: Shape, tokens: float) -> ResolvedTrainConfig:
        """The run of a shape that reads at most so many tokens, if they are a step."""
        options, manifest = self._options, self._manifest
        values: dict[str, Any] = self._sizes(shape) | {"train_minutes": None, "max_tokens": max(1, int(tokens))}
        values |= {"warmup_steps": None, "profile": None}  # of the whole run
        config = options.model_copy(update=values).resolved(manifest.max_length, manifest.stride)
        together = self._ranks.world_size * (options.micro_batch_size or 1)
        if options.batch_size is None and config.batch_size % together:
            values["batch_size"] = round_up(config.batch_size, together)
            config = options.model_copy(update=values).resolved(manifest.max_length, manifest.stride)
        return config

    def _model(self, shape: Shape) -> ModelConfig:
        return ModelConfig.of(self._trial(shape, tokens=1), self._data.tokenizer.vocab_size)

    def _parameters(self, shape: Shape) -> int:
        return self._model(shape).computing_parameters

    def _tokens(self, shape: Shape) -> float:
        """Tokens that a shape reads in the time, by its own speed or that of the shape measured last."""
        speed = self._speeds.get(shape)
        if speed is None:
            reached = self._peaks[self._precision] * self._ranks.world_size * _UTILIZATION
            for measured, of_measured in self._speeds.items():
                reached = of_measured * self._flops_per_token(measured)
            speed = reached / self._flops_per_token(shape)
        return min(speed * self._seconds, self._most_tokens)

    def _flops_per_token(self, shape: Shape) -> int:
        return self._model(shape).flops_per_token

    def _measure_peaks(self) -> dict[str, float]:
        names: list[Precision] = ["fp32"] if self._precision == "fp32" else ["fp32", self._precision]
        return {name: measure_peak_flops(self._ranks.device, DTYPES[name]) for name in names}

    def _measure(self, trial: ResolvedTrainConfig, micro: int) -> float:
        """Tokens per second of real steps of a new model. micro: windows per rank and forward pass."""
        together = micro * self._ranks.world_size
        batch = max(1, trial.batch_size // together) * together
        config = trial.model_copy(update={"batch_size": batch, "micro_batch_size": micro})
        trainer = Trainer(config, self._data, self._ranks, self._stop)
        warm_up = self._time(trainer, 3 if config.compile_model else 1)
        step = self._time(trainer, 1)
        steps = max(2, min(_STEPS, math.ceil(_SECONDS / step)))
        speed = steps * config.batch_size * self._length / self._time(trainer, steps)
        if config.compile_model:
            self._compiling = max(0.0, warm_up - 3 * step)  # the run compiles again
            torch._dynamo.reset()  # what was compiled for this shape must not affect the run
        return speed

    def _time(self, trainer: Trainer, steps: int) -> float:
        """Seconds of some steps, the same number on every rank."""
        began = time.perf_counter()
        for _ in range(steps):
            if trainer.train_step().stop:
                raise Preempted("stopped on request before the training began")
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return self._ranks.broadcast_from_main(lambda: time.perf_counter() - began)
