"""Dose and response: one feature at many strengths in one batched forward pass, against what else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm import tqdm

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, FeatureError
from sae_lens_multimodal.hooks.changes import Add, Change, Scale, Set
from sae_lens_multimodal.hooks.dose_curve import DoseCurve, DosePoint
from sae_lens_multimodal.hooks.dose_runner import DoseRunner
from sae_lens_multimodal.hooks.metrics import target_ids
from sae_lens_multimodal.hooks.read import read_activations
from sae_lens_multimodal.hooks.saes import check_features, check_sae, encode_tokens
from sae_lens_multimodal.hooks.selection import Steps, Tokens
from sae_lens_multimodal.hooks.steering import ErrorTerm, Source
from sae_lens_multimodal.hooks.vectors import SteeringVector
from sae_lens_multimodal.types import Conversation

DoseKind: TypeAlias = Literal["set", "add", "scale"]
"""What a strength does: `Set`, `Add` or `Scale`."""

ModalityName: TypeAlias = Literal["image", "text"]

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""Sixteen strengths, from nothing (which ablates, where the activation is set) to ten times the unit."""

_KINDS: Mapping[str, Callable[[float], Change]] = {"set": Set, "add": Add, "scale": Scale}


class Scales(Protocol):
    """What knows how strong features get, such as a `FeatureStore`."""

    def scale(self, feature: int, modality: ModalityName | None = None) -> float:
        """Return the 99th percentile of a feature's activations where it fires."""
        ...

    def check_sae(self, sae: SAE[Any]) -> None:
        """Refuse an SAE other than the one whose features these are."""
        ...


@torch.no_grad()
def dose_response(
    model: VisionLanguageModel,
    sae: Source,
    feature: int,
    prompts: Conversation | Sequence[Conversation],
    target: str | int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    unit: float | Scales | None = None,
    modality: ModalityName = "image",
    kind: DoseKind = "set",
    guard: Sequence[Conversation] = (),
    tokens: Tokens = "all",
    steps: Steps = "all",
    hook_name: str | None = None,
    error: ErrorTerm = "keep",
    name: str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> DoseCurve:
    """Measure how likely an answer becomes, and what else changes, as a feature is steered ever more strongly.

    Each prompt is run once up to the hook, and from there as a batch in which every row is steered with another
    strength and one is left alone.

    Args:
        model: The model.
        sae: The SAE, or a `SteeringVector`, for which `feature` is 0.
        feature: The feature.
        prompts: One prompt or several, over which means are taken.
        target: The answer whose probability is measured: text of any number of tokens, or the id of one. Of several
            tokens the probability is that of them all; they are steered as generated ones would be.
        strengths: How strongly, in units of `unit`.
        unit: What a strength of 1 is. A `FeatureStore` (or anything with its `scale`) stands for the feature's own 99th
            percentile in `modality`; None for what `activation_unit` measures of it on the prompts and guards, or for
            a vector itself. A number is a number of activation.
        modality: Which tokens' activations the unit is taken from.
        kind: Whether the activation is set to strength times unit, that much is added, or it is scaled by the strength
            alone.
        guard: Prompts whose answers should not change.
        tokens: Where, as `steer` takes it; masks and positions are those of each prompt by itself.
        steps: When, as `steer` takes it.
        hook_name: The hook; None for the SAE's own.
        error: Whether to keep what the SAE does not reconstruct.
        name: What the curve is called.
        batch_size: Strengths in one forward pass; None for all at once, which is the fastest where memory allows.
        progress: Show a progress bar.

    Raises:
        FeatureError, SAEMismatchError, SelectionError: as `steer`.
        ConfigError: no strengths or prompts, a strength that is not a finite number, an unknown target, a feature
            that has no unit because it never fires, or steps in which nothing that is measured is predicted.
    """
    values = _checked(strengths, kind)
    asked = _several(prompts)
    if not asked:
        raise ConfigError("Got no prompts; expected at least one.")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"Got batch_size={batch_size}; expected 1 or more, or None.")
    ids = target_ids(model, target)
    _check_steps(ids, steps)
    _check_feature(sae, feature)
    if unit is None and kind != "scale" and not isinstance(sae, SteeringVector):
        unit = activation_unit(model, sae, feature, [*asked, *guard], modality=modality, hook_name=hook_name)
    size = 1.0 if kind == "scale" else _unit(unit, sae, feature, modality)
    changes: list[Change] = [_KINDS[kind](strength * size) for strength in values]
    alone: Any = {} if isinstance(sae, SAE) else Add(0.0)
    rows: list[Any] = [{feature: one} for one in changes] if isinstance(sae, SAE) else list(changes)
    settings = {"tokens": tokens, "steps": steps, "hook_name": hook_name, "error": error}
    at_once = batch_size or len(rows)
    runners = [
        DoseRunner(model, sae, [alone, *rows[start : start + at_once]], settings)
        for start in range(0, len(rows), at_once)
    ]
    bar = tqdm(total=len(runners) * (len(asked) + len(guard)), desc="dose", unit="pass", disable=not progress)
    with bar:
        found = [_joined([one.logits(prompt, ids, bar) for one in runners]) for prompt in asked]
        guarded = [_joined([one.logits(prompt, (), bar)[:, -1] for one in runners]) for prompt in guard]
    return _curve(model, found, guarded, ids, values, size).named(
        name or (sae.name if isinstance(sae, SteeringVector) else f"feature {feature}"),
        feature=feature,
        kind=kind,
        unit=size,
        target=target if isinstance(target, str) else model.token_strings([target])[0],
    )


