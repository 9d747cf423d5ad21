"""Steering: SAE features set, added to, scaled or ablated in every later run of an edited model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

from sae_lens import SAE

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.errors import ConfigError, SAEMismatchError, SelectionError
from sae_lens_multimodal.hooks.changes import (
    Ablate,
    Add,
    Change,
    FeatureChanges,
    Scale,
    Set,
    check_changes,
    row_changes,
)
from sae_lens_multimodal.hooks.places import BoxTokens, ImageTokens
from sae_lens_multimodal.hooks.saes import check_features, check_sae, inference_sae
from sae_lens_multimodal.hooks.selection import Steps, Tokens, TokenSelection
from sae_lens_multimodal.hooks.steering import ErrorTerm, Part, Source, Steering, steer_tokens
from sae_lens_multimodal.hooks.vectors import SteeringVector

__all__ = [
    "Ablate",
    "Add",
    "BoxTokens",
    "Change",
    "ImageTokens",
    "Scale",
    "Set",
    "SteeringVector",
    "steer",
    "steer_tokens",
]

IfEmpty: TypeAlias = Literal["raise", "ignore"]
"""What becomes of a run in whose prompts nothing is chosen."""

Changes: TypeAlias = "FeatureChanges | Change | Sequence[Change]"
"""Changes of an SAE's features, or of a vector; in a list, one for each row of the batch."""


def steer(
    model: VisionLanguageModel,
    sae: Source | Sequence[Source],
    changes: Changes | Sequence[Changes],
    *,
    tokens: Tokens = "all",
    steps: Steps = "all",
    hook_name: str | Sequence[str | None] | None = None,
    error: ErrorTerm = "keep",
    if_empty: IfEmpty = "raise",
) -> VisionLanguageModel:
    """Return an edited copy of the model in which SAE features are changed; the original stays as it was.

    At the chosen tokens the hook's value x becomes x + (z' - z)·W_dec, where z are the SAE's feature activations and
    z' those after the changes: what the SAE does not reconstruct is kept. With `error="drop"` x becomes the
    reconstruction from z' instead. Everything else is left bit for bit. The copy shares the weights; it is steered in
    `generate`, `answer`, `trace` and everything that runs through them, in every batch, and can be steered again.

    Args:
        model: The model, or a steered one: changes then follow one another.
        sae: The SAE whose features are meant, or a `SteeringVector`; or a list of them, at one hook or several. They
            are applied in the order of the forward pass, each to what those before it have left.
        changes: What to do to which feature: `{12: Set(8.0), 40: Ablate()}`, or `Add(2.0)`, `Scale(0.5)`. To steer the
            rows of a batch differently, a list with one such mapping for each row (`{}` for a row left alone). A vector
            takes one change, or a list with one for each row. For a list of SAEs, a list of all this.
        tokens: Where: `"all"` tokens but padding, `"image"` patches, `"text"` without control tokens, the `"last"`
            token of each row; `ImageTokens(0)`, the first picture's; `BoxTokens((x0, y0, x1, y1))`, those in a box of
            it, in pixels of the original; a mask [batch, seq] or [seq] of the prompt; positions in it, padding not
            counted (negative ones count from the end); or a function from a forward pass's `TokenLayout` to a mask.
        steps: When: in `"all"` forward passes, only in the `"prefill"` over the prompt, or only while `"decoding"`; or
            a range of passes, of which 0 is the prompt's and n reads the n-th generated token: `range(1, 4)`.
            Generated tokens are text. Pictures, masks and positions are about the prompt only.
        hook_name: The hook; None for the one the SAE was trained on; for a list of SAEs, a list. One outside of the
            language model has no tokens, so it takes `tokens="all"` only, which is then every position.
        error: Whether to keep what the SAE does not reconstruct.
        if_empty: What becomes of a run in whose prompts nothing is chosen, such as one without pictures for
            `tokens="image"`: "raise" an error, or "ignore" it and let the run through as it is.

    Raises:
        FeatureError: the SAE has no such feature.
        ConfigError: a change is none of the four, or its strength is not a finite number; or there are not as many
            changes as SAEs.
        SAEMismatchError: the SAE does not fit the hook.
        SelectionError: the choice of tokens selects nothing or lies outside of the picture, as far as that is known;
            what depends on the prompt is raised when the copy runs.
        UnknownHookError: the model has no such hook.
    """
    if error not in get_args(ErrorTerm):
        raise ConfigError(f"Got error={error!r}; expected 'keep' or 'drop'.")
    if if_empty not in get_args(IfEmpty):
        raise ConfigError(f"Got if_empty={if_empty!r}; expected 'raise' or 'ignore'.")
    parts = [steering_part(model, source, own, hook, error) for source, own, hook in _matched(sae, changes, hook_name)]
    order = model.hooks.names()
    parts.sort(key=lambda part: order.index(part.hook.name) if part.hook.name in order else len(order))
    selection = TokenSelection.check(tokens, steps, model.family)
    pictures = tuple(part for part in parts if part.hook.tower != "language")
    language = tuple(part for part in parts if part.hook.tower == "language")
    _check_pictures(pictures, tokens, steps)
    edited = model
    for chosen, whole in ((pictures, True), (language, False)):
        if chosen:
            edited = _edit(edited, Steering(chosen, selection, whole, may_be_empty=if_empty == "ignore"))
    return edited


