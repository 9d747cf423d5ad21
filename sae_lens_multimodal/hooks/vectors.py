"""Directions that no SAE has: differences of means and concept vectors, to steer with and to compare SAEs with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.batch import EncodedBatch
from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SelectionError
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.selection import ForwardPass, Tokens, TokenSelection
from sae_lens_multimodal.types import Conversation

VectorMethod: TypeAlias = Literal["mean", "classifier"]
"""How a direction is found: the difference of means, or the normal of a linear classifier (a concept vector)."""

_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction at a hook, which `steer` takes in an SAE's place.

    It counts as the one feature of a dictionary: its activation at a token x is the coordinate x·v / v·v, so `Add(1)`
    adds the vector once, `Ablate()` projects it out, `Set(c)` makes the coordinate c and `Scale(f)` stretches it.
    """

    vector: Float[Tensor, " d"]
    """The direction, with its length."""
    hook_name: str
    """Where it was found."""
    name: str = "vector"
    """What it is called in messages and reports."""

    def __post_init__(self) -> None:
        """Check that it is a direction.

        Raises:
            ConfigError: it is not.
        """
        shape = tuple(self.vector.shape)
        if len(shape) != 1 or not bool(torch.isfinite(self.vector).all()) or not bool(self.vector.any()):
            raise ConfigError(f"Got a vector of shape {shape}; expected [d] of finite numbers that are not all 0.")


def coordinates(vector: SteeringVector, acts: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens 1"]:
    """Each token's coordinate along a vector, in units of the vector.

    >>> coordinates(SteeringVector(torch.tensor([0.0, 2.0]), "hook"), torch.tensor([[5.0, 6.0]])).tolist()
    [[3.0]]
    """
    direction = vector.vector.to(acts.device, torch.promote_types(acts.dtype, torch.float32))
    return (acts.to(direction.dtype) @ direction / direction.dot(direction))[:, None]


@torch.no_grad()
def steering_vector(
    model: VisionLanguageModel,
    wanted: Sequence[Conversation],
    unwanted: Sequence[Conversation],
    hook_name: str,
    *,
    tokens: Tokens = "last",
    method: VectorMethod = "mean",
    batch_size: int = 8,
    name: str = "vector",
) -> SteeringVector:
    """Find the direction in which the states of some prompts lie from those of others.

    Args:
        model: The model.
        wanted: Prompts with what the vector is to stand for.
        unwanted: Prompts without it.
        hook_name: Where the states are read.
        tokens: Which tokens' states, as `steer` takes it; each prompt counts once, with the mean over its tokens.
        method: `"mean"`: the mean of the wanted minus the mean of the unwanted. `"classifier"`: a concept vector, the
            normal of the ridge-regularised linear discriminant between the two (as TCAV's, arXiv 1711.11279, has it
            for a linear classifier), as long as the difference of means is along it.
        batch_size: Prompts to a forward pass.
        name: What to call it.

    Raises:
        ConfigError: a side has no prompts, or both have the same states.
        SelectionError: a prompt has none of the tokens.
    """
    if method not in get_args(VectorMethod):
        raise ConfigError(f"Got method={method!r}; expected one of {', '.join(get_args(VectorMethod))}.")
    if not wanted or not unwanted:
        raise ConfigError(
            f"Got {len(wanted)} wanted and {len(unwanted)} unwanted prompts; expected at least one of each."
        )
    hook = model.hooks.resolve(hook_name).name
    selection = TokenSelection.check(tokens, "prefill", model.family)
    one, other = (_states(model, prompts, hook, selection, batch_size=batch_size) for prompts in (wanted, unwanted))
    direction = mean_difference(one, other) if method == "mean" else concept_vector(one, other)
    return SteeringVector(direction.to(model.dtype), hook, name)


def mean_difference(wanted: Float[Tensor, "n d"], unwanted: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Mean of one set of states minus the mean of another.

    >>> mean_difference(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [2.0, 0.0]
    """
    return wanted.mean(0) - unwanted.mean(0)


def concept_vector(wanted: Float[Tensor, "n d"], unwanted: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Normal of the linear discriminant of two sets of states: (S + λI)⁻¹(μ₁ - μ₀), S the covariance within them.

    λ is a hundredth of the mean variance. The vector is as long as the difference of means is along it, so that adding
    it once moves the one mean as far towards the other as that direction can.
    """
    difference = mean_difference(wanted, unwanted)
    centred = torch.cat([wanted - wanted.mean(0), unwanted - unwanted.mean(0)])
    within = centred.T @ centred / len(centred)
    ridge = _RIDGE * within.diagonal().mean().clamp(min=torch.finfo(within.dtype).tiny)
    normal = torch.linalg.solve(within + ridge * torch.eye(len(within), dtype=within.dtype), difference)
    unit = normal / normal.norm().clamp(min=torch.finfo(normal.dtype).tiny)
    return unit * difference.dot(unit)


def _states(
    model: VisionLanguageModel,
    prompts: Sequence[Conversation],
    hook: str,
    selection: TokenSelection,
    *,
    batch_size: int,
) -> Float[Tensor, "n d"]:
    """Read one state for each prompt: the mean over its chosen tokens, in double precision."""
    rows: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        batch = model.encode(list(prompts[start : start + batch_size]))
        mask = prompt_mask(batch, selection)
        if not bool(mask.any(dim=1).all()):
            empty = start + int((~mask.any(dim=1)).nonzero()[0])
            raise SelectionError(f"Prompt {empty} has none of the chosen tokens; expected at least one in each.")
        values = read_activations(model, batch, hook)[hook].flatten(2).cpu().double()
        weights = mask.double()
        rows.append(torch.einsum("bs,bsd->bd", weights, values) / weights.sum(1, keepdim=True))
    return torch.cat(rows)


def prompt_mask(batch: EncodedBatch, selection: TokenSelection) -> Tensor:
    """Return the tokens of a batch's prompts that a selection means, without running the model."""
    sizes = [size for row in batch.layout.image_sizes for size in row]
    inputs: Mapping[str, Tensor] = batch
    mask = selection.mask(ForwardPass(dict(inputs), 0, sizes, n_prompts=batch.n_rows))
    return torch.zeros(batch.layout.modality.shape, dtype=torch.bool) if mask is None else mask.cpu()