@torch.no_grad()
def activation_unit(
    model: VisionLanguageModel,
    sae: Any,  # noqa: ANN401 - an SAE of SAE-Lens
    feature: int,
    prompts: Sequence[Conversation],
    *,
    modality: ModalityName = "image",
    quantile: float = 0.99,
    hook_name: str | None = None,
    batch_size: int = 8,
) -> float:
    """Return a quantile of a feature's activations on the tokens of some prompts where it fires; 0 if nowhere.

    Raises:
        FeatureError, SAEMismatchError: as `steer`.
        ConfigError: the quantile is none.
    """
    if not 0 < quantile <= 1:
        raise ConfigError(f"Got quantile={quantile!r}; expected more than 0 and at most 1.")
    name, chosen = check_sae(model, sae, hook_name), check_features(sae, [feature])
    firing: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        batch = model.encode(list(prompts[start : start + batch_size]))
        layout = batch.layout
        mask = layout.is_image if modality == "image" else layout.is_text
        value = read_activations(model, batch, name)[name].flatten(2)
        acts = value[mask.to(value.device)]
        encoded = encode_tokens(sae, acts, features=chosen)[:, 0].float().cpu()
        firing.append(encoded[encoded > 0])
    every = torch.cat(firing) if firing else torch.zeros(0)
    return float(torch.quantile(every, quantile)) if len(every) else 0.0


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several passes, of which each begins with the one that is left alone."""
    return torch.cat([parts[0], *(part[1:] for part in parts[1:])])


def kl_divergence(before: Float[Tensor, "*n vocabulary"], after: Float[Tensor, "*n vocabulary"]) -> Float[Tensor, "*n"]:
    """Kullback-Leibler divergence in nats of one distribution from another, both given as logits.

    >>> round(kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3.0)])).item(), 4)
    0.1438
    """
    old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
    terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new))
    return terms.sum(-1).clamp(min=0)


def _curve(
    model: VisionLanguageModel,
    found: Sequence[Tensor],
    guarded: Sequence[Tensor],
    ids: Sequence[int],
    strengths: Sequence[float],
    size: float,
) -> DoseCurve:
    """Put together the curve; the first row of everything is the one left alone."""
    wanted = torch.tensor(ids)
    chances = [one.double().log_softmax(-1)[:, torch.arange(len(ids)), wanted].sum(-1).exp() for one in found]
    target = _mean(chances)
    first = [one[:, 0].clone().index_fill(-1, wanted[:1], -math.inf) for one in found]
    others = _mean(kl_divergence(one[:1], one) for one in first)
    top = torch.stack([one[:, 0].argmax(-1) for one in found])
    spilt = _mean(kl_divergence(one[:1], one) for one in guarded) if guarded else None
    moved = _mean((one.argmax(-1) != one[0].argmax()).double() for one in guarded) if guarded else None
    points = [
        DosePoint(
            strength=strength,
            value=strength * size,
            target=float(target[row]),
            others_kl=float(others[row]),
            guard_kl=None if spilt is None else float(spilt[row]),
            guard_changed=None if moved is None else float(moved[row]),
            answers=_spelt(model, top[:, row]),
        )
        for row, strength in enumerate(strengths, start=1)
    ]
    return DoseCurve(
        baseline=float(target[0]),
        baseline_answers=_spelt(model, top[:, 0]),
        points=tuple(points),
        n_prompts=len(found),
        n_guard=len(guarded),
    )


def _spelt(model: VisionLanguageModel, ids: Tensor) -> tuple[str, ...]:
    """Write tokens as text; models may have a few more than their tokenizer."""
    known = len(model.tokenizer)
    return tuple(model.token_strings([one])[0] if one < known else f"token {one}" for one in ids.tolist())


def _mean(rows: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(rows)).mean(0)


def _checked(strengths: Sequence[float], kind: str) -> list[float]:
    if kind not in get_args(DoseKind):
        raise ConfigError(f"Got kind={kind!r}; expected one of {', '.join(get_args(DoseKind))}.")
    if not len(strengths):
        raise ConfigError("Got no strengths; expected at least one.")
    for strength in strengths:
        if isinstance(strength, bool | str) or not math.isfinite(strength):
            raise ConfigError(f"Got the strength {strength!r}; expected finite numbers.")
    return [float(strength) for strength in strengths]


def _check_feature(sae: Source, feature: int) -> None:
    if isinstance(sae, SteeringVector) and feature != 0:
        raise FeatureError(f"Got feature {feature!r} of {sae.name}; a vector has one feature, 0.")


def _check_steps(ids: Sequence[int], steps: Steps) -> None:
    """Refuse a curve that must be flat: the answer's first token is predicted before any is generated."""
    includes_prompt = 0 in steps if isinstance(steps, range) else steps != "decoding"
    if not includes_prompt and len(ids) < 2:
        raise ConfigError(
            f"Got steps={steps!r} and a target of one token, which the prompt predicts; expected steps that include "
            "the prompt, or a longer target."
        )


def _unit(unit: float | Scales | None, sae: Source, feature: int, modality: ModalityName) -> float:
    if unit is None or isinstance(unit, int | float):
        size = 1.0 if unit is None else float(unit)
    elif isinstance(sae, SteeringVector):
        raise ConfigError(f"Got a store as the unit of {sae.name}; a vector is no feature of it, so give a number.")
    else:
        unit.check_sae(sae)
        size = unit.scale(feature, modality)
    if not math.isfinite(size) or size <= 0:
        raise ConfigError(
            f"Got a unit of {size:g} for feature {feature} on {modality} tokens; expected more than 0. A feature that "
            "never fires there has no unit: give the other modality, or a number."
        )
    return size


def _several(prompts: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if len(prompts) and isinstance(prompts[0], Mapping):
        return [cast("Conversation", prompts)]
    return list(cast("Sequence[Conversation]", prompts))
