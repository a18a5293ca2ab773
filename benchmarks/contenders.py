"""Those who compete in `benchmarks.quality`: how each is trained, with a validation after every `interval` steps.

All read the windows of one prepared text and compute bits per byte with textmill's `evaluate` on the same held-out windows.
Processors without instructions for bf16 compute in fp32; where they have them, textmill, the Trainer with textmill's settings and
nanochat use bf16.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks.measure import CORES, logged
from llm_core.config import IGNORE_INDEX, ResolvedTrainConfig, TrainConfig
from llm_core.dataset import load_manifest
from llm_core.errors import UserError
from llm_core.system import cpu_has_bf16

if TYPE_CHECKING:
    from torch import Tensor

    from llm_core.model.precision import Precision
    from llm_core.training.run_data import TrainingData

LENGTH = 256  # tokens of a window
SHAPE: dict[str, Any] = {"hidden_size": 192, "num_layers": 4}
BY_HAND: dict[str, Any] = SHAPE | {"num_heads": 6, "batch_size": 4, "learning_rate": 1.5e-3}
BY_RECIPE: dict[str, Any] = SHAPE | {"num_heads": 3, "num_kv_heads": 1, "batch_size": 16}
NANOCHAT_BATCH = 8

RECIPE, ADAMW = "textmill, recipe", "textmill, AdamW by hand"
DEFAULTS, TUNED = "transformers Trainer, its settings", "transformers Trainer, textmill's settings"
NANOCHAT, NANOCHAT_WITHOUT = "nanochat", "nanochat without value embeddings"
CONTENDERS = [RECIPE, ADAMW, DEFAULTS, TUNED]
NANOCHATS = [NANOCHAT, NANOCHAT_WITHOUT]  # need a checkout of nanochat

# (seconds, bits per byte of the held-out text) of each validation.
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Progress:
    """The end of each step and each validation, in seconds of the clock or, after `at_work`, of the contender's own time."""

    ends: list[float]
    curve: Curve

    def at_work(self, turns: Sequence[tuple[float, float]]) -> "Progress":
        """Counts only the time within the turns, from the start of the first step."""

        def own(moment: float) -> float:
            return sum(max(0.0, min(moment, end) - start) for start, end in turns)

        ends = [own(moment) for moment in self.ends]
        began = ends[0] - (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        return Progress([end - began for end in ends], [(own(moment) - began, value) for moment, value in self.curve])


@dataclass(frozen=True)
class Training:
    """What one contender is told to do."""

    data_dir: Path
    steps: int
    interval: int  # steps between two validations
    eval_tokens: int
    seed: int
    nanochat: Path | None = None  # the checkout

    def run(self, contender: str, run_dir: Path) -> Progress:
        """Trains in this process; textmill in one of its own, which writes to `run_dir`."""
        if contender in (RECIPE, ADAMW):
            return self._textmill(BY_RECIPE if contender == RECIPE else BY_HAND, run_dir)
        if contender in (DEFAULTS, TUNED):
            return self._transformers(tuned=contender == TUNED)
        assert self.nanochat is not None, "named with this contender"
        return self._nanochat(self.nanochat, value_embeddings=contender == NANOCHAT)

    def _textmill(self, options: dict[str, Any], run_dir: Path) -> Progress:
        """Runs the training command."""
        options = options | {"max_steps": self.steps, "eval_interval": self.interval, "eval_tokens": self.eval_tokens}
        flags = [f"--{name}={value}" for name, value in (options | {"save_interval": 0, "seed": self.seed}).items()]
        command = [sys.executable, "-m", "llm_core.train", f"--data_dir={self.data_dir}", f"--save_dir={run_dir}", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        records = logged(run_dir)
        curve = [(record["time"], record["val_bits_per_byte"]) for record in records["eval"]]
        return Progress([record["time"] for record in records["train"]], curve)

    def _transformers(self, tuned: bool) -> Progress:
        """Runs the Trainer. tuned: with textmill's settings, its precision among them."""
        import numpy as np
        import torch
        from torch import Tensor, nn
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

        from llm_core.config import ModelConfig
        from llm_core.huggingface.llama import llama_config

        torch.set_num_threads(CORES)
        torch.manual_seed(self.seed)
        ours, data = self._open(BY_HAND)
        model = LlamaForCausalLM(
            LlamaConfig(**llama_config(ModelConfig.of(ours, data.tokenizer.vocab_size), data.tokenizer.eot_id))
        )
        bf16 = tuned and cpu_has_bf16()

        class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
            def __len__(self) -> int:
                return len(data.train)

            def __getitem__(self, index: int) -> dict[str, Tensor]:
                inputs = data.train.batch(np.array([index]))[0][0]
                return {"input_ids": inputs, "labels": inputs}  # the model shifts the labels itself

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1).float(), targets.flatten(), reduction="none")

        ends: list[float] = []
        curve: Curve = []
        validates = self._validates

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                ends.append(time.time())
                if validates(state.global_step):
                    model.eval()
                    bits = _bits_per_byte(losses, data, "bf16" if bf16 else "fp32")
                    model.train()
                    curve.append((time.time(), bits))

        settings: dict[str, Any] = {"seed": self.seed, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        if tuned:
            settings |= {
                "per_device_train_batch_size": ours.batch_size,
                "learning_rate": ours.learning_rate,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": ours.min_lr},
                "warmup_steps": ours.warmup_steps,
                "weight_decay": ours.weight_decay,
                "adam_beta2": ours.beta2,
                "bf16": bf16,
            }
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(scratch, max_steps=self.steps, use_cpu=True, **settings)
            Trainer(model, arguments, train_dataset=Examples(), callbacks=[Watch()]).train()
        return Progress(ends, curve)

    def _nanochat(self, checkout: Path, value_embeddings: bool) -> Progress:
        """Trains nanochat's model, compiled, with the rates of its `setup_optimizer` and the schedules of scripts/base_train.py.

        That script would also scale the rates with the root of the batch, here to a sixteenth, and decay the matrices.
        Attention is full, as it recommends without FlashAttention 3.
        """
        import torch
        from torch import Tensor, nn

        gpt = load_nanochat(checkout)
        torch.set_num_threads(CORES)
        torch.manual_seed(self.seed)
        _, data = self._open(BY_HAND)
        heads = BY_RECIPE["num_heads"]
        config = gpt.GPTConfig(
            sequence_len=LENGTH,
            vocab_size=data.tokenizer.vocab_size,
            n_layer=SHAPE["num_layers"],
            n_head=heads,
            n_kv_head=heads,
            n_embd=SHAPE["hidden_size"],
            window_pattern="L",
        )
        with torch.device("meta"):
            model = gpt.GPT(config)
        if not value_embeddings:
            model.value_embeds = nn.ModuleDict()
            for block in model.transformer.h:
                block.attn.ve_gate = None
        model.to_empty(device="cpu")
        model.init_weights()
        optimizer = model.setup_optimizer()
        compiled = torch.compile(model, dynamic=False)

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            return model(inputs, _nanochat_targets(targets), loss_reduction="none")

        ends: list[float] = []
        curve: Curve = []
        for step in range(self.steps):
            inputs, targets = data.train.batch(data.order.windows_of_step(step, NANOCHAT_BATCH))
            compiled(inputs, _nanochat_targets(targets)).backward()
            rate, momentum = nanochat_schedule(step, self.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
                if group["kind"] == "muon":
                    group["momentum"] = momentum
            optimizer.step()
            model.zero_grad(set_to_none=True)
            ends.append(time.time())
            if self._validates(step + 1):
                bits = _bits_per_byte(losses, data, "fp32")
                curve.append((time.time(), bits))
        return Progress(ends, curve)

    def _open(self, options: dict[str, Any]) -> tuple[ResolvedTrainConfig, "TrainingData"]:
        """The data that the training command would read with these options."""
        from llm_core.training.run_data import TrainingData

        manifest = load_manifest(self.data_dir)
        config = TrainConfig(**options, max_steps=self.steps, eval_tokens=self.eval_tokens, seed=self.seed)
        resolved = config.resolved(manifest.max_length, manifest.stride)
        return resolved, TrainingData.open(self.data_dir, manifest, resolved, None)

    def _validates(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.steps


def load_nanochat(checkout: Path) -> ModuleType:
    """nanochat.gpt of a checkout of github.com/karpathy/nanochat, computing in bf16 where the processor has it.

    Raises:
        UserError: something is missing there.
    """
    os.environ["NANOCHAT_DTYPE"] = "bfloat16" if cpu_has_bf16() else "float32"
    # torch.compile's workers would be processes of their own, which the turns do not stop.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    wanted = checkout / "nanochat" / "gpt.py"
    if not wanted.is_file():
        raise UserError(
            f"nanochat {checkout}: no {wanted.relative_to(checkout)}; give a checkout of github.com/karpathy/nanochat"
        )
    sys.path.insert(0, str(checkout.resolve()))
    try:
        gpt = importlib.import_module("nanochat.gpt")
    except ImportError as error:
        raise UserError(f"nanochat {checkout}: {wanted.relative_to(checkout)} cannot be imported: {error}") from error
    for names in (["GPTConfig"], ["GPT"], ["GPT", "setup_optimizer"]):
        part: Any = gpt
        for name in names:
            part = getattr(part, name, None)
        if part is None:
            raise UserError(f"nanochat {checkout}: {wanted.relative_to(checkout)} has no {'.'.join(names)}; use commit 92d63d4")
    return gpt


def nanochat_schedule(step: int, steps: int) -> tuple[float, float]:
    """Factor of the learning rates and momentum of Muon at a step, as in nanochat's scripts/base_train.py."""
    decay = round(0.65 * steps)
    left = (steps - step) / decay  # 1 to 0 in the decay, above 1 before it
    rate = (step + 1) / 40 if step < 40 else min(1.0, 0.05 + 0.95 * left)
    momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.90 + 0.07 * min(1.0, left)
    return rate, momentum


def _nanochat_targets(targets: "Tensor") -> "Tensor":
    return targets.masked_fill(targets == IGNORE_INDEX, -1)


def _bits_per_byte(losses: "Callable[[Tensor, Tensor], Tensor]", data: "TrainingData", precision: "Precision") -> float:
    """Of a peer's model on the held-out windows. losses: of each target, flat, from inputs and targets."""
    from torch import nn

    from llm_core.distributed.ranks import Ranks
    from llm_core.evaluation.held_out import evaluate

    class PerToken(nn.Module):
        """The peer's model with the interface that `evaluate` expects."""

        def forward(self, inputs: "Tensor", targets: "Tensor", per_token: bool) -> "Tensor":
            return losses(inputs, targets).view_as(targets)

    ranks = Ranks.alone("cpu", CORES)
    held_out = evaluate(
        PerToken(),  # type: ignore[arg-type]
        data.val,
        data.token_bytes,
        batch_size=8,
        ranks=ranks,
        precision=precision,
    )
    return held_out.bits_per_byte
