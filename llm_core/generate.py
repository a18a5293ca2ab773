"""Text from a trained model, one token at a time with a key-value cache; `python -m llm_core.generate` is the tool."""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from llm_core.checkpoint import load_model
from llm_core.checkpoint_files import named_checkpoint
from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import StageConfig
from llm_core.model import KVCache, Transformer
from llm_core.tokenizer import Tokenizer

PROG = "python -m llm_core.generate"


class GenerateOptions(StageConfig):
    """Continue a prompt with a trained model."""

    checkpoint: str = Field(description="A checkpoint_step_<N>.pt file, or the folder of a run for its newest.")
    data_dir: str = Field("processed_data", description="Folder of the data preparation, which holds the tokenizers.")
    prompt: str = Field("", description="Text to continue.")
    max_new_tokens: int = Field(128, ge=1, description="Tokens to write at most; the model may end the document earlier.")
    temperature: float = Field(
        0.8, ge=0, description="0 always takes the likeliest token; 1 draws from the model's own distribution."
    )
    top_k: int = Field(50, ge=0, description="Draw from this many likeliest tokens; 0: from all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that hold this share of the probability.")
    seed: int = Field(0, ge=0, description="Seed of the draws.")


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields token ids that continue `prompt`, up to the end-of-text token (not yielded) or `max_new_tokens`.

    When the context is full, the cache is filled again from its newer half.
    """
    device = model.embedding.weight.device
    context = model.config.max_length
    generator = torch.Generator(device=device).manual_seed(seed)
    known = [model.eot_id, *prompt]
    pending = known[-(context // 2) :] if len(known) > context else known
    cache = KVCache.empty(model.config, 1, device, model.embedding.weight.dtype)
    for _ in range(max_new_tokens):
        if cache.length + len(pending) > context:
            cache.length, pending = 0, known[-(context // 2) :]
        logits = model.logits(torch.tensor([pending], device=device), cache)[0, -1]
        token = sample(logits, temperature, top_k, top_p, generator)
        if token == model.eot_id:
            return
        yield token
        known.append(token)
        pending = [token]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draws one token id from scores (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    scores, ids = torch.sort(logits.float() / temperature, descending=True)
    if top_k:
        scores, ids = scores[:top_k], ids[:top_k]
    probabilities = scores.softmax(dim=0)
    if top_p < 1:
        # Keep each token until those before it already hold top_p: at least one remains.
        probabilities[probabilities.cumsum(dim=0) - probabilities >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def continue_prompt(options: GenerateOptions) -> str:
    """The prompt and what the model writes after it.

    Raises:
        UserError: there is no such checkpoint.
        DataError: it or its tokenizer is damaged, or the tokenizer is missing.
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
    run_tool(main, PROG)
