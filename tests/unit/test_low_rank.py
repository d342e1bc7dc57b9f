"""Arithmetic of weight changes against torch.linalg in float64, dense products, and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_diffusion.streams import stream
from lora_diffusion.tools.low_rank import (
    dare,
    effective_rank,
    frobenius_norm_of_factors,
    inner_product,
    khatri_rao_factors,
    kronecker_factors,
    rank_for_energy,
    relative_error,
    singular_values_of_factors,
    svd_of_factors,
    svd_of_matrix,
    ties,
    truncate,
)

FLOAT32 = 2e-6
"""What remains of an exact float64 result after its factors were rounded to float32, relative to its largest part."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return u.double() * s @ vh.double()


def assert_orthonormal(columns: Tensor) -> None:
    torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("m", "rank", "n"), [(24, 4, 40), (40, 4, 24), (6, 9, 40), (5, 9, 6), (7, 1, 7)])
def test_the_svd_of_factors_is_that_of_their_product(m: int, rank: int, n: int) -> None:
    up, down = randn(m, rank), randn(rank, n, seed=1)
    u, s, vh = svd_of_factors(up, down)
    dense = up.double() @ down.double()

    assert u.shape[1] == len(s) == vh.shape[0] == min(m, rank, n)
    torch.testing.assert_close(s, torch.linalg.svdvals(dense)[: len(s)], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product(u, s, vh), dense, rtol=0, atol=FLOAT32 * float(s[0]))
    assert_orthonormal(u)
    assert_orthonormal(vh.T)


@pytest.mark.parametrize(("m", "rank", "n"), [(24, 4, 40), (24, 9, 40), (40, 9, 24), (5, 9, 6)])
def test_singular_values_alone_are_those_of_the_product(m: int, rank: int, n: int) -> None:
    up, down = randn(m, rank), randn(rank, n, seed=1)
    s = singular_values_of_factors(up, down)
    expected = torch.linalg.svdvals(up.double() @ down.double())

    torch.testing.assert_close(s[:rank], expected[:rank], rtol=1e-9, atol=0)
    assert not s[rank:].any()


def test_a_change_of_nothing_has_singular_values_of_0() -> None:
    assert not singular_values_of_factors(torch.zeros(24, 2), randn(2, 40)).any()
    assert not singular_values_of_factors(torch.zeros(24, 9), randn(9, 40)).any()


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30), (1, 7), (7, 1)])
@pytest.mark.parametrize("rank", [None, 5])
def test_the_svd_of_a_matrix_is_that_of_torch(shape: tuple[int, int], rank: int | None) -> None:
    delta = randn(*shape)
    u, s, vh = svd_of_matrix(delta, rank)
    reference = torch.linalg.svd(delta.double(), full_matrices=False)
    count = min(rank or 99, *shape)

    assert u.shape == (shape[0], count) and vh.shape == (count, shape[1])
    torch.testing.assert_close(s, reference.S[:count], rtol=1e-10, atol=0)
    best = product(reference.U[:, :count], reference.S[:count], reference.Vh[:count])
    torch.testing.assert_close(product(u, s, vh), best, rtol=0, atol=FLOAT32 * float(s[0]))
    assert_orthonormal(u)
    assert_orthonormal(vh.T)


def test_small_singular_values_are_right_to_float32() -> None:
    u, v = torch.linalg.qr(randn(20, 20).double()).Q, torch.linalg.qr(randn(30, 20, seed=1).double()).Q
    true = torch.logspace(0, -6, 20, dtype=torch.float64)
    delta = (u * true @ v.T).float()
    expected = torch.linalg.svdvals(delta.double())  # the rounding of the matrix itself moves the small ones

    torch.testing.assert_close(svd_of_matrix(delta)[1], expected, rtol=0, atol=1e-9)


