"""The command `trace`: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_multimodal.errors import ConfigError

if TYPE_CHECKING:
    from sae_lens_multimodal.adapters.model import VisionLanguageModel
    from sae_lens_multimodal.hooks.trace_corruptions import Corruption
    from sae_lens_multimodal.hooks.trace_findings import Confirmation, HeldOut, TraceStory
    from sae_lens_multimodal.hooks.trace_result import CausalTrace, Cell, MetricName

Commands = argparse._SubParsersAction  # the only name argparse has for it

PARTS = "attn_out,mlp_out"


def add_trace(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command. Imports nothing heavy."""
    trace = commands.add_parser(
        "trace",
        help="where in the model an answer comes from: restore a clean run in a corrupted one, cell by cell",
        description="Corrupt the prompt in one way (--replace, --other-prompt, --other-image, --blank or --noise), put "
        "the clean values of one layer and token after another back, and see how much of the answer returns.",
    )
    trace.add_argument("--model", required=True, help="hub name or folder of a vision-language model")
    trace.add_argument("--image", type=Path, action="append", default=[], help="a picture (repeat for several)")
    trace.add_argument("--prompt", required=True, help="the question")
    trace.add_argument("--answer", help="its answer (default: the token that the model puts first)")
    trace.add_argument("--against", help="another answer: then the logit difference is measured too")
    trace.add_argument("--constraint", metavar="WORDS", help="the words of the question that --replace is about")
    trace.add_argument("--replace", metavar="WORDS", help="other words of as many tokens in the constraint's place")
    trace.add_argument("--other-prompt", help="another question of as many tokens")
    trace.add_argument("--other-image", type=Path, help="another picture in place of one")
    trace.add_argument("--blank", metavar="X0,Y0,X1,Y1", help="a box of a picture to paint over, in its pixels")
    trace.add_argument(
        "--picture", type=int, default=0, metavar="N", help="which --image --other-image and --blank mean, from 0"
    )
    trace.add_argument("--noise", type=float, metavar="X", help="noise of X standard deviations on the image tokens")
    trace.add_argument("--parts", default=PARTS, help="of resid, attn_out, mlp_out, heads (default: %(default)s)")
    trace.add_argument("--tokens", choices=("all", "image", "text", "last"), default="all", help="which to restore")
    trace.add_argument("--window", type=int, default=1, help="layers restored together (default: %(default)s)")
    trace.add_argument("--metric", choices=("probability", "log_probability", "logit_difference"))
    trace.add_argument("--min-gap", type=float, default=0.05, help="least probability lost (default: %(default)s)")
    _add_features(trace)
    trace.add_argument("--top", type=int, default=10, help="cells shown (default: %(default)s)")
    trace.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    trace.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")
    trace.add_argument("--output", type=Path, help="folder for a page with heat maps, and the numbers as JSON")


def _add_features(trace: argparse.ArgumentParser) -> None:
    """Describe what concerns SAEs."""
    trace.add_argument(
        "--sae", type=Path, action="append", default=[], help="an SAE: name the features of the hot cell"
    )
    trace.add_argument("--features", type=int, default=5, help="with --sae: how many (default: %(default)s)")
    trace.add_argument(
        "--explanations",
        type=Path,
        action="append",
        default=[],
        help="with --sae: a store, or a folder of its explanations; repeat in the order of several --sae",
    )
    trace.add_argument(
        "--held-out",
        type=Path,
        action="append",
        default=[],
        metavar="PICTURE",
        help="with --sae: another picture, of the first one's size, of which the question has the same answer: whether "
        "the features confirm there (repeat for several)",
    )
    trace.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="PICTURE",
        help="with --sae: another picture of which the question has any answer: features are also put at their means "
        "over these (repeat for many)",
    )


