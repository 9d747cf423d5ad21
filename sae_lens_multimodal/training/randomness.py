"""Everything random, in all the libraries that draw: seeded for a while, saved, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sae_lens.util import temporary_seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python; afterwards each draws on as if nothing had happened."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with temporary_seed(seed):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def random_state() -> dict[str, Any]:
    """Where every generator is: plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys)).clone(), int(position), int(has_gauss), float(gauss)),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator where `random_state` found it; those of devices that are not here are passed over."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
