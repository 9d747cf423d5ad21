"""Reading SAEs that SAE-Lens saved, concept dictionaries among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import SAE
from safetensors import SafetensorError

from sae_lens_multimodal.errors import StoreError
from sae_lens_multimodal.hooks import concept_sae as concept_sae  # so that SAE-Lens can load saved concept dictionaries


def load_sae(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """Read an SAE that SAE-Lens saved; concept dictionaries are SAEs as well.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; expected one that SAE-Lens saved (cfg.json and weights).")
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device=device)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{folder} cannot be read as a SAE that SAE-Lens saved: {error}") from error
    return sae