def trace(options: Namespace) -> None:
    """Trace an answer, and with an SAE name the features that carry it."""
    from sae_lens_multimodal.adapters.images import open_image
    from sae_lens_multimodal.adapters.model import load_model
    from sae_lens_multimodal.hooks.trace import causal_trace
    from sae_lens_multimodal.report.trace import build_trace_report

    model = load_model(options.model, device=options.device, dtype=options.dtype)
    question = _question(options, options.prompt)
    corruption = _corruption(options, model, question)
    shared = {"answer": options.answer, "against": options.against, "positions": options.tokens}
    shared |= {"min_gap": options.min_gap, "progress": True}
    if options.sae:
        found: Any = _story(options, model, question, corruption, shared)
        sys.stdout.write("\n".join([*trace_lines(found.trace, options.top), *story_lines(found)]) + "\n")
    else:
        parts = [one.strip() for one in options.parts.split(",")]
        metric: MetricName = options.metric or "probability"
        found = causal_trace(model, question, corruption, parts=parts, window=options.window, metric=metric, **shared)
        sys.stdout.write("\n".join(trace_lines(found, options.top)) + "\n")
    if options.output is not None:
        pictures = {options.prompt: [open_image(path) for path in options.image]}
        page = build_trace_report({options.prompt: found}, output=options.output, pictures=pictures)
        sys.stdout.write(f"{page}\n")


def _question(options: Namespace, words: str, instead: Path | None = None) -> list[dict[str, Any]]:
    paths = [path if at != options.picture or instead is None else instead for at, path in enumerate(options.image)]
    pictures = [{"type": "image", "image": str(path)} for path in paths]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": words}]}]


def _corruption(
    options: Namespace, model: VisionLanguageModel, question: list[dict[str, Any]], instead: Path | None = None
) -> Corruption:
    from sae_lens_multimodal.adapters.images import open_image
    from sae_lens_multimodal.hooks.constraints import mark, span_tokens
    from sae_lens_multimodal.hooks.trace_corruptions import (
        BlankRegion,
        Counterfactual,
        Noise,
        OtherImage,
        ReplaceTokens,
    )

    names = ("replace", "other_prompt", "other_image", "blank", "noise")
    given = [name for name in names if getattr(options, name) is not None]
    if len(given) != 1 or (options.constraint is None) != (options.replace is None):
        raise ConfigError(
            "expected one way to corrupt the prompt: --constraint with --replace, --other-prompt, --other-image, "
            f"--blank or --noise; got {', '.join(given) or 'none'}."
        )
    if options.replace is not None:
        span = mark(options.prompt, options.constraint)
        tokens = span_tokens(model.family, question, options.prompt, [(span.start, span.stop)])[0]
        return ReplaceTokens(tokens, options.replace)
    if options.other_prompt is not None:
        return Counterfactual(_question(options, options.other_prompt, instead))
    if not 0 <= options.picture < max(1, len(options.image)):
        raise ConfigError(f"--picture got {options.picture}; there are {len(options.image)} --image, counted from 0.")
    if options.other_image is not None:
        return OtherImage(open_image(options.other_image), options.picture)
    if options.blank is not None:
        return BlankRegion(_box(options.blank), options.picture)
    return Noise("image", scale=options.noise)


def _box(text: str) -> tuple[float, float, float, float]:
    from sae_lens_multimodal.cli.steering import parse_numbers

    numbers = parse_numbers("blank", text)
    if len(numbers) != 4:
        raise ConfigError(f"--blank got {text!r}; expected X0,Y0,X1,Y1 in pixels.")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _story(
    options: Namespace,
    model: VisionLanguageModel,
    question: list[dict[str, Any]],
    corruption: Corruption,
    shared: dict[str, Any],
) -> TraceStory:
    from sae_lens_multimodal.hooks.load_sae import load_sae
    from sae_lens_multimodal.hooks.saes import check_sae
    from sae_lens_multimodal.hooks.trace_story import trace_features

    if options.window != 1 or options.parts != PARTS:
        raise ConfigError("--sae traces single layers where its SAEs read; leave out --window and --parts.")
    saes = [load_sae(path, options.device) for path in options.sae]
    return trace_features(
        model,
        saes,
        question,
        corruption,
        metric=options.metric,
        n_features=options.features,
        explanations=_explanations(options.explanations, [check_sae(model, sae) for sae in saes]),
        held_out=_held_out(options, model),
        reference=[_question(options, options.prompt, path) for path in options.reference] or None,
        **shared,
    )


