"""The training loop: steps, and between them metrics, validation and checkpoints."""

from pathlib import Path

from llm_core.checkpoint import CheckpointRecord, prune_checkpoints
from llm_core.checkpoint.async_writer import CheckpointWriter
from llm_core.config import step_before_decay
from llm_core.evaluation.held_out import HeldOut, evaluate
from llm_core.model.precision import DTYPES
from llm_core.training.performance import PhaseClock, Throughput, duration, measure_peak_flops, step_profiler
from llm_core.training.run_log import RunLog
from llm_core.training.trainer import StepResult, Trainer


class TrainingLoop:
    """Runs a trainer to its last step; the run folder can be resumed at any time.

    Every rank runs the loop; only rank 0 has a `run_log` and writes.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, run_log: RunLog | None) -> None:
        self.trainer, self.config, self.ranks = trainer, trainer.config, trainer.ranks
        self.run_dir, self.run_log = run_dir, run_log
        self._writer = CheckpointWriter(run_dir) if run_log is not None else None
        self._last_validation: tuple[int, HeldOut] | None = None

    def run(self) -> bool:
        """Trains to max_steps. Returns False if it was asked to stop earlier; the state is saved.

        Raises:
            DataError: too many steps in a row were not finite, or a checkpoint could not be written. Earlier ones are intact.
        """
        try:
            return self._run()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _run(self) -> bool:
        trainer, config = self.trainer, self.config
        clock = Throughput(
            warmup_steps=2 if config.compile_model else 1,
            flops_per_token=trainer.model.flops_per_token(),
            peak_flops=measure_peak_flops(self.ranks.device, DTYPES[trainer.precision]) * self.ranks.world_size,
        )
        trainer.phases = PhaseClock()  # starts now
        # Validation runs the same model: its forward passes count as validation.
        trainer.model.on_phase = lambda phase: trainer.phases.lap(phase if trainer.model.training else "validation")
        log = self.run_log.log if self.run_log is not None else lambda text: None
        with step_profiler(config.profile, self.run_dir, self.ranks.rank, log) as profiled_step:
            while trainer.step < config.max_steps:
                tokens_before = trainer.tokens_seen
                result = trainer.train_step()
                clock.step_done(trainer.tokens_seen - tokens_before)
                profiled_step()
                self._log_step(result, clock)
                self._check_writer(result.save_failed)
                trainer.phases.lap("log")
                finished = trainer.step == config.max_steps
                if finished or _is_due(trainer.step, config.eval_interval):
                    self.validate()
                    trainer.phases.lap("validation")
                    clock.resume()
                decays = trainer.step == step_before_decay(config)
                if finished or result.stop or decays or _is_due(trainer.step, config.save_interval):
                    self.save(wait=finished or result.stop or not config.background_save)
                    trainer.phases.lap("save")
                    clock.resume()
                if result.stop:
                    return finished
        return True

    def validate(self) -> HeldOut:
        """Evaluates on eval_tokens of held-out text, the same each time."""
        trainer = self.trainer
        held_out = evaluate(
            trainer.model,
            trainer.data.val,
            trainer.data.token_bytes,
            batch_size=trainer.micro_batch_size,
            ranks=self.ranks,
            precision=trainer.precision,
        )
        self._last_validation = (trainer.step, held_out)
        if self.run_log is not None:
            numbers = {"val_loss": held_out.loss, "val_bits_per_byte": held_out.bits_per_byte}
            self.run_log.record({"kind": "eval", "step": trainer.step, "tokens": trainer.tokens_seen} | numbers)
            self.run_log.log(
                f"step {trainer.step}/{self.config.max_steps} | validation loss {held_out.loss:.4f} | "
                f"{held_out.bits_per_byte:.4f} bits per byte"
            )
        return held_out

    def save(self, wait: bool) -> None:
        """Writes a checkpoint on rank 0, once the previous one is on disk.

        With `wait` all ranks return when it is on disk, or fail together. Otherwise they return once the state is copied; if
        writing fails, all ranks fail after the next step.
        """
        error: Exception | None = None
        state = self.trainer.state()
        if self.run_log is not None and self._writer is not None:
            try:
                validated = self._last_validation
                val_loss = validated[1].loss if validated is not None and validated[0] == self.trainer.step else None
                self._record_save(self._writer.wait())
                self.run_log.sync()
                if wait:
                    self._record_save(self._writer.write(state, val_loss))
                else:
                    self._writer.start(state, val_loss)
            except Exception as failure:
                error = failure
        self.ranks.raise_on_all_ranks(error)

    def _check_writer(self, save_failed: bool) -> None:
        """Records a background save that has finished. If the last step reports that one failed, all ranks fail."""
        error: Exception | None = None
        if self._writer is not None:
            if save_failed:
                error = self._writer.error
            else:
                self._record_save(self._writer.collect())
            self.trainer.save_failed = self._writer.error is not None
        if save_failed:
            self.ranks.raise_on_all_ranks(error)

    def _record_save(self, record: CheckpointRecord | None) -> None:
        """Records a checkpoint that is on disk, and deletes those that are no longer kept."""
        if record is None or self.run_log is None:
            return
        self.run_log.record_checkpoint(record)
        prune_checkpoints(self.run_dir, self.config.keep_checkpoints, step_before_decay(self.config))
        self.run_log.update(
            steps_done=record.step,
            tokens_seen=record.tokens_seen,
            skipped_steps=self.trainer.skipped_steps,
            seconds_by_phase=dict(self.trainer.phases.seconds),
        )
        self.run_log.log(f"step {record.step}/{self.config.max_steps} | saved {record.path} ({record.bytes / 1e6:.1f} MB)")

    def _log_step(self, result: StepResult, clock: Throughput) -> None:
        if self.run_log is None:
            return
        step, last_step = self.trainer.step, self.config.max_steps
        line = {
            "kind": "train",
            "step": step,
            "tokens": self.trainer.tokens_seen,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": clock.tokens_per_second,
            "mfu": clock.mfu,
            "skipped": result.skipped,
        }
        self.run_log.record(line)
        text = f"loss {result.loss:.4f} | lr {result.learning_rate:.2e} | grad norm {result.grad_norm:.2f}"
        if clock.tokens_per_second:
            left = duration((last_step - step) * clock.seconds_per_step)
            text += f" | {clock.tokens_per_second:,.0f} tokens/s | MFU {clock.mfu:.0%} | {left} left"
        if result.skipped:
            text += " | SKIPPED: not finite"
        due = result.skipped or step in (1, last_step) or _is_due(step, self.config.log_interval)
        self.run_log.progress(step, last_step, text, due)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
