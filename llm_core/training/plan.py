"""The plan of a run with `train_minutes`: what is trained in that time on this machine. It is made once and then kept."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from llm_core.checkpoint import RunRecord, find_parent
from llm_core.config import SHAPE, ResolvedTrainConfig, TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.errors import UserError
from llm_core.layout import RunFolder
from llm_core.recipe import suitable_parameters
from llm_core.system import available_cores, content_id, cpu_name, gpu, read_record

# Increased when the same measurements start to give another plan.
PLAN_VERSION = 1

# Options that change the speed of a step but not its result, which is why `identity` leaves them out.
_SPEED = ("micro_batch_size", "attention", "compile_model", "gradient_checkpointing", "sharding", "device")


class Shape(NamedTuple):
    """Sizes of a model. Heads are 64 wide, 128 from a width of 1,024."""

    hidden_size: int
    num_layers: int

    @property
    def options(self) -> dict[str, int]:
        heads = self.hidden_size // (64 if self.hidden_size < 1024 else 128)
        return {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": heads, "num_kv_heads": heads}


# From a minute on a laptop to days on GPUs: the width is about 64 times the depth (Karpathy 2025, nanochat).
SHAPES = [
    Shape(128, 2), Shape(192, 3), Shape(192, 4), Shape(256, 4), Shape(256, 6), Shape(384, 6), Shape(512, 8), Shape(640, 10),
    Shape(768, 12), Shape(1024, 16), Shape(1280, 20), Shape(1536, 24), Shape(2048, 32),
]  # fmt: skip


class Speed(BaseModel):
    """The measured training speed of one shape."""

    model_config = ConfigDict(frozen=True)

    hidden_size: int
    num_layers: int
    tokens_per_second: float


class Plan(BaseModel):
    """What `train_minutes` became, in plan_<request_id>.json of the run folder."""

    model_config = ConfigDict(frozen=True)

    request_id: str  # of options, text and parent
    machine: str
    options: dict[str, int]  # the sizes, the batch and the steps that were chosen
    speeds: list[Speed]  # in the order of measurement
    gflops: dict[str, float]  # of a large matrix product in each dtype
    tokens: int
    epochs: float
    minutes: float  # of training, with its validations
    enough_text: bool  # False: the cap on epochs ends the run before the time is over
    bits_per_byte: float  # expected of English prose

    def applied(self, options: TrainConfig) -> TrainConfig:
        """The options with what the plan chose in place of `train_minutes`."""
        return options.model_copy(update={**self.options, "train_minutes": None})

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.describe().items())

    def describe(self) -> dict[str, str]:
        """What was measured and chosen, as text."""
        speeds = [f"{speed.num_layers} x {speed.hidden_size}: {speed.tokens_per_second:,.0f} tokens/s" for speed in self.speeds]
        gflops = [f"{dtype} {value:,.0f} GFLOP/s" for dtype, value in self.gflops.items()]
        chosen = self.options
        end = "" if self.enough_text else "; the text is too short for the time: more text would help more than more time"
        return {
            "machine": self.machine,
            "measured": ", ".join([*gflops, *speeds]),
            "plan": f"{chosen['num_layers']} layers of width {chosen['hidden_size']}, {chosen['max_steps']:,} steps of "
            f"{chosen['batch_size']} windows, {self.tokens:,} tokens, {self.epochs:.1f} epochs, {self.minutes:.1f} minutes of "
            f"training{end}",
            "expected quality": f"about {self.bits_per_byte:.2f} bits per byte, if the text is like English tales",
        }


def resolve(options: TrainConfig, manifest: DatasetManifest) -> ResolvedTrainConfig:
    """The options of a run on a dataset, without open defaults.

    Raises:
        UserError: two values do not fit together.
    """
    return options.resolved(manifest.max_length, manifest.stride, manifest.splits["train"].tokens)


def request_id(options: TrainConfig, manifest: DatasetManifest, parent_checkpoint_id: str | None) -> str:
    """What a plan answers: the options, the text and the parent, but not the machine."""
    speed = options.model_dump(mode="json", include={"model", *_SPEED})
    windows = (options.max_length or manifest.max_length, manifest.stride if options.stride is None else options.stride)
    sources = manifest.snapshot_id if options.source_weights else None
    ids = (manifest.dataset_id, parent_checkpoint_id, sources)
    return content_id("plan", PLAN_VERSION, *ids, windows, options.identity(), speed)


def machine(options: TrainConfig, world_size: int, local_world_size: int) -> str:
    """The device and how many processes share it: a plan holds for these."""
    accelerator = gpu() if options.device != "cpu" else None
    if accelerator is not None:
        return f"{world_size} x {accelerator.name}"
    threads = options.threads_per_process or max(1, available_cores() // local_world_size)
    return f"{cpu_name()}, {world_size} x {threads} threads"


def find_plan(run_dir: Path, request: str, on_machine: str | None) -> Plan | None:
    """The plan in a run folder, if it answers the request. on_machine: None for any.

    Raises:
        DataError: it is damaged.
    """
    path = RunFolder(run_dir).plan(request)
    if not path.exists():
        return None
    plan = read_record(path, Plan)
    return plan if on_machine in (None, plan.machine) else None


def shape_options(options: TrainConfig) -> dict[str, int] | None:
    """The sizes of the model that are settled: those that are given, or those of the parent; None if they are open.

    Raises:
        UserError: the parent's are unknown, or its model differs in another way.
    """
    if options.has_shape:
        return dict(zip(SHAPE, options.shape(), strict=False))
    if options.init_from is None:
        return None
    path = find_parent(options.init_from).path
    assert path is not None, "only a resumed run has a parent without files"
    run = RunRecord.find(path.parent)
    if run is None:
        raise UserError(
            f"--init_from {options.init_from}: no run.json beside it says its sizes; give --hidden_size and the others"
        )
    config = run.train_config(path.parent)
    for name in ("tie_embeddings", "rope_theta", "norm_eps"):
        if config[name] != getattr(options, name):
            raise UserError(f"--{name} {getattr(options, name)}: the run of --init_from has {config[name]}; give that")
    return {name: config[name] for name in SHAPE}


def choose_shape(shapes: Sequence[Shape], parameters: Callable[[Shape], int], tokens: Callable[[Shape], float]) -> Shape:
    """The shape that is closest to the size which the tokens that it reads in the time ask for.

    parameters: with the head, without the embedding.
    """
    return min(shapes, key=lambda shape: abs(math.log(parameters(shape) / suitable_parameters(tokens(shape)))))