def _held_out(options: Namespace, model: VisionLanguageModel) -> list[HeldOut]:
    """The same question and corruption about other pictures."""
    from sae_lens_multimodal.hooks.trace_findings import HeldOut

    if options.held_out and (options.blank is not None or options.other_image is not None or not options.image):
        raise ConfigError(
            "--held-out asks the same of another picture; it goes with --image and --replace, "
            "--other-prompt or --noise."
        )
    found = []
    for path in options.held_out:
        question = _question(options, options.prompt, path)
        found.append(HeldOut(question, _corruption(options, model, question, path)))
    return found


def _explanations(folders: list[Path], hooks: list[str]) -> dict[str, dict[int, str]]:
    """Explanations by the hook of the SAE that they are of."""
    from sae_lens_multimodal.autointerp.explanation import read_explanations
    from sae_lens_multimodal.cli.autointerp import EXPLANATIONS_FOLDER

    if folders and len(folders) != len(hooks):
        raise ConfigError(
            f"Got {len(folders)} --explanations for {len(hooks)} --sae; give one for each, in the same order."
        )
    found = {}
    for folder, hook in zip(folders, hooks, strict=False):
        inside = folder / EXPLANATIONS_FOLDER
        read = read_explanations(inside if inside.exists() else folder)
        found[hook] = {one.feature: one.text for one in read if one.text}
    return found


def trace_lines(found: CausalTrace, top: int) -> list[str]:
    """Lay out the two runs and the cells that bring most back."""
    lines = [f"answer: {found.answer}" + (f", against {found.against}" if found.against else "")]
    for name in found.values:
        lines.append(f"{name}: clean {found.clean[name]:.4g}, corrupted {found.corrupted[name]:.4g}")
    lines += ["", "restored  part      layer  token"]
    for cell in found.top(top):
        lines.append(_cell_line(found, cell))
    return lines


def _cell_line(found: CausalTrace, cell: Cell) -> str:
    corrupted = "  (a corrupted token)" if found.is_corrupted(cell.unit) else ""
    return f"{cell.restored:>8.3f}  {cell.part:<8}  {cell.layer:>5}  {cell.label.strip()}{corrupted}"


def story_lines(found: TraceStory) -> list[str]:
    """Lay out the features of the hot cell and what confirms them."""
    means = "at mean  " if found.together.mean_ablated else ""
    lines = [
        "",
        "the hottest cell that an SAE reads, and the hottest of all:",
        _cell_line(found.trace, found.cell),
        _cell_line(found.trace, found.hottest),
        f"all features there bring {found.restored_all:.3f} back",
        "",
        f"{'feature':<20}  restored  ablated  exchanged  {means}explanation",
    ]
    for one in found.features:
        numbers = _numbers(one.restored, one.ablated, one.exchanged, one.mean_ablated)
        lines.append(f"{one.feature:<20}{numbers}  {one.explanation or ''}".rstrip())
    lines += _confirmation_lines("together", found.together)
    for at, confirmation in enumerate(found.held_out, start=1):
        lines += _confirmation_lines(f"held out {at}", confirmation)
    return lines


def _confirmation_lines(name: str, found: Confirmation) -> list[str]:
    means = found.mean_ablated
    own = _numbers(found.restored, found.ablated, found.exchanged, None if means is None else means.found)
    lines = [f"{name:<20}{own}"]
    if found.n_random:
        random = None if means is None else means.random
        numbers = _numbers(found.restored_random, found.ablated_random, found.exchanged_random, random)
        lines.append(f"{'  random, weight ' + format(found.weight_random, '.2f'):<20}{numbers}")
    if means is not None:
        for what, lost in (("all others", means.others), ("all features", means.all_features), ("value", means.value)):
            lines.append(f"{'  ' + what + ' at mean':<52}{lost:>7.3f}")
    return lines


def _numbers(restored: float, ablated: float, exchanged: float, mean_ablated: float | None) -> str:
    last = "" if mean_ablated is None else f"  {mean_ablated:>7.3f}"
    return f"  {restored:>8.3f}  {ablated:>7.3f}  {exchanged:>9.3f}{last}"
