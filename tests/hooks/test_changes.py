"""Changes of feature activations are what they say, and refuse numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.changes import Ablate, Add, Scale, Set, check_changes, feature_deltas, needs_encoding

WORD: Any = "8"
finite = st.floats(-1e4, 1e4, width=32)


@given(st.lists(finite, min_size=1, max_size=5), finite)
def test_deltas_lead_to_the_activation_that_is_meant(activations: list[float], strength: float) -> None:
    z = torch.tensor(activations, dtype=torch.float64)[:, None]

    def after(change: Any) -> torch.Tensor:
        return z + feature_deltas([change], z)

    assert torch.allclose(after(Set(strength)), torch.full_like(z, strength))
    assert torch.allclose(after(Add(strength)), z + strength)
    assert torch.allclose(after(Scale(strength)), z * strength, atol=1e-6)
    assert torch.equal(after(Ablate()), torch.zeros_like(z))


def test_nothing_is_exactly_nothing() -> None:
    z = torch.rand(100, 2) * 1e3
    assert torch.equal(feature_deltas([Add(0), Scale(1)], z), torch.zeros(100, 2))
    assert feature_deltas([], z).shape == (100, 0)


def test_only_adding_needs_no_activations() -> None:
    assert not needs_encoding([Add(1.0), Add(-2)])
    assert all(needs_encoding([Add(1.0), change]) for change in (Set(1.0), Scale(2.0), Ablate()))


@pytest.mark.parametrize(
    "bad", [Set(math.nan), Add(math.inf), Scale(-math.inf), Set(WORD), Add(True), 8.0, "ablate", Ablate]
)
def test_what_is_no_change_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="for feature 3; expected"):
        check_changes({3: bad})
