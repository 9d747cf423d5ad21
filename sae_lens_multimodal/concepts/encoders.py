"""Vectors of a text's tokens, by any encoder of transformers: what BERTScore compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.errors import ConfigError, ModelLoadError

PUBLISHED_LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-multilingual-cased": 9,
    "distilbert-base-uncased": 5,
    "roberta-base": 10,
    "roberta-large": 17,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
}
"""The layer that the published BERTScore takes of an encoder, by the last part of its name."""


class TokenEncoder:
    """A text encoder such as BERT.

    Args:
        model: any transformers model that returns hidden states.
        tokenizer: its tokenizer.
        name: recorded with the results.
        layer: which hidden states, as transformers counts them: 0 the embeddings, -1 the last.
        batch_size: texts at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,  # noqa: ANN401
        *,
        name: str,
        layer: int = -1,
        batch_size: int = 32,
    ) -> None:
        self.model: Any = model.eval()
        self.tokenizer, self.name, self.layer, self.batch_size = tokenizer, name, layer, batch_size

    @classmethod
    def load(
        cls, name: str | Path, *, layer: int | None = None, device: str = "cpu", batch_size: int = 32
    ) -> TokenEncoder:
        """Load a checkpoint by hub name or folder.

        Args:
            name: hub name or folder.
            layer: which hidden states; None for the published BERTScore's choice where it has one, else the last.
            device: where to.
            batch_size: texts at a time.

        Raises:
            ModelLoadError: it does not load.
            ConfigError: it has no such layer.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(str(name)).to(device)
            tokenizer = AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError, KeyError, ImportError) as error:
            line = " ".join(str(error).split())
            raise ModelLoadError(
                f"{name} does not load ({line[:300]}); expected a text encoder such as BERT."
            ) from error
        if layer is None:
            layer = PUBLISHED_LAYERS.get(Path(name).name.lower(), -1)
        depth = int(model.config.num_hidden_layers) + 1
        if not -depth <= layer < depth:
            raise ConfigError(f"Got layer={layer} of {name}; expected {-depth} to {depth - 1}, with 0 the embeddings.")
        return cls(model, tokenizer, name=str(name), layer=layer, batch_size=batch_size)

    @torch.no_grad()
    def tokens(self, texts: Sequence[str]) -> list[Float[Tensor, "tokens d"]]:
        """Give each text's tokens as vectors of length 1; control tokens are left out."""
        device = next(self.model.parameters()).device
        found: list[Tensor] = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            # Padding on the right moves no token from its position, whatever the tokenizer's own side is.
            batch = self.tokenizer(
                part,
                padding=True,
                padding_side="right",
                truncation=True,
                return_tensors="pt",
                return_special_tokens_mask=True,
            )
            special = batch.pop("special_tokens_mask").bool()
            output = self.model(**batch.to(device), output_hidden_states=True)
            values = torch.nn.functional.normalize(output.hidden_states[self.layer].float(), dim=-1).cpu()
            kept = batch["attention_mask"].bool().cpu() & ~special
            found += [row[chosen] for row, chosen in zip(values, kept, strict=True)]
        return found
