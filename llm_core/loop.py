"""The training loop: steps, and between them validation, checkpoints, metrics and the way out."""

from pathlib import Path

from llm_core.background import CheckpointWriter
from llm_core.checkpoint_files import CheckpointRecord, prune_checkpoints
from llm_core.evaluate import HeldOut, evaluate
from llm_core.precision import DTYPES
from llm_core.profiling import step_profiler
from llm_core.runlog import RunLog
from llm_core.schedule import decay_start
from llm_core.throughput import PhaseClock, Throughput, duration, measure_peak_flops
from llm_core.trainer import StepResult, Trainer


class TrainingLoop:
    """Runs a trainer to its last step and leaves a run directory that can always be resumed.

    Every rank runs the same loop; only the main rank has a `log` and writes.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, log: RunLog | None) -> None:
        self.trainer, self.config, self.ranks = trainer, trainer.config, trainer.ranks
        self.run_dir, self.log = run_dir, log
        self._writer = CheckpointWriter(run_dir) if log is not None else None
        self._last_validation: tuple[int, HeldOut] | None = None

    def run(self) -> bool:
        """Trains to max_steps. Returns False when it was asked to stop before that; the state is then saved.

        Raises:
            DataError: steps in a row were not finite, or the disk refused a checkpoint; earlier ones are untouched.
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
        trainer.phases = PhaseClock()  # what came before was preparation
        # Validation goes through the same model: its parts are counted as its own.
        trainer.model.on_phase = lambda phase: trainer.phases.lap(phase if trainer.model.training else "validation")
        say = self.log.say if self.log is not None else lambda text: None
        with step_profiler(config.profile, self.run_dir, self.ranks.rank, say) as profiled_step:
            while trainer.step < config.max_steps:
                tokens_before = trainer.tokens_seen
                result = trainer.train_step()
                clock.step_done(trainer.tokens_seen - tokens_before)
                profiled_step()
                self._report(result, clock)
                self._look_after_the_writer(result.failed)
                trainer.phases.lap("log")
                finished = trainer.step == config.max_steps
                if finished or _is_due(trainer.step, config.eval_interval):
                    self.validate()
                    trainer.phases.lap("validation")
                    clock.resume()
                decays = config.lr_schedule == "wsd" and trainer.step == decay_start(config)
                if finished or result.stop or decays or _is_due(trainer.step, config.save_interval):
                    self.save(wait=finished or result.stop or not config.background_save)
                    trainer.phases.lap("save")
                    clock.resume()
                if result.stop:
                    return finished
        return True

    def validate(self) -> HeldOut:
        """Held-out loss on the first eval_tokens of the validation split; the same tokens each time."""
        trainer = self.trainer
        held_out = evaluate(
            trainer.model,
            trainer.data.val,
            trainer.data.token_bytes,
            max_tokens=self.config.eval_tokens,
            batch_size=trainer.micro_batch_size,
            ranks=self.ranks,
            precision=trainer.precision,
        )
        self._last_validation = (trainer.step, held_out)
        if self.log is not None:
            numbers = {"val_loss": held_out.loss, "val_bits_per_byte": held_out.bits_per_byte}
            self.log.record({"kind": "eval", "step": trainer.step, "tokens": trainer.tokens_seen} | numbers)
            self.log.say(
                f"step {trainer.step}/{self.config.max_steps} | validation loss {held_out.loss:.4f} | "
                f"{held_out.bits_per_byte:.4f} bits per byte"
            )
        return held_out

    def save(self, wait: bool) -> None:
        """Writes a checkpoint of the present state on the main rank, after the one before is on disk.

        With `wait` every rank returns when it is on disk, or fails with it. Otherwise they return when the state is copied; a
        failure then ends every rank with the next step.
        """
        error: Exception | None = None
        state = self.trainer.state()
        if self.log is not None and self._writer is not None:
            try:
                validated = self._last_validation
                val_loss = validated[1].loss if validated is not None and validated[0] == self.trainer.step else None
                self._tell(self._writer.wait())
                self.log.sync()
                if wait:
                    self._tell(self._writer.write(state, val_loss))
                else:
                    self._writer.start(state, val_loss)
            except Exception as failure:
                error = failure
        self.ranks.main_first_error(error)

    def _look_after_the_writer(self, failed: bool) -> None:
        """Tells of a checkpoint that is on disk by now; every rank ends if the last step said that one `failed`."""
        error: Exception | None = None
        if self._writer is not None:
            if failed:
                error = self._writer.error
            elif (record := self._writer.collect()) is not None:
                self._tell(record)
            self.trainer.failed = self._writer.error is not None
        if failed:
            self.ranks.main_first_error(error)

    def _tell(self, record: CheckpointRecord | None) -> None:
        """Says that a checkpoint is on disk, in every place, and deletes the ones that are not to be kept any longer."""
        if record is None or self.log is None:
            return
        self.log.record_checkpoint(record)
        before_decay = decay_start(self.config) if self.config.lr_schedule == "wsd" else None
        prune_checkpoints(self.run_dir, self.config.keep_checkpoints, before_decay)
        counts = {"steps_done": record.step, "tokens_seen": record.tokens_seen, "skipped_steps": self.trainer.skipped_steps}
        self.log.update(counts | {"seconds_by_phase": self.trainer.phases.seconds})
        self.log.say(f"step {record.step}/{self.config.max_steps} | saved {record.path} ({record.bytes / 1e6:.1f} MB)")

    def _report(self, result: StepResult, clock: Throughput) -> None:
        if self.log is None:
            return
        step, last_step = self.trainer.step, self.config.max_steps
        record = {
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
        self.log.record(record)
        text = f"loss {result.loss:.4f} | lr {result.learning_rate:.2e} | grad norm {result.grad_norm:.2f}"
        if clock.tokens_per_second:
            left = duration((last_step - step) * clock.seconds_per_step)
            text += f" | {clock.tokens_per_second:,.0f} tokens/s | MFU {clock.mfu:.0%} | {left} left"
        if result.skipped:
            text += " | SKIPPED: not finite"
        due = result.skipped or step in (1, last_step) or _is_due(step, self.config.log_interval)
        self.log.progress(step, last_step, text, due)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
