"""Makes the plan of a run with `train_minutes`: measures the machine with the run's own steps on the run's own text."""

import math
import os
import time
from pathlib import Path

import psutil
import torch

from llm_core.checkpoint import Parent, starting_parent
from llm_core.config import ModelConfig, ResolvedTrainConfig, TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.distributed.launch import StopRequest
from llm_core.distributed.ranks import Ranks
from llm_core.errors import Preempted, UserError
from llm_core.layout import RunFolder
from llm_core.model.precision import DTYPES, Precision, resolve_precision
from llm_core.model.transformer import Transformer
from llm_core.recipe import batch_windows, choose_optimizer, expected_bits_per_byte
from llm_core.system import write_json
from llm_core.training.cost import require_memory
from llm_core.training.mixture import plan_mixture
from llm_core.training.performance import measure_peak_flops
from llm_core.training.plan import SHAPES, Plan, Shape, Speed, choose_shape, find_plan, machine, request_id, shape_options
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
    restarts: bool = False,
) -> tuple[TrainConfig, Plan | None]:
    """The options with a plan in place of `train_minutes`, and the plan. All ranks call this together.

    A plan is kept in the run folder: the same options, text and machine have the same one, a resumed run keeps its own on any
    machine. restarts: another process will train, which has to start first.

    Raises:
        Preempted: a rank was asked to stop.
        UserError: the options do not fit this text or this machine.
    """
    if options.train_minutes is None:
        return options, None
    loading = time.time() - psutil.Process().create_time()
    parent, plan = ranks.broadcast_from_main(lambda: _kept_plan(options, manifest, run_dir, ranks))
    if plan is None:
        planner = _Planner(options, data_dir, manifest, parent, ranks, stop)
        plan = planner.plan(spent_elsewhere=loading if restarts else 0.0)
        if ranks.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(RunFolder(run_dir).plan, plan.model_dump(mode="json"))
    return plan.applied(options), plan


def _kept_plan(options: TrainConfig, manifest: DatasetManifest, run_dir: Path, ranks: Ranks) -> tuple[Parent | None, Plan | None]:
    """The parent of the run, and the plan in its folder."""
    checkpoints = RunFolder(run_dir).checkpoint_manifests()
    parent = starting_parent(options.init_from, checkpoints[0].with_suffix("") if checkpoints else None)
    request = request_id(options, manifest, parent.checkpoint_id if parent is not None else None)
    return parent, find_plan(run_dir, request, None if checkpoints else _machine(options, ranks))


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
        config = self._config(self._shapes[0], tokens=1)
        self._length = config.max_length
        self._precision: Precision = resolve_precision(config, ranks.device)
        self._peaks = ranks.broadcast_from_main(self._measure_peaks)
        self._data = TrainingData.open(data_dir, manifest, config, parent)
        mixture = plan_mixture(config, data_dir, manifest, parent.known if parent is not None else None)
        shares = mixture.shares if mixture is not None else [1.0]
        self._windows = sum(size for size, share in zip(self._data.train.sizes, shares, strict=True) if share)
        self._most_tokens = int(options.max_source_epochs * self._windows) * self._length

    def plan(self, spent_elsewhere: float) -> Plan:
        """The plan for the time that is left of this process. spent_elsewhere: seconds of other processes."""
        shapes = [shape for shape in self._shapes if self._fits(shape)] or self._shapes[:1]
        while (chosen := choose_shape(shapes, self._parameters, self._tokens)) not in self._speeds:
            self._speeds[chosen] = self._measure(chosen)
            if len(self._speeds) == _MEASUREMENTS:  # it may go back and forth between two sizes
                shapes = list(self._speeds)
        return self._ranks.broadcast_from_main(lambda: self._plan(chosen, spent_elsewhere))

    def _plan(self, shape: Shape, spent_elsewhere: float) -> Plan:
        spent = time.time() - psutil.Process().create_time() + spent_elsewhere
        self._seconds = max(self._seconds / 2, self._seconds - spent)
        config = self._config(shape, self._tokens(shape))
        validations = -(-config.max_steps // config.eval_interval) if config.eval_interval else 1
        # A forward pass takes a third of the time of a forward and a backward pass.
        with_validation = 1 + validations * config.eval_tokens / (3 * config.max_steps * config.batch_size * self._length)
        possible = self._speeds[shape] * self._seconds / with_validation
        config = self._config(shape, min(possible, self._most_tokens))
        tokens = config.max_steps * config.batch_size * self._length
        return Plan(
            request_id=request_id(self._options, self._manifest, self._parent.checkpoint_id if self._parent else None),
            machine=_machine(self._options, self._ranks),
            options=self._sizes(shape) | {"batch_size": config.batch_size, "max_steps": config.max_steps},
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

    def _config(self, shape: Shape, tokens: float) -> ResolvedTrainConfig:
        """The run of a shape that reads about so many tokens."""
        options = self._options
        length = options.max_length or self._manifest.max_length
        optimizer = choose_optimizer(options.optimizer, options.learning_rate)
        batch = options.batch_size or batch_windows(optimizer, options.learning_rate, length, tokens=max(1, int(tokens)))
        together = self._ranks.world_size * (options.micro_batch_size or 1)
        batch = batch if options.batch_size else -(-batch // together) * together
        values = {"train_minutes": None, "batch_size": batch, "max_steps": max(1, round(tokens / (batch * length)))}
        planned = options.model_copy(update=self._sizes(shape) | values)
        return planned.resolved(self._manifest.max_length, self._manifest.stride)

    def _model(self, shape: Shape) -> ModelConfig:
        return ModelConfig.of(self._config(shape, tokens=1), self._data.tokenizer.vocab_size)

    def _parameters(self, shape: Shape) -> int:
        model = self._model(shape)
        return model.num_parameters - (0 if model.tie_embeddings else model.padded_vocab_size * model.hidden_size)

    def _fits(self, shape: Shape) -> bool:
        """Whether a micro-batch of one window fits into memory: the batch is not known yet."""
        try:
            require_memory(self._config(shape, tokens=1), self._model(shape), 1, self._ranks)
        except UserError:
            return False
        return True

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
        with torch.device("meta"):
            return Transformer(self._model(shape)).flops_per_token()

    def _measure_peaks(self) -> dict[str, float]:
        names: list[Precision] = ["fp32"] if self._precision == "fp32" else ["fp32", self._precision]
        return {name: measure_peak_flops(self._ranks.device, DTYPES[name]) for name in names}

    def _measure(self, shape: Shape) -> float:
        """Tokens per second of real steps of a new model."""
        config = self._config(shape, self._tokens(shape))
        trainer = Trainer(config, self._data, self._ranks, self._stop)
        self._time(trainer, 3 if config.compile_model else 1)
        steps = max(2, min(_STEPS, math.ceil(_SECONDS / self._time(trainer, 1))))
        return steps * config.batch_size * self._length / self._time(trainer, steps)

    def _time(self, trainer: Trainer, steps: int) -> float:
        """Seconds of some steps, the same number on every rank."""
        began = time.perf_counter()
        for _ in range(steps):
            if trainer.train_step().stop:
                raise Preempted("stopped on request before the training began")
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return self._ranks.broadcast_from_main(lambda: time.perf_counter() - began)
