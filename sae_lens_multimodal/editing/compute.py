"""Teaching a model one fact: the value, and the rank-one updates of one layer or several that write it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.editing.edit import Edit, LayerChange, RankOneChange, changed
from sae_lens_multimodal.editing.places import Constraint
from sae_lens_multimodal.editing.prompts import Continued, Prompts, wanted_ids
from sae_lens_multimodal.editing.settings import EditSettings
from sae_lens_multimodal.editing.update import RankOne, alike, rank_one_updates
from sae_lens_multimodal.editing.value import Objective, Value, find_value
from sae_lens_multimodal.editing.weights import DownProjection, down_projection, fingerprint
from sae_lens_multimodal.errors import EditError
from sae_lens_multimodal.types import Conversation

Keys: TypeAlias = "Float[Tensor, 'n d_in'] | Sequence[Float[Tensor, 'n d_in']]"
"""Ordinary keys of a layer; of several samples each counts alike, however many keys it has."""

SWALLOWED = 0.25
"""A rounded weight that misses more of the wanted change of the output than this is warned of."""


def compute_edit(
    model: VisionLanguageModel,
    prompts: Sequence[Conversation],
    target: str,
    *,
    constraint: Constraint | Sequence[Constraint],
    layers: int | Sequence[int],
    ordinary: Mapping[int, Keys] | None = None,
    essence: Sequence[Conversation] = (),
    essence_constraint: Constraint | Sequence[Constraint] | None = None,
    settings: EditSettings | None = None,
    progress: bool = False,
) -> Edit:
    """Find the edit after which a model answers some prompts with a target. The model is left as it was.

    The value v* of the MLP's output at the constraint's last token is optimised until the target follows, over all
    prompts together; then `W' = W + (v* - W k) kᵀ / (λ + ‖k‖²)` with k the mean of the prompts' keys there (MultEdit,
    arXiv 2406.04236; after ROME, arXiv 2202.05262). With several layers, each takes an equal part of what then remains
    (MEMIT, arXiv 2210.07229), the last one the whole rest. With `EditSettings.each_token` the target's own tokens are
    further places, each with a value and an update of rank one.

    Args:
        model: The model.
        prompts: Questions that show or name the thing: several pictures and wordings make the edit hold for others.
        target: The answer to be taught, of one token or several.
        constraint: What of the prompt names the thing; one, or one for each prompt.
        layers: The layer whose MLP is edited, or several.
        ordinary: For each layer keys that are to keep their values; see `ordinary_keys`. Of several samples each counts
            alike.
        essence: Prompts about the thing or others whose answers are to stay as they are.
        essence_constraint: The constraint in those; by default the same, if it is one.
        settings: How far to go.
        progress: Show a bar.

    Raises:
        UnknownHookError: The model has no such layer.
        SelectionError: A prompt lacks the constraint.
        EditError: The layer cannot be edited, or the prompts and settings do not fit together.
        ConfigError: A setting cannot work, or the tokenizer does not know the target.
    """
    settings = settings or EditSettings()
    settings.check()
    kept = None if ordinary is None else {layer: _joined(some) for layer, some in ordinary.items()}
    places = _places(model, layers, kept)
    about = _about(model, prompts, constraint, target, settings)
    others = _essence(model, essence, constraint if essence_constraint is None else essence_constraint, settings)
    value = _value(model, places, about, others, kept, settings, progress)
    _warn_of_clamp(value, settings)
    changes, landed = _updates(model, places, about, value, kept or {}, settings)
    record = {
        "model": model.name,
        "n_prompts": len(prompts),
        "constraint": repr(constraint),
        "settings": asdict(settings),
        "n_ordinary_keys": {str(one.layer): len(kept[one.layer]) for one in places} if kept else None,
        "length": value.length,
        "probability_before": value.probability_before,
        "probability": value.probability,
        "steps": value.steps,
        "clamped": value.clamped,
        "landed": landed,
    }
    return Edit(
        changes=changes, target=target, method="rank_one", layers=tuple(one.layer for one in places), record=record
    )


def _places(
    model: VisionLanguageModel, layers: int | Sequence[int], ordinary: Mapping[int, Tensor] | None
) -> list[DownProjection]:
    several = sorted({layers} if isinstance(layers, int) else set(layers))
    if not several:
        raise EditError("Got no layer; expected at least one to edit.")
    places = [down_projection(model, layer) for layer in several]
    for place in places if ordinary is not None else []:
        keys = (ordinary or {}).get(place.layer)
        if keys is None or not len(keys) or keys.shape[-1] != place.module.in_features:
            got = "none" if keys is None else f"keys of shape {tuple(keys.shape)}"
            raise EditError(
                f"Got {got} for layer {place.layer}; expected ordinary keys of width {place.module.in_features} for "
                "every layer that is edited, as ordinary_keys gives them."
            )
    return places


def _joined(keys: Keys) -> Tensor:
    if isinstance(keys, Tensor):
        return keys
    some = [one for one in keys if len(one)]
    return alike(some) if some else torch.zeros(0, 0)


def _about(
    model: VisionLanguageModel,
    prompts: Sequence[Conversation],
    constraint: Constraint | Sequence[Constraint],
    target: str,
    settings: EditSettings,
) -> Continued:
    ids = wanted_ids(model, target, end=settings.end)
    n_places = len(ids) if settings.each_token else 1
    return Prompts.encode(model, prompts, constraint, settings.batch_size).going_on_with(model, ids, n_places=n_places)


def _essence(
    model: VisionLanguageModel,
    essence: Sequence[Conversation],
    constraint: Constraint | Sequence[Constraint],
    settings: EditSettings,
) -> Continued | None:
    if not essence:
        return None
    return Prompts.encode(model, essence, constraint, settings.batch_size).going_on(model, settings.essence_tokens)


def _value(
    model: VisionLanguageModel,
    places: Sequence[DownProjection],
    about: Continued,
    others: Continued | None,
    ordinary: Mapping[int, Tensor] | None,
    settings: EditSettings,
    progress: bool,
) -> Value:
    """Find the values at the last layer, as its update will write them if that is asked for."""
    last = places[-1]
    found = about.at_places(model, [last.key_hook, last.value_hook])
    own, right = found[last.value_hook], None
    if settings.as_read and ordinary is not None and len(places) == 1:
        updates = _update(own.mean(0), found[last.key_hook], ordinary[last.layer], settings)
        right = torch.stack([one.right for one in updates])
    objective = Objective(model, last, about, others, settings.essence_weight, right=right)
    return find_value(objective, own, settings, progress=progress)


@torch.no_grad()
def _updates(
    model: VisionLanguageModel,
    places: Sequence[DownProjection],
    about: Continued,
    value: Value,
    ordinary: Mapping[int, Tensor],
    settings: EditSettings,
) -> tuple[tuple[LayerChange, ...], list[float]]:
    """Make the updates from the first layer to the last, each on the model with those before it."""
    changes: list[LayerChange] = []
    landed: list[float] = []
    before = about.at_places(model, [_stream(places)])[_stream(places)].mean(0)
    if len(places) > 1:
        _check_additive(model, places, about)
    with _restored(places):
        for number, place in enumerate(places):
            found = about.at_places(model, [place.key_hook, _stream(places)])
            remaining = value.change - (found[_stream(places)].mean(0) - before)
            keys = found[place.key_hook]
            share = remaining / (len(places) - number)
            weight = place.module.weight
            mark = fingerprint(weight)
            some = [
                RankOneChange(
                    path=place.path,
                    layer=place.layer,
                    fingerprint=mark,
                    update=RankOne(update.left.cpu(), update.right.cpu()),
                )
                for update in _update(share, keys, ordinary.get(place.layer), settings)
            ]
            new = changed(weight, some)
            landed.append(_landed(weight, new, keys.mean(0), some, place))
            weight.copy_(new)
            changes += some
    return tuple(changes), landed


def _update(changes: Tensor, keys: Tensor, ordinary: Tensor | None, settings: EditSettings) -> list[RankOne]:
    means = keys.mean(0)
    return rank_one_updates(
        changes,
        means,
        damping=settings.damping * float(means.square().sum(-1).mean()),
        ordinary=None if ordinary is None else ordinary.to(keys.device),
        own=keys,
        ridge=settings.ridge,
    )


def _stream(places: Sequence[DownProjection]) -> str:
    """Where layers before the last one are seen to have done their part."""
    return f"blocks.{places[-1].layer}.hook_resid_post"


def _check_additive(model: VisionLanguageModel, places: Sequence[DownProjection], about: Continued) -> None:
    """Several layers share a change only where what an MLP writes is added to the stream as it is."""
    for place in places:
        names = [place.value_hook, f"blocks.{place.layer}.hook_mlp_out"]
        found = about.at_places(model, names)
        if not torch.allclose(found[names[0]], found[names[1]], rtol=1e-2, atol=1e-3):
            raise EditError(
                f"blocks.{place.layer} changes its MLP's output before it adds it to the residual stream (a norm, "
                "perhaps), so that layers cannot share a change; give one layer."
            )


def _landed(
    weight: Tensor,
    new: Tensor,
    keys: Float[Tensor, "places d_in"],
    changes: Sequence[LayerChange],
    place: DownProjection,
) -> float:
    """How much of the wanted change of the outputs the rounded weight makes; warns where it is not most of it."""
    wanted = sum((change.difference(weight.device) for change in changes), torch.zeros(())) @ keys.T
    real = (new.float() - weight.float()) @ keys.T
    if not float(wanted.norm()):
        return 1.0
    missed = float((real - wanted).norm() / wanted.norm())
    share = float((real * wanted).sum() / wanted.square().sum())
    if missed > SWALLOWED:
        warnings.warn(
            f"{weight.dtype} swallows the edit of {place.path}: {missed:.0%} of the wanted change of its output is "
            "lost in rounding the weights. Load the model with dtype='float32', or allow a longer change (clamp).",
            UserWarning,
            stacklevel=4,
        )
    return share


def _warn_of_clamp(value: Value, settings: EditSettings) -> None:
    if value.clamped and value.probability < 0.5:
        warnings.warn(
            f"the clamp of {settings.clamp:g} holds the value back: with it, the target's probability is "
            f"{value.probability:.3g} ({value.probability_before:.3g} before). Give a larger clamp, or None.",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def _restored(places: Sequence[DownProjection]) -> Iterator[None]:
    kept = [place.module.weight.detach().clone() for place in places]
    try:
        yield
    finally:
        for place, weight in zip(places, kept, strict=True):
            place.module.weight.copy_(weight)
