"""The transformer: parameters, initial weights, loss, attention and masking."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_core.config import IGNORE_INDEX, ModelConfig, TrainConfig, swiglu_width
from llm_core.model.fused_ops import apply_rotary_emb
from llm_core.model.loss import nll_sum, token_nll
from llm_core.model.transformer import KVCache, RMSNorm, Transformer, rotary_tables


def build(vocab_size: int = 300, length: int = 32, **options: object) -> Transformer:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4} | options
    config = TrainConfig(max_length=length, **shape).resolved(length, 0)  # type: ignore[arg-type]
    model = Transformer(ModelConfig.of(config, vocab_size))
    model.init_weights(seed=0)
    return model


def count(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 20), ("small", 125), ("medium", 350), ("large", 800), ("xl", 1500)])
def test_presets_have_the_parameter_counts_of_the_documentation(preset: str, millions: int) -> None:
    with torch.device("meta"):
        config = TrainConfig(model=preset).resolved(2048, 0)  # type: ignore[arg-type]
        model = Transformer(ModelConfig.of(config, 32000))
    parameters = count(model)
    assert parameters == model.config.num_parameters
    assert parameters == pytest.approx(millions * 1e6, rel=0.12)


def test_rule_7_rotary_positions_rotate_pairs_half_a_head_apart_in_fp32() -> None:
    config = build().config
    cos, sin = rotary_tables(config)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 5, 1, config.head_dim, dtype=torch.float64)
    rotated, same, value = apply_rotary_emb(torch.cat((x, x, x), dim=2), cos[:5, None], sin[:5, None], (1, 1, 1))
    assert torch.equal(rotated, same) and torch.equal(value, x)
    half = config.head_dim // 2
    for position in range(5):
        for pair in range(half):
            angle = position * config.rope_theta ** (-2 * pair / config.head_dim)
            expected = complex(*x[0, position, 0, [pair, pair + half]].tolist()) * complex(math.cos(angle), math.sin(angle))
            actual = complex(*rotated[0, position, 0, [pair, pair + half]].tolist())
            assert abs(actual - expected) < 1e-5
    rounded = x.bfloat16().repeat(1, 1, 3, 1)
    low, exact = (apply_rotary_emb(qkv, cos[:5, None], sin[:5, None], (1, 1, 1))[0] for qkv in (rounded, rounded.float()))
    assert torch.equal(low, exact.bfloat16())
    assert not {"cos", "sin"} & set(build().state_dict())


def test_rule_8_rms_norm_computes_in_fp32_and_casts_back_after_the_weight() -> None:
    norm = RMSNorm(64, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 64).bfloat16()
    reference = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), reference.bfloat16())
    assert TrainConfig().norm_eps == 1e-5


def test_rule_9_initial_weights_and_loss(tokens: Tensor) -> None:
    model = build(num_layers=8, hidden_size=128)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8) if residual else 0.02, rel=0.05), name
        else:
            assert torch.equal(weight, torch.ones_like(weight)), name
    loss = build()(tokens[:, :-1], tokens[:, 1:]).item() / tokens[:, 1:].numel()
    assert loss == pytest.approx(math.log(300), abs=0.1)


@pytest.mark.parametrize(("hidden", "width"), [(256, 704), (768, 2048), (1024, 2752), (1536, 4096), (2048, 5504)])
def test_rule_10_swiglu_width_is_eight_thirds_rounded_up_to_64(hidden: int, width: int) -> None:
    assert swiglu_width(hidden) == width
    with torch.device("meta"):
        config = TrainConfig(hidden_size=hidden, num_heads=8).resolved(64, 0)
        assert Transformer(ModelConfig.of(config, 300)).blocks[0].mlp.down.in_features == width  # type: ignore[union-attr, index]


def test_rule_11_padded_vocabulary_rows_never_take_part(tokens: Tensor) -> None:
    model = build()
    assert model.head.weight.shape[0] == model.embedding.weight.shape[0] == 320
    with torch.no_grad():
        before = model(tokens[:, :-1], tokens[:, 1:])
        model.head.weight[300:] = 1e6
        assert torch.equal(model(tokens[:, :-1], tokens[:, 1:]), before)
        assert model.logits(tokens[:, :-1]).shape[-1] == 300
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert not model.head.weight.grad[300:].any()  # type: ignore[index]


def test_rule_20_a_tied_matrix_is_one_parameter(tokens: Tensor) -> None:
    tied, untied = build(tie_embeddings=True), build()
    assert tied.head.weight is tied.embedding.weight
    sizes = [count(untied), count(tied)]
    assert sizes == [untied.config.num_parameters, tied.config.num_parameters]
    assert sizes[0] - sizes[1] == 320 * 64
    loaded = build(tie_embeddings=True)
    loaded.load_state_dict(tied.state_dict(), strict=True)
    assert loaded.head.weight is loaded.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_and_its_gradients_equal_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_core.model.loss._CHUNK_ELEMENTS", {"cpu": 1})  # chunks of 64 rows
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 100, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (2, 100), generator=generator)
    targets[0, 90:] = targets[1, 3] = IGNORE_INDEX
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = nll_sum(hidden, weight, targets)
        logits = F.linear(hidden, weight).float()
        separate = token_nll(hidden, weight, targets)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 6e-2}
    torch.testing.assert_close(ours, reference, **tolerance)
    assert ours.dtype == torch.float32
    actual = torch.autograd.grad(3 * ours, [hidden, weight])
    expected = torch.autograd.grad(3 * reference, [hidden, weight])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(separate.sum(), reference, **tolerance)


def test_a_target_too_unlikely_for_fp32_has_its_exact_loss() -> None:
    hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[500.0, 0.0], [0.0, 0.0], [100.0, 1.0]])
    targets = torch.tensor([1, 1])
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert exact[0] == 500
    torch.testing.assert_close(token_nll(hidden, weight, targets), exact)
    assert nll_sum(hidden.requires_grad_(), weight, targets).item() == pytest.approx(exact.sum().item())
    assert token_nll(torch.tensor([[math.nan, 0.0]]), weight, targets[:1]).isnan().all()


def test_rule_1_a_micro_batch_without_a_target_gives_zero(tokens: Tensor) -> None:
    model = build()
    loss = model(tokens[:, :-1], torch.full_like(tokens[:, 1:], IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_token_never_attends_to_a_later_one(tokens: Tensor) -> None:
    model = build(num_kv_heads=2).eval()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 300
    with torch.no_grad():
        assert torch.equal(model.logits(tokens[:, :32])[:, :20], model.logits(changed[:, :32])[:, :20])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_cached_logits_equal_uncached_ones(num_kv_heads: int, tokens: Tensor) -> None:
    model = build(num_kv_heads=num_kv_heads).eval()
    inputs = tokens[:, :32]
    cache = KVCache.empty(model.config, 2, inputs.device, torch.float32)
    with torch.no_grad():
        pieces = [model.logits(piece, cache) for piece in (inputs[:, :7], inputs[:, 7:8], inputs[:, 8:9], inputs[:, 9:])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model.logits(inputs), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_memory_not_gradients(tokens: Tensor) -> None:
    plain, saving = build(), build()
    saving.gradient_checkpointing = True
    saved_bytes = []
    for model in (plain, saving):
        saved: dict[int, int] = {}

        def save(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        saved_bytes.append(sum(size for storage, size in saved.items() if storage not in weights))
        loss.backward()
    assert saved_bytes[1] < saved_bytes[0] / 2
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_block_compiles_to_one_graph_even_with_document_masking(tokens: Tensor) -> None:
    plain, compiled = (build(document_masking=True, num_kv_heads=2) for _ in range(2))
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="eager")
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:]
    inputs[:, 9] = plain.eot_id
    assert torch.equal(compiled(inputs, targets), plain(inputs, targets))


def test_rule_13_document_masking_leaks_nothing_and_restarts_positions() -> None:
    model = build(document_masking=True, num_kv_heads=2)
    model.eval()
    first, second = torch.randint(1, 300, (1, 12)), torch.randint(1, 300, (1, 11))
    eot = torch.zeros(1, 1, dtype=torch.long)
    together = torch.cat((eot, first, eot, second), dim=1)  # document A at 0..12, document B at 13..24
    embedded = model.embedding(together[:, :-1]).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    loss_of_b = token_loss(model, together)[:, 13:].sum()
    (gradient,) = torch.autograd.grad(loss_of_b, embedded)
    assert not gradient[:, :13].any()
    assert gradient[:, 13:].any()
    alone = build(document_masking=True, num_kv_heads=2).eval()
    torch.testing.assert_close(token_loss(alone, together[:, 13:]), token_loss(alone, together)[:, 13:], rtol=1e-5, atol=1e-5)


def token_loss(model: Transformer, tokens: Tensor) -> Tensor:
    """Differentiable NLL of each token given those before it; (B, T - 1)."""
    logits = F.linear(model.hidden(tokens[:, :-1]), model.head.weight[: model.config.vocab_size])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def test_rule_25_flops_count_every_matrix_product_once() -> None:
    model = build(num_kv_heads=2)
    config = model.config
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_layer = config.hidden_size * (heads + config.hidden_size + 3 * config.intermediate_size)
    matmul = config.num_layers * per_layer + config.padded_vocab_size * config.hidden_size
    assert model.flops_per_token() == 6 * matmul + 6 * config.num_layers * config.hidden_size * config.max_length