def test_matrices_without_full_rank_keep_their_shapes_and_get_zeros() -> None:
    u, s, vh = svd_of_matrix(randn(12, 3) @ randn(3, 20, seed=1), 6)
    assert (s > 0).tolist() == [True] * 3 + [False] * 3
    assert u.shape == (12, 6) and not vh[3:].any()

    u, s, vh = svd_of_matrix(torch.zeros(4, 9), 2)
    assert (u.shape, s.tolist(), vh.tolist()) == ((4, 2), [0.0, 0.0], [[0.0] * 9] * 2)
    assert all(torch.isfinite(t).all() for t in svd_of_factors(torch.zeros(4, 2), torch.zeros(2, 9)))


def test_the_sign_does_not_depend_on_the_way() -> None:
    up, down = randn(9, 3), randn(3, 14, seed=1)
    by_factors, by_matrix = svd_of_factors(up, down), svd_of_matrix(up @ down, 3)
    scaled = svd_of_factors(-up, -down)

    for one, other, third in zip(by_factors, by_matrix, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, third, rtol=1e-5, atol=1e-5)
    assert (by_factors[0].gather(0, by_factors[0].abs().argmax(0, keepdim=True)) > 0).all()


def test_truncated_factors_are_balanced_and_miss_what_the_error_says() -> None:
    delta = randn(20, 30)
    u, s, vh = svd_of_matrix(delta)
    up, down = truncate(u, s, vh, 7)
    norm = float(torch.linalg.vector_norm(delta.double()))
    missed = float(torch.linalg.vector_norm(delta.double() - up.double() @ down.double())) / norm

    assert (up.shape, down.shape) == ((20, 7), (7, 30)) and up.dtype == down.dtype == torch.float32
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    assert relative_error(s, 7, norm) == pytest.approx(missed, rel=1e-6)
    assert relative_error(s[:9], 7, norm) == pytest.approx(missed, rel=1e-6)
    assert relative_error(s, 20, norm) < 1e-7
    assert relative_error(torch.zeros(3), 1, 0.0) == 0.0


