"""`python -m llm_core.export`: writes a checkpoint as a Hugging Face directory with a LlamaForCausalLM."""

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

from pathlib import Path

from pydantic import Field

from llm_core.checkpoint import named_checkpoint
from llm_core.cli import parse_options, run_tool
from llm_core.config import StageConfig
from llm_core.huggingface.directory import export_checkpoint
from llm_core.system import leave_pandas_out

PROG = "python -m llm_core.export"


class ExportOptions(StageConfig):
    """Write a checkpoint as a Hugging Face directory."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file in its run folder, or the run folder for its newest.")
    data_dir: str = Field("processed_data", description="Folder written by the data preparation, for the tokenizer.")
    output_dir: str = Field(description="Directory to write; an exported model in it is replaced once the new one is complete.")
    evaluation: str | None = Field(None, description="An evaluation_step_<N>_*.json to show in the model card.")
    reason: str = Field("exported manually", description="Why this checkpoint is released; recorded in textmill.json.")


def main() -> None:
    leave_pandas_out()
    options = parse_options(ExportOptions, PROG)
    evaluation = None if options.evaluation is None else Path(options.evaluation)
    export_checkpoint(
        named_checkpoint(options.checkpoint), Path(options.data_dir), Path(options.output_dir), evaluation, options.reason
    )
    print(options.output_dir)


if __name__ == "__main__":
    run_tool(main, PROG, "nothing was exported, and a model that was in --output_dir is still there; run it again to export")
