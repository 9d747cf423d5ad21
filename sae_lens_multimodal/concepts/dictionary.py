"""A concept dictionary: directions that states are made of, found by any method, saved as an SAE-Lens SAE."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_multimodal.concepts.decompose import Method, SAEFactors, check_finite, check_origin, decompose
from sae_lens_multimodal.concepts.states import ConceptStates
from sae_lens_multimodal.concepts.vocabulary import word_lists
from sae_lens_multimodal.errors import ConfigError, FeatureError, SAEMismatchError, StoreError
from sae_lens_multimodal.files import read_json, write_atomically, write_json
from sae_lens_multimodal.hooks.concept_sae import (
    ConceptDictionarySAE,
    ConceptDictionarySAEConfig,
    nearest_codes,
    optimal_codes,
    precise_dtype,
)
from sae_lens_multimodal.hooks.saes import encode_tokens, same_model

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
CONCEPTS_NAME = "concepts.safetensors"
SETTINGS_NAME = "concepts.json"
_METADATA_KEY = "sae_lens_multimodal"
_CHUNK_STATES = 4096
SPARSITY = 0.02
"""Weight of the activations' sum, in units of the states' mean length."""


@dataclass(frozen=True, eq=False)
class ConceptDictionary:
    """States ≈ `activations` · `concepts` + `bias`: what `find_concepts` found."""

    concepts: Float[Tensor, "k d"] = field(repr=False)
    """The directions. Each speaks for itself where its activation is above 0; none is below."""
    activations: Float[Tensor, "n k"] = field(repr=False)
    """Of the states they were found on."""
    method: Method
    bias: Float[Tensor, " d"] | None = field(default=None, repr=False)
    """What is taken off a state before it is encoded, and added back."""
    alpha: float = 0.0
    """Weight of the activations' sum, in the unit of the states."""
    seed: int = 0
    objective: tuple[float, ...] = field(default=(), repr=False)
    """What was minimised, round by round."""
    features: tuple[int, ...] | None = None
    """Of the method `sae`: which feature each concept is."""
    rows: tuple[int, ...] = field(default=(), repr=False)
    """The dataset's row of each state it was found on."""
    word: str | None = None
    hook_name: str | None = None
    model_name: str | None = None
    sae: SAE[Any] | None = field(default=None, repr=False)
    """Of the method `sae`: the SAE."""

    @property
    def k(self) -> int:
        """Number of concepts."""
        return len(self.concepts)

    def check_states(self, states: ConceptStates) -> None:
        """Check that states are of what the concepts were found on.

        Raises:
            SAEMismatchError: they are of another hook, model, word or width.
        """
        if states.states.shape[1] != self.concepts.shape[1]:
            raise SAEMismatchError(
                f"The concepts have width {self.concepts.shape[1]}, the states {states.states.shape[1]}."
            )
        names = (("hook_name", self.hook_name, states.hook_name), ("word", self.word, states.word))
        for name, own, other in names:
            if own is not None and own.casefold() != other.casefold():
                raise SAEMismatchError(
                    f"The concepts were found with {name}={own!r}, the states gathered with {other!r}; use the same, "
                    f"or dataclasses.replace(dictionary, {name}=None) where it is meant."
                )
        if self.model_name is not None and not same_model(self.model_name, states.model_name):
            raise SAEMismatchError(
                f"The concepts are of {self.model_name}, the states of {states.model_name}; use the same model, or "
                "dataclasses.replace(dictionary, model_name=None) where it is meant."
            )

    @torch.no_grad()
    def encode(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Activations of the concepts on other states, by the same problem as on those they were found on.

        Raises:
            ConfigError: the concepts are an SAE's features, and the SAE is not there.
        """
        if self.method == "sae":
            return self._encoded_by_sae(states)
        concepts = self.concepts.to(states.device, precise_dtype(states.device))
        parts = [self._encoded(part.to(concepts.dtype), concepts) for part in states.split(_CHUNK_STATES)]
        return torch.cat(parts).to(self.concepts.dtype)

    def _encoded(self, states: Tensor, concepts: Tensor) -> Tensor:
        scores = (states if self.bias is None else states - self.bias.to(concepts)) @ concepts.T
        if self.method == "pca":
            return scores.clamp_min(0)
        gram = concepts @ concepts.T
        if self.method == "kmeans":
            return nearest_codes(scores, gram)
        return optimal_codes(scores, gram, l1=self.alpha)

    def _encoded_by_sae(self, states: Tensor) -> Tensor:
        if self.sae is None or self.features is None:
            raise ConfigError(
                "These concepts are features of an SAE; load them with ConceptDictionary.load(..., sae=)."
            )
        return encode_tokens(self.sae, states, features=self.features).to(self.concepts.dtype)

    def decode(self, activations: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        """Add up the concepts."""
        rebuilt = activations @ self.concepts.to(activations.device)
        return rebuilt if self.bias is None else rebuilt + self.bias.to(activations.device)

    def words(
        self, model: VisionLanguageModel, n: int = 10, *, min_letters: int | None = None, contrast: bool = False
    ) -> list[list[tuple[str, float]]]:
        """The words that each concept makes likelier, through the model's final norm and unembedding.

        Only whole words count, of any script; `contrast` takes off what the concepts have in common. See `word_lists`.

        Raises:
            SAEMismatchError: the concepts do not lie in the model's residual stream.
        """
        return word_lists(model, self.concepts, n, min_letters=min_letters, contrast=contrast)

    def top_states(self, concept: int, n: int = 5) -> list[tuple[int, float]]:
        """The rows of the dataset on which a concept is strongest, each once, with its activation there.

        Raises:
            FeatureError: there is no such concept.
        """
        if not 0 <= concept < self.k:
            raise FeatureError(f"Got concept {concept!r}; expected an integer from 0 to {self.k - 1}.")
        rows = self.rows or tuple(range(len(self.activations)))
        best: dict[int, float] = {}
        for row, value in zip(rows, self.activations[:, concept].tolist(), strict=True):
            if value > 0:
                best[row] = max(best.get(row, 0.0), value)
        return sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:n]

    def to_sae(self) -> SAE[Any]:
        """The dictionary as an SAE-Lens SAE, in which concept k is feature k.

        It is of the architecture `concept_dictionary`, whose `encode` solves for the activations; principal components
        are a `standard` SAE.

        Raises:
            ConfigError: the concepts are features of an SAE already.
        """
        if self.method == "sae":
            raise ConfigError(
                f"These concepts are the features {list(self.features or ())} of the SAE they were taken from; use "
                "that SAE with features=... instead."
            )
        sae: SAE[Any]
        zeros = torch.zeros(self.concepts.shape[1])
        mean = zeros if self.bias is None else self.bias
        state = {"W_dec": self.concepts, "b_dec": mean}
        if self.method == "pca":
            state |= {"W_enc": self.concepts.T, "b_enc": torch.zeros(self.k)}
            sae = StandardSAE(StandardSAEConfig(d_in=self.concepts.shape[1], d_sae=self.k))
        else:
            encoder: Any = "nearest" if self.method == "kmeans" else "lasso"
            sae = ConceptDictionarySAE(
                ConceptDictionarySAEConfig(
                    d_in=self.concepts.shape[1], d_sae=self.k, encoder=encoder, l1=self.alpha, device="cpu"
                )
            )
        sae.load_state_dict({name: value.detach().cpu().float().contiguous() for name, value in state.items()})
        for name, value in (("hook_name", self.hook_name), ("model_name", self.model_name)):
            if value is not None:
                sae.cfg.metadata[name] = value
        sae.cfg.metadata[_METADATA_KEY] = {
            "concepts_of": self.word,
            "method": self.method,
            "seed": self.seed,
            "to_load": "sae_lens_multimodal.hooks.load_sae.load_sae, or SAE.load_from_disk after importing that",
        }
        return sae.eval()

    def save(self, folder: str | Path) -> Path:
        """Write a folder that SAE-Lens reads as an SAE and `load` as a dictionary.

        For the method `sae` there is no SAE in it: `load` is then given the one it was. Another dictionary that the
        folder holds is replaced.

        Raises:
            StoreError: the folder holds an SAE that is no dictionary.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        if self.method != "sae":
            self.to_sae().save_model(folder)
        tensors = {"concepts": self.concepts, "activations": self.activations}
        tensors |= {} if self.bias is None else {"bias": self.bias}
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(folder / CONCEPTS_NAME, lambda temporary: save_file(whole, temporary))
        names = ("method", "alpha", "seed", "word", "hook_name", "model_name")
        settings = {name: getattr(self, name) for name in names}
        lists = {name: getattr(self, name) and list(getattr(self, name)) for name in ("features", "rows", "objective")}
        write_json(folder / SETTINGS_NAME, {"schema_version": SCHEMA_VERSION, **settings, **lists})
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, sae: SAE[Any] | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            folder: Where.
            sae: For the method `sae`: the SAE whose features the concepts are.

        Raises:
            StoreError: it is missing, damaged or of another version.
        """
        folder = Path(folder)
        settings = read_json(folder / SETTINGS_NAME)
        if settings.pop("schema_version", None) != SCHEMA_VERSION:
            raise StoreError(f"{folder} is of another version than {SCHEMA_VERSION}; find the concepts again.")
        try:
            with safe_open(folder / CONCEPTS_NAME, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{folder / CONCEPTS_NAME} cannot be read ({error}).") from error
        for name in ("features", "rows", "objective"):
            settings[name] = settings[name] if settings[name] is None else tuple(settings[name])
        return cls(**tensors, **settings, sae=sae)


def _clear(folder: Path) -> None:
    """Take away what another dictionary left; its settings first, as they say that it is whole."""
    config = folder / SAE_CFG_FILENAME
    if config.is_file() and not (folder / SETTINGS_NAME).is_file():
        origin = read_json(config).get("metadata", {}).get(_METADATA_KEY) or {}
        if "concepts_of" not in origin:
            raise StoreError(f"{folder} holds an SAE that is no concept dictionary; give another folder.")
    for name in (SETTINGS_NAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, CONCEPTS_NAME):
        (folder / name).unlink(missing_ok=True)


def find_concepts(
    states: ConceptStates | Float[Tensor, "n d"],
    k: int = 20,
    method: Method = "semi_nmf",
    *,
    seed: int = 0,
    sparsity: float = SPARSITY,
    n_starts: int = 1,
    sae: SAE[Any] | None = None,
    offset: bool = False,
) -> ConceptDictionary:
    """Find the concepts that states are made of (arXiv 2406.08074).

    - `"semi_nmf"`: min ½‖Z - VU‖² + alpha ΣV, V ≥ 0, ‖u_k‖ ≤ 1; the paper's choice.
    - `"dictionary_learning"`: the same by scikit-learn.
    - `"pca"`, `"kmeans"`: by scikit-learn. A principal component has two ends, so k of them are 2k concepts: k + i is
      the other end of i.
    - `"simple"`: the k longest states; `"random"`: k states drawn at random. Activations by non-negative least squares.
    - `"sae"`: the k features of an SAE that write most into these states.

    Args:
        states: What `gather_states` gave, or any states.
        k: Concepts.
        method: How.
        seed: Of everything random.
        sparsity: alpha of the first two, in units of the states' mean length. At 0 the concepts are not determined: any
            cone that holds the states fits them as well.
        n_starts: How often Semi-NMF begins anew; the best counts.
        sae: For `"sae"`.
        offset: Of Semi-NMF: find what all states share, too, and keep it apart as `bias`. Without it, concepts of
            states with a long mean, such as states of one word, are mixed up with that mean. `sparsity` then is in
            units of the mean distance from the mean.

    Raises:
        ConfigError: an unknown method, fewer states than concepts, states that are not finite, no SAE for `"sae"`, or
            no scikit-learn.
        SAEMismatchError: the SAE has another width than the states, is of another hook or model, or normalises.
    """
    if sparsity < 0:
        raise ConfigError(f"Got sparsity={sparsity}; expected 0 or more.")
    if offset and method != "semi_nmf":
        raise ConfigError(f"Got offset=True with method={method!r}; only semi_nmf finds an offset.")
    z = states.states if isinstance(states, ConceptStates) else states
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    check_finite(z)
    if isinstance(states, ConceptStates) and sae is not None:
        check_origin(sae, states)
    if method in ("semi_nmf", "dictionary_learning") and not offset:
        _warn_of_mean(z)
    alpha = sparsity * _scale(z, offset) if method in ("semi_nmf", "dictionary_learning") else 0.0
    factors = decompose(z, k, method, alpha=alpha, seed=seed, n_starts=n_starts, sae=sae, offset=offset)
    found = ConceptDictionary(
        factors.concepts,
        factors.activations,
        method,
        bias=factors.bias,
        alpha=alpha,
        seed=seed,
        objective=factors.objective,
        features=factors.features if isinstance(factors, SAEFactors) else None,
        sae=sae if method == "sae" else None,
    )
    if not isinstance(states, ConceptStates):
        return found
    named: dict[str, Any] = {"word": states.word, "hook_name": states.hook_name, "model_name": states.model_name}
    return replace(found, rows=tuple(states.rows), **named)


def _warn_of_mean(states: Tensor) -> None:
    """Say that concepts will be mixed up with what the states share, where that is much."""
    shared, varying = float(states.mean(0).norm()), _scale(states, True)
    if shared > varying:
        logger.warning(
            "the states have a common mean of length %.3g and vary about it by %.3g, so that concepts will be mixed up "
            "with it; Semi-NMF keeps it apart with offset=True.",
            shared,
            varying,
        )


def _scale(states: Tensor, offset: bool) -> float:
    return float((states - states.mean(0) if offset else states).norm(dim=1).mean()) if len(states) else 0.0
