"""The closed form, by hand and against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

from sae_lens_multimodal.editing.update import alike, rank_one_update, rank_one_updates, whitened
from sae_lens_multimodal.errors import EditError

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_published_formula_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    key, wanted = torch.tensor([3.0, 4.0]), torch.tensor([13.0, 9.0])
    # W k = (3, 8), so the change is (10, 1); λ + ‖k‖² = 5 + 25
    left, right = rank_one_update(wanted - weight @ key, key, damping=5.0)
    expected = torch.tensor([[10 * 3 / 30, 10 * 4 / 30], [1 * 3 / 30, 1 * 4 / 30]])
    torch.testing.assert_close(left.outer(right), expected)


def test_without_damping_the_key_gets_its_value_and_the_rank_is_one() -> None:
    weight, key, wanted = random(6, 9), random(9), random(6)
    for ordinary in (None, random(20, 9), random(4, 9)):
        left, right = rank_one_update(wanted - weight @ key, key, ordinary=ordinary)
        torch.testing.assert_close((weight + left.outer(right)) @ key, wanted, rtol=1e-5, atol=1e-5)
        values = torch.linalg.svdvals(left.outer(right))
        assert values[1] < 1e-5 * values[0]


def test_damping_gives_its_share() -> None:
    change, key = random(6), random(9)
    update = rank_one_update(change, key, damping=0.25 * float(key @ key))
    torch.testing.assert_close(update.left.outer(update.right) @ key, change / 1.25)
    torch.testing.assert_close(key[None] @ update.right, torch.tensor([1 / 1.25]))


@pytest.mark.parametrize("n", [3, 40])
def test_whitening_agrees_with_the_dense_inverse(n: int) -> None:
    key, ordinary, ridge = random(9), random(n, 9), 0.05
    covariance = ordinary.double().T @ ordinary.double() / n
    dense = torch.linalg.inv(covariance + ridge * covariance.diagonal().mean() * torch.eye(9)) @ key.double()
    dense *= (key.double() @ key.double()) / (dense @ key.double())
    torch.testing.assert_close(whitened(key, ordinary, ridge), dense)


def test_ordinary_keys_read_less_of_the_change() -> None:
    shared = 3 * random(64)
    ordinary, key = shared + random(50, 64), shared + random(64)
    plain, turned = (rank_one_update(random(6), key, ordinary=some) for some in (None, ordinary))
    assert (ordinary @ plain.right).abs().mean() > 0.5
    assert (ordinary @ turned.right).abs().mean() < 0.1


def test_own_keys_add_their_covariance_as_the_dense_inverse_says() -> None:
    own, ordinary, ridge = random(7, 9), random(20, 9), 0.3
    key = own.mean(0)
    c = ordinary.double().T @ ordinary.double() / 20 + torch.cov(own.double().T, correction=0)
    dense = torch.linalg.solve(c + ridge * c.diagonal().mean() * torch.eye(9), key.double())
    dense *= (key.double() @ key.double()) / (dense @ key.double())
    torch.testing.assert_close(whitened(key, ordinary, ridge, own=own), dense)


def test_several_keys_each_get_their_own_change_alone() -> None:
    keys, changes = random(3, 9), random(3, 6)
    for ordinary in (None, random(20, 9), random(4, 9)):
        updates = rank_one_updates(changes, keys, ordinary=ordinary)
        whole = sum((one.left.outer(one.right) for one in updates), torch.zeros(6, 9))
        torch.testing.assert_close(whole @ keys.T, changes.T, rtol=1e-4, atol=1e-4)
    # without ordinary keys this is ridge regression: the damped least change of the weight
    damping = 0.7
    updates = rank_one_updates(changes, keys, damping=damping)
    whole = sum((one.left.outer(one.right) for one in updates), torch.zeros(6, 9))
    dense = changes.T @ torch.linalg.inv(keys @ keys.T + damping * torch.eye(3)) @ keys
    torch.testing.assert_close(whole, dense, rtol=1e-4, atol=1e-4)


def test_directions_of_several_keys_agree_with_the_dense_inverse() -> None:
    keys, ordinary, own, ridge = random(2, 9), random(20, 9), random(7, 2, 9), 0.1
    spread = [torch.cov(own[:, one].double().T, correction=0) for one in range(2)]
    c = ordinary.double().T @ ordinary.double() / 20 + spread[0] + spread[1]
    solved = torch.linalg.solve(c + ridge * c.diagonal().mean() * torch.eye(9), keys.double().T).T
    dense = torch.linalg.inv(solved @ keys.double().T) @ solved
    updates = rank_one_updates(torch.eye(2), keys, ordinary=ordinary, own=own, ridge=ridge)
    torch.testing.assert_close(torch.stack([one.right for one in updates]), dense.float(), rtol=1e-4, atol=1e-5)


def test_samples_count_alike_whatever_their_size() -> None:
    few, many, key = random(3, 9), random(30, 9), random(9)
    mean = (few.double().T @ few.double() / 3 + many.double().T @ many.double() / 30) / 2
    dense = torch.linalg.solve(mean + 0.2 * mean.diagonal().mean() * torch.eye(9), key.double())
    dense *= (key.double() @ key.double()) / (dense @ key.double())
    torch.testing.assert_close(whitened(key, alike([few, many]), 0.2), dense, rtol=1e-5, atol=1e-6)


def test_keys_that_are_alike_are_refused() -> None:
    key = torch.tensor([1.0, 2.0, 0.0])
    with pytest.raises(EditError, match="no update gives each its own value"):
        rank_one_updates(torch.eye(2, 4), torch.stack([key, key]))