def test_the_rank_for_an_energy_is_the_smallest_that_holds_it() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1: shares 0.643, 0.929, 1
    assert [rank_for_energy(s, share) for share in (0.1, 0.64, 0.65, 0.92, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 1
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="energy"):
            rank_for_energy(s, share)


def test_the_effective_rank_counts_equal_values_and_is_between_for_others() -> None:
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    # Shares 1/2, 1/4, 1/4: entropy 1.5·ln 2.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_inner_products_and_norms_are_those_of_the_dense_changes() -> None:
    up1, down1, up2, down2 = randn(8, 2), randn(2, 11, seed=1), randn(8, 3, seed=2), randn(3, 11, seed=3)
    one, other = up1.double() @ down1.double(), up2.double() @ down2.double()

    assert inner_product(up1, down1, up2, down2) == pytest.approx(float((one * other).sum()), rel=1e-12)
    assert frobenius_norm_of_factors(up1, down1) == pytest.approx(float(one.norm()), rel=1e-12)


def test_ties_gives_the_numbers_worked_out_by_hand() -> None:
    a = torch.tensor([[4.0, -1.0, 3.0, 0.1]])
    b = torch.tensor([[2.0, -3.0, -5.0, 0.2]])
    # Half of each: a keeps 4 and 3, b keeps -3 and -5. Third place: 3 - 5 < 0, so only b counts there.
    assert ties([a, b], [1, 1], 0.5).tolist() == [[4.0, -3.0, -5.0, 0.0]]
    # All of each: means of (4, 2), (-1, -3), b alone, (0.1, 0.2).
    torch.testing.assert_close(ties([a, b], [1, 1], 1.0), torch.tensor([[3.0, -2.0, -5.0, 0.15]]))
    # b turned round: (4, -2) → 4, (-1, 3) → 3, (3, 5) → 4, (0.1, -0.2) → -0.2.
    torch.testing.assert_close(ties([a, b], [1, -1], 1.0), torch.tensor([[4.0, 3.0, 4.0, -0.2]]))
    # A draw changes nothing.
    assert ties([a, -a], [1, 1], 1.0).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("weight", [0.7, -1.5, 0.0])
def test_one_change_alone_is_scaled_by_its_weight(weight: float) -> None:
    delta = randn(6, 9)
    generator = stream(0, "dare", "m")
    torch.testing.assert_close(ties([delta], [weight], 1.0), weight * delta, rtol=0, atol=0)
    torch.testing.assert_close(dare([delta], [weight], 1.0, generator), weight * delta)


def test_ties_keeps_exactly_the_share_also_among_equal_entries() -> None:
    assert int((ties([torch.ones(10, 10)], [1], 0.3) != 0).sum()) == 30
    assert int((ties([randn(10, 10)], [1], 0.001) != 0).sum()) == 1


def test_dare_drops_and_rescales_without_changing_the_expectation() -> None:
    a, b = randn(4, 5), randn(4, 5, seed=1)
    once = dare([a], [2.0], 0.25, stream(0, "dare", "m"))
    kept = once != 0
    torch.testing.assert_close(once[kept], 8 * a[kept])

    num_seeds = 4000
    mean = sum(dare([a, b], [1.0, -0.5], 0.5, stream(seed, "dare", "m")) for seed in range(num_seeds)) / num_seeds
    assert isinstance(mean, Tensor)
    # An entry's standard deviation is √(a² + b²/4) < 3.5, so that of the mean is below 0.056; five of them.
    torch.testing.assert_close(mean, a - 0.5 * b, rtol=0, atol=0.28)


def test_dare_is_a_function_of_its_generator_and_masks_differ_between_changes() -> None:
    ones = torch.ones(20, 20)
    one, again = (dare([ones, -ones], [1, 1], 0.5, stream(3, "dare", "m")) for _ in range(2))
    assert torch.equal(one, again)
    assert set(one.unique().tolist()) == {-2.0, 0.0, 2.0}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        ties([torch.ones(2, 2)], [1], density)
    with pytest.raises(ValueError, match="density"):
        dare([torch.ones(2, 2)], [1], density, stream(0, "dare"))


def test_changes_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        ties([torch.ones(2, 2), torch.ones(1, 2)], [1, 1], 1.0)


def test_khatri_rao_factors_give_the_hadamard_product() -> None:
    w1a, w1b, w2a, w2b = randn(7, 2), randn(2, 10, seed=1), randn(7, 3, seed=2), randn(3, 10, seed=3)
    up, down = khatri_rao_factors(w1a, w1b, w2a, w2b)
    dense = (w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double())

    assert (up.shape, down.shape) == ((7, 6), (6, 10))
    torch.testing.assert_close(up.double() @ down.double(), dense, rtol=0, atol=FLOAT32 * float(dense.abs().max()))


@pytest.mark.parametrize("rank1", [4, 2])
def test_kronecker_factors_give_the_kronecker_product_with_no_rank_to_spare(rank1: int) -> None:
    w1 = randn(4, rank1) @ randn(rank1, 5, seed=4)
    w2a, w2b = randn(6, 3, seed=1), randn(3, 8, seed=2)
    up, down = kronecker_factors(w1, w2a, w2b)
    dense = torch.kron(w1.double(), w2a.double() @ w2b.double())

    assert (up.shape, down.shape) == ((24, 3 * rank1), (3 * rank1, 40))
    torch.testing.assert_close(up.double() @ down.double(), dense, rtol=0, atol=4 * FLOAT32 * float(dense.abs().max()))


def test_a_kronecker_product_with_zero_has_factors() -> None:
    up, down = kronecker_factors(torch.zeros(2, 3), randn(4, 2), randn(2, 5))
    assert (up.shape, down.shape) == ((8, 2), (2, 15))
    assert not (up @ down).any()
