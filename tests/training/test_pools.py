"""Pools: exact counts, nothing twice, everything with the same chance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.training.pools import Pool, share_counts


def make_pool(capacity: int, seed: int = 0) -> Pool:
    return Pool(capacity, torch.Generator().manual_seed(seed), torch.device("cpu"))


def numbered(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that hold their own number, labelled with its parity."""
    numbers = torch.arange(first, first + count)
    return numbers[:, None].float(), (numbers % 2).to(torch.int8)


@given(st.floats(0, 1), st.integers(1, 5000))
def test_counts_add_up_and_are_as_near_as_can_be(share: float, batch: int) -> None:
    shares = {"image": share, "text": 1 - share}
    counts = share_counts(shares, batch)
    assert sum(counts.values()) == batch
    assert all(abs(count - shares[name] * batch) < 1 for name, count in counts.items())


@given(st.integers(0, 100), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_what_goes_in_comes_out_once_with_its_label(seed: int, sizes: list[int]) -> None:
    pool = make_pool(20, seed)
    first = 0
    for size in sizes:
        pool.add(*numbered(first, size))
        first += size
    assert pool.count == min(20, first)
    assert pool.dropped == max(0, first - 20)
    if pool.count:
        rows, labels = pool.take(pool.count)
        numbers = rows[:, 0].long()
        assert len(set(numbers.tolist())) == min(20, first)
        assert torch.equal(labels, (numbers % 2).to(torch.int8))
    assert pool.count == 0


def test_the_order_is_not_that_of_arrival() -> None:
    pool = make_pool(100)
    pool.add(*numbered(0, 100))
    rows, _ = pool.take(100)
    assert not torch.equal(rows[:, 0], torch.arange(100.0))


def test_tokens_that_stay_are_not_handed_out_again_after_a_refill() -> None:
    pool = make_pool(10)
    pool.add(*numbered(0, 10))
    before = pool.take(6)[0][:, 0].tolist()
    pool.begin_refill()
    pool.add(*numbered(10, 6))
    after = pool.take(10)[0][:, 0].tolist()
    assert sorted(before + after) == list(range(16))


def test_in_surplus_early_and_late_tokens_have_the_same_chance() -> None:
    kept = torch.zeros(200)
    for seed in range(300):
        pool = make_pool(20, seed)
        pool.begin_refill()
        for first in range(0, 200, 25):
            pool.add(*numbered(first, 25))
        kept[pool.take(20)[0][:, 0].long()] += 1
    # 300 draws with chance 0.1 each: quarters of 50 tokens expect 1500, standard deviation below 40
    quarters = kept.reshape(4, 50).sum(1)
    assert (quarters - 1500).abs().max() < 200


def test_the_same_seed_gives_the_same_order() -> None:
    drawn = []
    for _ in range(2):
        pool = make_pool(10, seed=3)
        pool.add(*numbered(0, 25))
        drawn.append(pool.take(10)[0])
    assert torch.equal(*drawn)


def test_more_than_there_is_cannot_be_taken() -> None:
    pool = make_pool(4)
    with pytest.raises(IndexError, match="0 tokens; 1"):
        pool.take(1)


@given(st.integers(0, 50), st.lists(st.integers(1, 15), min_size=2, max_size=8))
def test_with_surplus_kept_nothing_is_lost_or_given_twice(seed: int, sizes: list[int]) -> None:
    pool = Pool(20, torch.Generator().manual_seed(seed), torch.device("cpu"), keep_surplus=True)
    first, given = 0, []
    for size in sizes:
        pool.begin_refill()
        while not pool.is_full:
            pool.add(*numbered(first, size))
            first += size
        rows, labels = pool.take(12)
        assert torch.equal(labels, (rows[:, 0].long() % 2).to(torch.int8))
        given += rows[:, 0].long().tolist()
    assert pool.dropped == 0
    pool.begin_refill()
    while pool.count:
        given += pool.take(pool.count)[0][:, 0].long().tolist()
        pool.begin_refill()
    assert sorted(given) == list(range(first))


def test_kept_surplus_is_part_of_a_snapshot() -> None:
    pool, other = (
        Pool(10, torch.Generator().manual_seed(seed), torch.device("cpu"), keep_surplus=True) for seed in (0, 1)
    )
    pool.add(*numbered(0, 16))
    other.restore(pool.snapshot())
    pool._generator.manual_seed(5)
    other._generator.manual_seed(5)
    for one in (pool, other):
        one.take(8)
        one.begin_refill()
    assert pool.count == other.count == 8
    assert torch.equal(pool.take(8)[0], other.take(8)[0])
