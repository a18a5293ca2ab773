"""Muon."""

import pytest
import torch
from torch import Tensor, nn

from llm_core.training.muon import Muon, orthogonalize

Groups = list[dict[str, object]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer(groups: Groups, dtype: torch.dtype = torch.float32, weight_decay: float = 0.0) -> Muon:
    return Muon(groups, momentum=0.9, weight_decay=weight_decay, dtype=dtype, lr=0.1)


def walk(muon: Muon, gradients: list[dict[nn.Parameter, Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in step.items():
            parameter.grad = gradient.clone()
        muon.step()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_all_singular_values_move_close_to_one_at_any_scale(shape: tuple[int, int], scale: float) -> None:
    matrix = random(*shape) * scale
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    orthogonalize([matrix], torch.float32)
    singular = torch.linalg.svdvals(matrix)
    assert singular.min() > 0.8 and singular.max() < 1.2
    assert (matrix - u @ v).abs().max() < 0.1, "the directions stay"


def test_a_matrix_and_a_transposed_one_are_orthogonalized_together_as_alone() -> None:
    together = [random(24, 40), random(40, 24, seed=1)]
    alone = [matrix.clone() for matrix in together]
    orthogonalize(together, torch.float32)
    for matrix, expected in zip(together, alone, strict=True):
        orthogonalize([expected], torch.float32)
        torch.testing.assert_close(matrix, expected)


def test_matrices_that_share_a_parameter_move_as_if_they_were_alone() -> None:
    start, rows = random(40, 24), [16, 16, 8]
    stacked = nn.Parameter(start.clone())
    alone = [nn.Parameter(part.clone()) for part in start.split(rows)]
    gradients = [random(40, 24, seed=seed) for seed in (1, 2, 3)]
    walk(optimizer([{"params": [stacked], "rows": rows}], weight_decay=0.1), [{stacked: gradient} for gradient in gradients])
    walk(
        optimizer([{"params": alone}], weight_decay=0.1),
        [dict(zip(alone, gradient.split(rows), strict=True)) for gradient in gradients],
    )
    torch.testing.assert_close(stacked.data, torch.cat([parameter.data for parameter in alone]))


def test_an_update_has_the_root_mean_square_of_adamws_whatever_the_shape_and_the_gradient() -> None:
    for shape, scale in (((24, 40), 1e-6), ((40, 24), 1.0), ((8, 64), 1e6)):
        parameter = nn.Parameter(torch.zeros(shape))
        walk(optimizer([{"params": [parameter]}]), [{parameter: random(*shape) * scale}])
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=1e-4)


def test_each_row_moves_by_the_same_mean_size() -> None:
    # Rows that repeat one another share one direction, so an orthogonal update moves each of them less.
    gradients = [random(16, 64, seed=seed) for seed in range(60)]
    for gradient in gradients:
        gradient[8:] = gradient[8]
    parameter = nn.Parameter(torch.zeros(16, 64))
    muon, moved = optimizer([{"params": [parameter]}]), torch.zeros(16)
    for gradient in gradients:
        before = parameter.data.clone()
        walk(muon, [{parameter: gradient}])
        moved += (parameter.data - before).norm(dim=1)
    assert moved.max() < 1.1 * moved.min()


def test_a_gradient_of_zero_moves_nothing() -> None:
    parameter = nn.Parameter(random(8, 16))
    before = parameter.data.clone()
    walk(optimizer([{"params": [parameter]}]), [{parameter: torch.zeros(8, 16)}])
    assert torch.equal(parameter.data, before)


def test_bf16_products_are_close_to_those_in_fp32() -> None:
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(24, 40))
        walk(optimizer([{"params": [parameter]}], dtype), [{parameter: random(24, 40)}])
        moved.append(parameter.data)
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()


def test_a_restored_state_continues_to_the_same_bits() -> None:
    gradients = [random(24, 40, seed=seed) for seed in range(4)]
    whole, first = (nn.Parameter(random(24, 40, seed=9)) for _ in range(2))
    walk(optimizer([{"params": [whole]}]), [{whole: gradient} for gradient in gradients])
    muon = optimizer([{"params": [first]}])
    walk(muon, [{first: gradient} for gradient in gradients[:2]])
    second = nn.Parameter(first.data.clone())
    restored = optimizer([{"params": [second]}])
    restored.load_state_dict(muon.state_dict())
    walk(restored, [{second: gradient} for gradient in gradients[2:]])
    assert torch.equal(second.data, whole.data)
