"""An SAE at a few tokens of a clean and a corrupted run: what its features there bring back, and what they hold up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import SelectionError
from sae_lens_multimodal.hooks.attribute import chosen_tokens, encoded
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import decoder_directions, encode_tokens
from sae_lens_multimodal.hooks.trace_findings import Reference
from sae_lens_multimodal.hooks.trace_parts import added_by, decoded
from sae_lens_multimodal.hooks.trace_plan import Plan
from sae_lens_multimodal.hooks.trace_run import KeptKeys, Recording, value_of


@dataclass(frozen=True, kw_only=True)
class Means:
    """What is usual at the corresponding tokens of other prompts."""

    z: Float[Tensor, " d_sae"]
    value: Float[Tensor, " d_in"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: VisionLanguageModel, site: Site, reference: Reference) -> Means:
        """Read the SAE there, each token counted once.

        Raises:
            SelectionError: there are no prompts, or it is not clear which of their tokens are meant.
        """
        if not reference.prompts:
            raise SelectionError("Got no reference prompts; expected at least one to take the mean of.")
        tokens = reference.tokens
        if tokens is None:
            tokens = [place - site.plan.prompt.layout.n_tokens for place in site.places.tolist()]
            if max(tokens) >= 0:
                raise SelectionError(
                    "The hot cell is at a token of the answer, which reference prompts have not; say which of their "
                    "tokens correspond to it: Reference(..., tokens=...)."
                )
        z, value, count = torch.zeros(()), torch.zeros(()), 0
        for prompt in reference.prompts:
            batch = encoded(model, prompt)
            own = read_activations(model, batch, site.name)[site.name].flatten(2)
            own = own[chosen_tokens(model, batch, batch, tokens).to(own.device)]
            z = z + encode_tokens(site.sae, own).float().sum(0).cpu()
            value, count = value + own.float().sum(0).cpu(), count + len(own)
        return cls(z=(z / count).to(site.z_clean), value=(value / count).to(site.clean))


@dataclass(frozen=True, kw_only=True)
class Site:
    """The SAE at the tokens of the hot cell, in both runs, and ways to run on from there."""

    plan: Plan
    sae: SAE[Any]
    name: str
    places: Tensor
    clean: Float[Tensor, "places d_in"]
    corrupted: Float[Tensor, "places d_in"]
    z_clean: Float[Tensor, "places d_sae"]
    z_corrupted: Float[Tensor, "places d_sae"]
    clean_keys: KeptKeys | None
    tokens_per_pass: int

    @classmethod
    def of(cls, plan: Plan, sae: SAE[Any], name: str, positions: Sequence[int], tokens_per_pass: int | None) -> Site:
        """Read the SAE at some tokens of both runs."""
        point = plan.runner.point(name)
        places = torch.tensor(positions)
        one, two = (value_of(run.values[name], point)[0][places] for run in (plan.clean, plan.corrupted))
        return cls(
            plan=plan,
            sae=sae,
            name=name,
            places=places,
            clean=one,
            corrupted=two,
            z_clean=encode_tokens(sae, one).detach(),
            z_corrupted=encode_tokens(sae, two).detach(),
            clean_keys=plan.runner.keys_of(plan.clean),
            tokens_per_pass=tokens_per_pass or plan.tokens_per_pass,
        )

    @property
    def before(self) -> float:
        """The metric in the clean run."""
        return self.plan.before[self.plan.metric]

    @property
    def after(self) -> float:
        """The metric in the corrupted run."""
        return self.plan.after[self.plan.metric]

    def active(self) -> list[int]:
        """Features that are active here in either run."""
        found = ((self.z_clean != 0) | (self.z_corrupted != 0)).any(0).nonzero()[:, 0]
        return [int(one) for one in found]

    def restored(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share that each set of features brings back in the corrupted run."""
        found = self._run(self.plan.corrupted, self.plan.keys, [self._difference(one) for one in sets])
        return [(value - self.after) / (self.before - self.after) for value in found]

    def exchanged(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share of the answer that is lost when each set's corrupted activations are put into the clean run."""
        return self._lost([-self._difference(one) for one in sets])

    def ablated(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The share of the answer that is lost without each set of features in the clean run."""
        return self._lost([-self._added(self.clean, self.z_clean, one) for one in sets])

    def mean_ablated(self, sets: Sequence[Sequence[int]], means: Means) -> list[float]:
        """The share of the answer that is lost when each set's means are put into the clean run."""
        return self._lost([self._added(self.clean, means.z - self.z_clean, one) for one in sets])

    def without_value(self, means: Means) -> float:
        """The share of the answer that is lost when the mean of the whole value is put into the clean run."""
        return self._lost([means.value - self.clean])[0]

    def moved_by(self, means: Means) -> list[int]:
        """Features whose activation in the clean run is not their mean."""
        return [int(one) for one in (self.z_clean != means.z).any(0).nonzero()[:, 0]]

    def all_features(self) -> Tensor:
        """What all features together add to the value, clean instead of corrupted."""
        return added_by(self.sae, self.clean, None) - added_by(self.sae, self.corrupted, None)

    def weight(self) -> Float[Tensor, " d_sae"]:
        """How much each feature's part in the value differs between the runs."""
        norms = decoder_directions(self.sae, range(self.sae.cfg.d_sae)).norm(dim=-1)
        return ((self.z_clean - self.z_corrupted).abs().sum(0) * norms.to(self.z_clean)).detach()

    def share_of(self, added: Tensor) -> float:
        """The share that something added to the corrupted value brings back."""
        value = self._run(self.plan.corrupted, self.plan.keys, [added])[0]
        return (value - self.after) / (self.before - self.after)

    def _lost(self, added: Sequence[Tensor]) -> list[float]:
        """The share of the answer that is lost when something is added to the clean value, for each."""
        found = self._run(self.plan.clean, self.clean_keys, added)
        return [(self.before - value) / (self.before - self.after) for value in found]

    def _difference(self, features: Sequence[int]) -> Tensor:
        """What features add in the clean run, less what they add in the corrupted one."""
        clean = self._added(self.clean, self.z_clean, features)
        return clean - self._added(self.corrupted, self.z_corrupted, features)

    def _added(self, acts: Tensor, z: Tensor, features: Sequence[int]) -> Tensor:
        chosen = list(features)
        return decoded(self.sae, acts, z[:, chosen], chosen).detach()

    @torch.no_grad()
    def _run(self, recording: Recording, keys: KeptKeys | None, added: Sequence[Tensor]) -> list[float]:
        """The metric of a run in which something is added to the hook's value at the cell's tokens, for each."""
        runner, point = self.plan.runner, self.plan.runner.point(self.name)
        layer = int(point.layer or 0)
        start = min(int(self.places.min()), self.plan.n_tokens - runner.keep_logits) if keys is not None else 0
        step = max(1, self.tokens_per_pass // self.plan.row_cost(start))
        found: list[float] = []
        for at in range(0, len(added), step):
            some = torch.stack(list(added[at : at + step]))

            def change(value: Tensor, some: Tensor = some) -> Tensor:
                changed = value.clone()
                changed[:, self.places - start] += some.reshape(len(some), len(self.places), -1).to(value)
                return changed

            hidden = recording.calls[layer].hidden[:, start:].expand(len(some), -1, -1)
            logits = runner.go_on(recording, layer, hidden, keys=keys, changes={self.name: change})
            found += self.plan.measure(logits)[self.plan.metric].tolist()
        return found
