"""The generation tool: `python -m llm_core.generate ...` continues a prompt with a trained model."""

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

from pathlib import Path

from pydantic import Field

from llm_core.checkpoint import named_checkpoint
from llm_core.checkpoint.state import load_model
from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import StageConfig
from llm_core.model.generation import generate
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.generate"


class GenerateOptions(StageConfig):
    """Continue a prompt with a trained model."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file, or the folder of a run for its newest checkpoint.")
    data_dir: str = Field("processed_data", description="Folder written by the data preparation, for the tokenizer.")
    prompt: str = Field("", description="Text to continue.")
    max_new_tokens: int = Field(128, ge=1, description="Maximum number of tokens; the model may end the document earlier.")
    temperature: float = Field(
        0.8, ge=0, description="0 always takes the likeliest token; 1 samples from the model's distribution."
    )
    top_k: int = Field(50, ge=0, description="Sample from this many of the likeliest tokens; 0: from all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that together have this probability.")
    seed: int = Field(0, ge=0, description="Seed for sampling.")


def continue_prompt(options: GenerateOptions) -> str:
    """The prompt with the text that the model adds.

    Raises:
        UserError: there is no such checkpoint.
        DataError: the checkpoint or its tokenizer is damaged, or the tokenizer is missing.
    """
    model, state = load_model(named_checkpoint(options.checkpoint))
    tokenizer = Tokenizer.stored(Path(options.data_dir), state["tokenizer_id"])
    prompt = tokenizer.encode(options.prompt).tolist()
    tokens = generate(
        model,
        prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return tokenizer.decode([*prompt, *tokens])


def main() -> None:
    print(printable(continue_prompt(parse_options(GenerateOptions, PROG)), keep="\n\t"))


if __name__ == "__main__":
    run_tool(main, PROG, "the text is not complete; run it again")