def _edit(model: VisionLanguageModel, steering: Steering) -> VisionLanguageModel:
    # The block names nothing else, so that this is all that a remote run of the copy has to carry.
    with model.edit() as (_, edited):
        steering.run(edited)
    return cast("VisionLanguageModel", edited)


def _matched(
    sae: Source | Sequence[Source],
    changes: Changes | Sequence[Changes],
    hook_name: str | Sequence[str | None] | None,
) -> list[tuple[Source, Changes, str | None]]:
    """Put each SAE beside its changes and its hook."""
    if not isinstance(sae, list | tuple):
        if hook_name is not None and not isinstance(hook_name, str):
            raise ConfigError(f"Got hook_name={hook_name!r} for one SAE; expected one name.")
        return [(cast("Source", sae), cast("Changes", changes), hook_name)]
    each = list(changes) if isinstance(changes, list | tuple) else None
    if not sae or each is None or len(each) != len(sae):
        got = "none" if each is None else str(len(each))
        raise ConfigError(f"Got {len(sae)} SAEs and {got} of changes for them; expected a list with one for each SAE.")
    hooks = [None] * len(sae) if hook_name is None else hook_name
    if isinstance(hooks, str) or len(hooks) != len(sae):
        raise ConfigError(f"Got hook_name={hook_name!r} for {len(sae)} SAEs; expected a list with one name for each.")
    return list(zip(sae, cast("list[Changes]", each), hooks, strict=True))


def steering_part(
    model: VisionLanguageModel, source: Source, changes: Changes, hook_name: str | None, error: ErrorTerm
) -> Part:
    """Check what is to be done at one hook with one SAE or vector; raises as `steer`."""
    if isinstance(source, SteeringVector):
        return _vector_part(model, source, changes, hook_name, error)
    if not isinstance(source, SAE):
        raise ConfigError(f"Got a {type(source).__name__}; expected an SAE of SAE-Lens or a SteeringVector.")
    rows = row_changes(cast("FeatureChanges", changes))
    name = check_sae(model, source, hook_name)
    for row in rows:
        check_features(source, list(row))
        check_changes(row)
    checked = tuple({int(feature): change for feature, change in row.items()} for row in rows)
    return Part(model.hooks.resolve(name), inference_sae(source), checked, error)


def _vector_part(
    model: VisionLanguageModel, vector: SteeringVector, changes: Changes, hook_name: str | None, error: ErrorTerm
) -> Part:
    each: Any = changes if isinstance(changes, list | tuple) else [changes]
    if not each or any(not isinstance(change, Set | Add | Scale | Ablate) for change in each):
        raise ConfigError(
            f"Got {changes!r} for {vector.name}; expected Set(...), Add(...), Scale(...) or Ablate(), or a list with "
            "one for each row."
        )
    if error == "drop":
        raise ConfigError(f"Got error='drop' for {vector.name}; a vector reconstructs nothing, so expected 'keep'.")
    rows: tuple[dict[int, Change], ...] = tuple({0: change} for change in each)
    for row in rows:
        check_changes(row)
    hook = model.hooks.resolve(hook_name or vector.hook_name)
    width = len(vector.vector)
    if hook.d is not None and hook.d != width:
        raise SAEMismatchError(
            f"{vector.name} has {width} numbers, but {hook.name} of {model.name} has width {hook.d}; use a vector "
            "found at this hook, or pass the right hook_name."
        )
    return Part(hook, vector, rows, error)


def _check_pictures(parts: Sequence[Part], tokens: Tokens, steps: Steps) -> None:
    """Check what is asked of hooks that see pictures instead of tokens."""
    for part in parts:
        if not (isinstance(tokens, str) and tokens == "all" and steps in ("all", "prefill")):
            raise SelectionError(
                f"{part.hook.name} sees pictures, not tokens, and runs before any is generated; expected tokens='all' "
                "and steps='all' or 'prefill'."
            )
        if len(part.changes) > 1:
            raise SelectionError(
                f"{part.hook.name} sees pieces of pictures, not rows of a batch; expected one mapping of changes."
            )
