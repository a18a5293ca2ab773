"""Text generation: one token at a time, with a key-value cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_core.model.transformer import KVCache, Transformer


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

    When the context is full, it restarts from its newer half.
    """
    device = model.embedding.weight.device
    context = model.config.max_length
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = [model.eot_id, *prompt]
    pending = tokens[-(context // 2) :] if len(tokens) > context else tokens  # not in the cache yet
    cache = KVCache.empty(model.config, 1, device, model.embedding.weight.dtype)
    for _ in range(max_new_tokens):
        if cache.length + len(pending) > context:
            cache.length, pending = 0, tokens[-(context // 2) :]
        logits = model.logits(torch.tensor([pending], device=device), cache)[0, -1]
        token = sample(logits, temperature, top_k, top_p, generator)
        if token == model.eot_id:
            return
        yield token
        tokens.append(token)
        pending = [token]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draws one token id from scores (V,)."""
    if temperature < 1e-30:  # 0, or the quotient would overflow
        return int(logits.argmax())
    scores, ids = torch.sort(logits.float() / temperature, descending=True)
    if top_k:
        scores, ids = scores[:top_k], ids[:top_k]
    probabilities = scores.softmax(dim=0)
    if top_p < 1:
        # Drop a token when the likelier ones already sum to top_p: at least one stays.
        probabilities[probabilities.cumsum(dim=0) - probabilities >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
