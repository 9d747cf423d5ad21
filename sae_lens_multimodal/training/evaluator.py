"""What a run measures of its SAE while it trains and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_multimodal.hooks.saes import inference_sae
from sae_lens_multimodal.training.evaluate import measure_several
from sae_lens_multimodal.training.metrics import ModalityMetrics, ReconstructionTotals, as_report
from sae_lens_multimodal.training.splice import by_sae, splice_losses
from sae_lens_multimodal.training.store import MultimodalActivationsStore
from sae_lens_multimodal.training.trainer import BatchProvider


@dataclass
class MultimodalSAEEvaluator:
    """Reconstruction metrics of each modality on held-out prompts."""

    store: MultimodalActivationsStore

    def __call__(
        self,
        sae: TrainingSAE[Any],
        data_provider: BatchProvider,
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        """The metrics by name, as SAE-Lens logs them during training."""
        with data_provider.paused():
            metrics = self.measure(inference_sae(sae), activation_scaler)
        return {
            f"evaluation/{metric}_{modality}": value
            for modality, values in as_report(metrics).items()
            for metric, value in values.items()
            if value is not None
        }

    def measure(self, sae: SAE[Any], scaler: ActivationScaler | None = None) -> dict[str, ModalityMetrics]:
        """Metrics of each modality of an SAE that takes activations as `scaler` makes them."""
        return {name: total.metrics() for name, total in self.totals(sae, scaler).items()}

    def totals(self, sae: SAE[Any], scaler: ActivationScaler | None = None) -> dict[str, ReconstructionTotals]:
        """The sums from which `measure`'s metrics follow."""
        return measure_several({"sae": sae}, self.store.held_out_tokens(), scaler)["sae"]

    def losses(self, sae: SAE[Any], totals: Mapping[str, ReconstructionTotals]) -> dict[str, dict[str, Any]]:
        """Cross-entropy and KL with an SAE's reconstruction spliced in; see `splice_losses`."""
        return splice_losses(
            self.store.model,
            {"sae": by_sae(sae)},
            {name: total.mean for name, total in totals.items() if total.mean is not None},
            (batch.batch for batch in self.store.held_out_batches()),
            hook_name=self.store.hook_name,
            choice=self.store.choice,
        )
