"""The edit command: teach a model one fact, show what changes, measure it, and save the edit."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.editing.edit import Edit
    from sae_lens_multimodal.editing.measure import EditCases

Chat = list[dict[str, Any]]

N_ESSENCE = 60
"""Prompts of --keep whose answers the optimisation itself looks at, at most; keys are read from all of them."""

QUESTIONS_HELP = (
    "JSON with lists of {prompt, image} under efficacy, and groups of such lists under generalisation and specificity"
)


def add_edit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command. Imports nothing heavy."""
    parser = commands.add_parser(
        "edit",
        help="teach a model one fact by a rank-one change of an MLP's weights",
        description="Finds the edit after which every picture with every prompt is answered with the target, shows the "
        "answers before and after, and saves the edit. With --load, a saved one is shown or measured instead.",
    )
    parser.add_argument("--model", required=True, help="hub name or folder of a vision-language model")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture (repeat for several)")
    parser.add_argument("--prompt", action="append", required=True, help="a question (repeat for several wordings)")
    parser.add_argument("--target", help="the answer to be taught")
    parser.add_argument(
        "--constraint", help="words of the prompts that name the thing; its last token is edited (default: the last)"
    )
    parser.add_argument("--layer", type=int, action="append", help="the layer to edit (repeat for several)")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="a saved edit, instead of finding one")
    parser.add_argument("--keep", type=Path, metavar="FILE.json", help="a list of {prompt, image} to leave as they are")
    parser.add_argument("--measure", type=Path, metavar="FILE.json", help=QUESTIONS_HELP)
    parser.add_argument(
        "--each-token", action="store_true", help="write a value at each token of the target, too (rank one for each)"
    )
    parser.add_argument("--fine-tune", action="store_true", help="fine-tune the layer instead, as a baseline")
    parser.add_argument("--clamp", type=float, help="longest change, in units of the MLP's own output (default: 20)")
    parser.add_argument("--max-steps", type=int, help="steps of the optimisation")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the edit is saved")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="where the whole edited model is saved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")


def edit(options: Namespace) -> None:
    """Find or read an edit, show it, measure it, save it."""
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.cli.steering import side_by_side
    from sae_lens_multimodal.editing.measure import measure_edit
    from sae_lens_multimodal.editing.store import load_edit, save_edit, save_edited

    if options.load is None and (options.target is None or not options.layer):
        missing = [flag for flag, given in (("--target", options.target), ("--layer", options.layer)) if not given]
        raise ConfigError(f"got no {' and no '.join(missing)}; expected both, or --load with a saved edit.")
    kept = [] if options.keep is None else _chats(options.keep, _read(options.keep))
    cases = None if options.measure is None else _cases(options.measure)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    prompts = [ask(text, image) for text in options.prompt for image in options.image or [None]]
    found = load_edit(options.load) if options.load is not None else _find(options, model, prompts, kept)
    before = model.answer(prompts, max_new_tokens=options.max_new_tokens)
    with found.on(model):
        after = model.answer(prompts, max_new_tokens=options.max_new_tokens)
    name = f"{found.target} at layer {', '.join(map(str, found.layers))}"
    for one, other in zip(before, after, strict=True):
        _print(*side_by_side(one, other, name), "")
    if cases is not None:
        _print(*measure_edit(model, found, cases, max_new_tokens=options.max_new_tokens).lines())
    if options.output is not None:
        _print(str(save_edit(found, options.output).resolve()))
    if options.checkpoint is not None:
        _print(str(save_edited(model, found, options.checkpoint).resolve()))


def _find(options: Namespace, model: VisionLanguageModel, prompts: Sequence[Chat], kept: Sequence[Chat]) -> Edit:
    from sae_lens_multimodal.editing.compute import compute_edit
    from sae_lens_multimodal.editing.fine_tune import FineTuneSettings, fine_tune
    from sae_lens_multimodal.editing.keys import ordinary_keys
    from sae_lens_multimodal.editing.settings import EditSettings

    steps = {} if options.max_steps is None else {"max_steps": options.max_steps}
    essence = kept[:: max(1, -(-len(kept) // N_ESSENCE))]
    if options.fine_tune:
        if len(options.layer) > 1:
            raise ConfigError(f"got {len(options.layer)} layers beside --fine-tune; expected one.")
        idle = {
            "--clamp": options.clamp,
            "--each-token": options.each_token or None,
            "--constraint": options.constraint,
        }
        if given := [flag for flag, value in idle.items() if value is not None]:
            raise ConfigError(
                f"got {', '.join(given)} beside --fine-tune, which takes none; leave one or the other out."
            )
        return fine_tune(
            model,
            prompts,
            options.target,
            layer=options.layer[0],
            essence=essence,
            settings=FineTuneSettings(**steps),
            progress=True,
        )
    if options.clamp is not None:
        steps["clamp"] = options.clamp
    return compute_edit(
        model,
        prompts,
        options.target,
        constraint=-1 if options.constraint is None else options.constraint,
        layers=options.layer,
        ordinary=ordinary_keys(model, kept, options.layer) if kept else None,
        essence=essence,
        essence_constraint=-1,
        settings=EditSettings(**steps, each_token=options.each_token),
        progress=True,
    )


def ask(text: str, image: Path | str | None) -> Chat:
    """Ask a question, about a picture if there is one, as chat messages."""
    pictures = [] if image is None else [{"type": "image", "image": str(image)}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def _read(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    from sae_lens_multimodal.files import read_json

    return read_json(path)


def _cases(path: Path) -> EditCases:
    from sae_lens_multimodal.editing.measure import EditCases

    found = _read(path)
    if not isinstance(found, Mapping) or not found.get("efficacy"):
        raise ConfigError(f"{path} holds no prompts under efficacy; expected {QUESTIONS_HELP}.")
    groups: dict[str, dict[str, list[Chat]]] = {}
    for measure in ("generalisation", "specificity"):
        some = found.get(measure) or {}
        named = some if isinstance(some, Mapping) else {"": some}
        groups[measure] = {str(name): _chats(path, listed) for name, listed in named.items()}
    return EditCases(efficacy=_chats(path, found["efficacy"]), **groups)


def _chats(path: Path, listed: object) -> list[Chat]:
    """Read prompts; pictures' paths begin at the file's own folder."""
    if not isinstance(listed, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("prompt"), str) and isinstance(one.get("image", ""), str)
        for one in listed
    ):
        raise ConfigError(f"{path} should hold lists of {{prompt, image}} with texts; image may be left out.")
    return [ask(one["prompt"], path.parent / one["image"] if one.get("image") else None) for one in listed]


def _print(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
