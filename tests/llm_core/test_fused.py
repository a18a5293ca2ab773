"""The hand-written gradients are those of the plain formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_core.fused import plain_rms_norm, plain_rotate, plain_swiglu, rms_norm, rotate, swiglu

HEADS, HEAD_DIM = (3, 1, 1), 8  # queries, keys, values


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of its weighted sum with respect to each input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    (result * weights).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype == reference.dtype
        tolerance = 2e-2 if mine.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


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


def test_rotation_turns_queries_and_keys_and_leaves_the_values_alone(x: Tensor) -> None:
    angles = torch.rand(x.shape[1], 1, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat(rotate(x.unflatten(-1, (sum(HEADS), HEAD_DIM)), cos, sin, HEADS), dim=2)

    def plain(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (sum(HEADS), HEAD_DIM)).split(HEADS, dim=2)
        return torch.cat((plain_rotate(q, cos, sin), plain_rotate(k, cos, sin), v), dim=2)

    check_same(gradients(by_hand, x), gradients(plain, x))


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    gate_up = torch.randn(64, 256, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.untyped_storage().data_ptr()), lambda _: None
    ):
        swiglu(gate_up)
    assert set(kept) == {gate_up.untyped_storage().data_ptr()}


def test_a_compiled_model_sees_the_plain_formulas(x: Tensor) -> None:
    traced: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(swiglu, fullgraph=True, backend=look)
    assert torch.equal(compiled(x), plain_swiglu(x))
    assert any("silu" in target for target in traced), traced
    assert not any("autograd" in target for target in traced), traced
