"""Configuration and weights under the names of transformers' LlamaForCausalLM."""

from typing import Any

import torch
from torch import Tensor

from llm_core.config import ModelConfig
from llm_core.model.transformer import Transformer


def llama_config(config: ModelConfig, eot_id: int) -> dict[str, Any]:
    """The config.json of transformers' LlamaForCausalLM; padded vocabulary rows are not exported."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights under Llama's names; the fused query-key-value and gate-up matrices are split."""
    config = model.config
    weights = {
        "model.embed_tokens.weight": model.embedding.weight[: config.vocab_size],
        "model.norm.weight": model.norm.weight,
    }
    if not config.tie_embeddings:
        weights["lm_head.weight"] = model.head.weight[: config.vocab_size]
    state = model.state_dict()
    heads = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = state[ours + "attention.qkv.weight"].split(heads)
        gate, up = state[ours + "mlp.gate_up.weight"].chunk(2)
        weights |= {
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": state[ours + "attention.out.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "mlp_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "mlp.down.weight"],
        }
    return {name: weight.detach().to(torch.float32).contiguous() for name, weight in weights.items()}
