"""The model card that lies beside a saved SAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD = """---
library_name: saelens
tags:
- sparse-autoencoder
- vision-language-model
- sae-lens-multimodal
---

# {architecture} SAE with {d_sae} features at {hook_name} of {model_name}

Trained with [SAE-Lens](https://github.com/jbloomAus/SAELens) and sae-lens-multimodal on image and text tokens.

| | |
|---|---|
"""
_LOADING = """
## Use

```python
from sae_lens import SAE
from sae_lens_multimodal import load_model, read_activations

model = load_model({model_name!r})
sae = SAE.load_from_disk("FOLDER")  # or SAE.from_pretrained("REPOSITORY", "SAE_ID") once it is uploaded
batch = model.encode([[{{"role": "user", "content": [{{"type": "text", "text": "Hello"}}]}}]])
features = sae.encode(read_activations(model, batch, {hook_name!r})[{hook_name!r}])
```
"""


def model_card(settings: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """What a saved SAE is, how it was made and how well it does, as Markdown.

    Args:
        settings: of the run, as `to_dict` gives them.
        origin: what this package writes into the SAE's metadata.
    """
    sae = settings["sae"]
    names = {
        "architecture": sae["architecture"],
        "d_sae": sae["d_sae"],
        "hook_name": settings["hook_name"],
        "model_name": settings["model_name"],
    }
    facts = {
        "model": names["model_name"],
        "hook": names["hook_name"],
        "width": f"{sae['d_in']} to {sae['d_sae']} features",
        "dataset": origin.get("dataset_path"),
        "token shares": origin.get("token_shares") or "as they come",
        "image tokens": origin.get("image_tokens"),
        "tokens trained on": ", ".join(f"{count:,} {name}" for name, count in origin.get("tokens_seen", {}).items()),
        "seed": settings["seed"],
        "versions": ", ".join(f"{name} {number}" for name, number in origin.get("versions", {}).items()),
    }
    rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in facts.items() if value not in (None, ""))
    return _HEAD.format(**names) + rows + _metrics(origin) + _LOADING.format(**names)


def _metrics(origin: Mapping[str, Any]) -> str:
    metrics = origin.get("metrics") or {}
    names = [
        name
        for name in next(iter(metrics.values()), {})
        if any(values.get(name) is not None for values in metrics.values())
    ]
    if not names:
        return ""
    head = f"\n## Reconstruction, on {origin.get('evaluated_on', 'held-out prompts')}\n\n"
    table = f"| | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}\n"
    lines = (
        f"| {name.replace('_', ' ')} | {' | '.join(_cell(values.get(name)) for values in metrics.values())} |\n"
        for name in names
    )
    return head + table + "".join(lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
