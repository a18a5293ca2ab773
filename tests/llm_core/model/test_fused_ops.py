"""The hand-written gradients equal those of the plain formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_core.model.fused_ops import apply_rotary_emb, plain_rms_norm, plain_rotary_emb, plain_swiglu, rms_norm, swiglu

HEADS, HEAD_DIM = (3, 1, 1), 8  # queries, keys, values


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of its weighted sum with respect to each input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    (result * weights).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, reference in zip(actual, expected, strict=True):
        assert tensor.dtype == reference.dtype
        tolerance = 2e-2 if tensor.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(tensor, reference, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def x(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(2, 7, sum(HEADS) * HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(request.param)


def test_rms_norm(x: Tensor) -> None:
    weight = torch.linspace(0.5, 1.5, x.shape[-1])
    check_same(
        gradients(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight),
        gradients(lambda x, weight: plain_rms_norm(x, weight, 1e-5), x, weight),
    )


def test_swiglu(x: Tensor) -> None:
    check_same(gradients(swiglu, x), gradients(plain_swiglu, x))


def test_rotary_embedding_rotates_queries_and_keys_but_not_values(x: Tensor) -> None:
    angles = torch.rand(x.shape[1], 1, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()

    def fused(x: Tensor) -> Tensor:
        return torch.cat(apply_rotary_emb(x.unflatten(-1, (sum(HEADS), HEAD_DIM)), cos, sin, HEADS), dim=2)

    def plain(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (sum(HEADS), HEAD_DIM)).split(HEADS, dim=2)
        return torch.cat((plain_rotary_emb(q, cos, sin), plain_rotary_emb(k, cos, sin), v), dim=2)

    check_same(gradients(fused, x), gradients(plain, x))


def test_only_the_input_is_saved_for_the_backward_pass() -> None:
    gate_up = torch.randn(64, 256, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.untyped_storage().data_ptr()), lambda _: None
    ):
        swiglu(gate_up)
    assert set(saved) == {gate_up.untyped_storage().data_ptr()}


def test_a_compiled_model_gets_the_plain_formulas(x: Tensor) -> None:
    traced: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(swiglu, fullgraph=True, backend=record)
    assert torch.equal(compiled(x), plain_swiglu(x))
    assert any("silu" in target for target in traced), traced
    assert not any("autograd" in target for target in traced), traced
