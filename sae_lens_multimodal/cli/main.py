"""The console script: its commands and how their mistakes are shown."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_lens_multimodal.cli.concepts import add_concepts
from sae_lens_multimodal.cli.editing import add_edit
from sae_lens_multimodal.cli.measuring import add_measure_flags
from sae_lens_multimodal.cli.reporting import add_export, add_report
from sae_lens_multimodal.cli.tracing import add_trace
from sae_lens_multimodal.errors import MultimodalError

EPILOG = "Every command is a thin face of one public function; README.md says which. COMMAND --help shows its options."


def build_parser() -> argparse.ArgumentParser:
    """Describe all commands. Imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="sae-lens-multimodal",
        description="Sparse autoencoders on vision-language models: train, harvest, explain, score, steer, report.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the versions a result depends on")
    parser.add_argument("--verbose", action="store_true", help="also show what the libraries log")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_cache(commands)
    _add_evaluate(commands)
    _add_harvest(commands)
    _add_explain(commands)
    _add_score(commands)
    _add_measure(commands)
    _add_calibrate(commands)
    add_report(commands)
    add_export(commands)
    _add_steer(commands)
    _add_attribute(commands)
    add_trace(commands)
    add_concepts(commands)
    add_edit(commands)
    return parser


Commands = argparse._SubParsersAction  # the only name argparse has for it


def _add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="the whole story on the embedded model and scenes, offline")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a sparse autoencoder",
        description="Train as CONFIG.yaml says. Every field can be set by a flag: --lr 1e-4 --sae.k 64.",
    )
    train.add_argument("config", type=Path, metavar="CONFIG.yaml", help="fields of MultimodalSAERunnerConfig")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="fields to set differently")


def _add_cache(commands: Commands[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser(
        "cache",
        help="write the activations that a training run would read, to train from many times",
        description="Takes the CONFIG.yaml of train, with cached_activations_path: the folder to write. Training with "
        "--use-cached-activations then reads them in place of the model and the dataset.",
    )
    cache.add_argument("config", type=Path, metavar="CONFIG.yaml", help="fields of MultimodalSAERunnerConfig")
    cache.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--FIELD VALUE", help="fields to set differently")


def _add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure an SAE by modality, beside floors, on data it was not trained on",
        description="Reconstruction, cross-entropy recovered and KL by modality, for the SAE and for floors of the "
        "same sparsity. Of the dataset it was trained on, the rows that were held out are taken.",
    )
    evaluate.add_argument("sae", type=Path, metavar="SAE", help="folder of an SAE-Lens SAE")
    evaluate.add_argument("dataset", nargs="?", metavar="DATASET", help="hub name, folder or file (default: its own)")
    evaluate.add_argument("--model", help="hub name or folder (default: the one the SAE names)")
    evaluate.add_argument("--hook", help="where the SAE reads (default: what its metadata say)")
    evaluate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    evaluate.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")
    evaluate.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    evaluate.add_argument("--subset", help="configuration of a hub dataset that has several")
    evaluate.add_argument("--image-folder", help="where relative picture paths in the dataset begin")
    evaluate.add_argument("--max-prompts", type=int, default=256, help="prompts to measure (default: %(default)s)")
    evaluate.add_argument(
        "--loss-prompts", type=int, default=64, help="prompts to measure losses on (default: %(default)s; 0: none)"
    )
    evaluate.add_argument(
        "--floors", nargs="*", default=["random", "pca", "neurons"], metavar="FLOOR", help="random, pca, neurons"
    )
    evaluate.add_argument("--batch-size", type=int, default=8, help="prompts a forward pass (default: %(default)s)")
    evaluate.add_argument("--context-size", type=int, help="leave out prompts of more tokens")
    evaluate.add_argument(
        "--scenes", type=int, default=0, metavar="N", help="of the tiny model: also compare with the truth of N scenes"
    )
    evaluate.add_argument("--output", type=Path, help="folder for evaluation.json and features.parquet")
    evaluate.add_argument("--seed", type=int, default=0)


def _add_harvest(commands: Commands[argparse.ArgumentParser]) -> None:
    harvest = commands.add_parser("harvest", help="top examples and statistics of every feature, in one pass")
    _add_model(harvest)
    source = harvest.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="hub name, folder, or .parquet/.json file")
    source.add_argument("--mixture", type=Path, metavar="FILE.yaml", help="several: dataset_mixture as train takes it")
    harvest.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    harvest.add_argument("--output", type=Path, required=True, help="folder of the feature store")
    harvest.add_argument("--max-prompts", type=int, help="stop after this many prompts")
    harvest.add_argument("--batch-size", type=int, default=8, help="prompts a forward pass (default: %(default)s)")
    harvest.add_argument("--n-top", type=int, default=16, help="top examples a feature (default: %(default)s)")
    harvest.add_argument("--rank", choices=("max", "mean"), default="max", help="by what the top is chosen")
    harvest.add_argument("--keep-images", choices=("bytes", "reference"), default="bytes")
    harvest.add_argument("--exact-pictures", action="store_true", help="do not take near-duplicate pictures for one")
    harvest.add_argument("--workers", type=int, default=2, help="threads that prepare pictures (default: %(default)s)")
    harvest.add_argument(
        "--describe",
        action="store_true",
        help="then also compare crops, neighbours and co-firing features, and find the output tokens of each feature",
    )
    harvest.add_argument("--seed", type=int, default=0)


def _add_explain(commands: Commands[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser("explain", help="have a VLM explain features from where they fire")
    explain.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    _add_judge(explain)
    explain.add_argument("--features", help="for example 3,17,40-60 (default: all that have examples)")
    explain.add_argument("--output", type=Path, help="folder for explanations.jsonl (default: inside the store)")
    explain.add_argument(
        "--procedure",
        choices=("general", "words-first", "contrastive", "published", "joint"),
        default="general",
        help="one question; that only where no word at hand tells the meaning; several candidates, tried on examples "
        "of their own; as arXiv 2411.14982 does; or one question about prompts in whose picture and text it fires",
    )
    explain.add_argument(
        "--sae",
        type=Path,
        help="with contrastive: the SAE, for each feature's neighbours (else those that harvest --describe found)",
    )
    explain.add_argument("--seed", type=int, default=0)


def _add_score(commands: Commands[argparse.ArgumentParser]) -> None:
    score = commands.add_parser("score", help="have a judge score the explanations on examples that were not shown")
    score.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    _add_judge(score)
    score.add_argument("--explanations", type=Path, help="explanations.jsonl (default: the store's own)")
    score.add_argument("--output", type=Path, help="folder for scores.jsonl (default: inside the store)")
    score.add_argument("--scorers", default="detection,fuzzing", help="with commas; also detection_crop, fuzzing_joint")
    score.add_argument("--items", type=int, default=5, help="items of each kind a test (default: %(default)s)")
    score.add_argument("--seed", type=int, default=0)


def _add_measure(commands: Commands[argparse.ArgumentParser]) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure explanations in numbers: intruder, simulation, embedding, masks, steering, surprisal",
        description="Measures explanations on examples that were not shown, each beside another feature's explanation.",
    )
    measure.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    _add_judge(measure, required=False)
    add_measure_flags(measure)


def _add_calibrate(commands: Commands[argparse.ArgumentParser]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="how far a judge can be trusted, on planted features whose meaning is known",
        description="Asks about made-up pictures in which everything is known, and about controls from which the "
        "answer was taken away: there, a judge that looks falls to chance.",
    )
    _add_judge(calibrate)
    calibrate.add_argument("--features", type=int, default=24, help="planted features (default: %(default)s)")
    calibrate.add_argument("--regions", type=int, default=3, help="regions of each (default: %(default)s)")
    calibrate.add_argument("--output", type=Path, help="folder for calibration.json and the answers")
    calibrate.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="--output of another judge: how far the two agree beyond chance (repeat for several)",
    )
    calibrate.add_argument("--seed", type=int, default=0)


def _add_steer(commands: Commands[argparse.ArgumentParser]) -> None:
    steer = commands.add_parser("steer", help="ask a question with and without steered features")
    steer.add_argument("model_at", nargs="?", metavar="MODEL", help="the same as --model")
    steer.add_argument("sae_at", nargs="?", type=Path, metavar="SAE", help="the same as --sae")
    _add_model(steer, required=False)
    steer.add_argument("--image", type=Path, action="append", default=[], help="a picture (repeat for several)")
    steer.add_argument("--prompt", required=True, help="the question")
    steer.add_argument("--feature", type=int, metavar="F", help="the feature that is meant where only X is given")
    steer.add_argument("--set", action="append", default=[], metavar="F=X", help="set feature F to X")
    steer.add_argument("--add", action="append", default=[], metavar="F=X", help="add X to feature F")
    steer.add_argument("--scale", action="append", default=[], metavar="F=X", help="multiply feature F by X")
    steer.add_argument(
        "--ablate", action="append", nargs="?", const="", default=[], metavar="F", help="set feature F to zero"
    )
    steer.add_argument("--tokens", choices=("all", "image", "text", "last"), default="all")
    steer.add_argument("--picture", type=int, metavar="N", help="only the tokens of the N-th picture, from 0")
    steer.add_argument("--box", metavar="X0,Y0,X1,Y1", help="only the tokens in a box of the picture, in its pixels")
    steer.add_argument("--steps", choices=("all", "prefill", "decoding"), default="all")
    steer.add_argument("--error", choices=("keep", "drop"), default="keep", help="what becomes of the SAE's error")
    steer.add_argument("--max-new-tokens", type=int, default=64)
    steer.add_argument("--target", help="measure how likely this answer becomes as --feature is set ever higher")
    steer.add_argument("--dose", metavar="X,X,...", help="the strengths to try (default: sixteen from 0 to 10)")
    steer.add_argument(
        "--store", type=Path, help="feature store: strengths count in the feature's 99th percentile there"
    )
    steer.add_argument(
        "--unit", type=float, help="the activation that a strength of 1 is (default: the 99th percentile in the prompt)"
    )
    steer.add_argument(
        "--modality", choices=("image", "text"), default="image", help="tokens that the 99th percentile is taken from"
    )
    steer.add_argument("--output", type=Path, help="folder for a page with the dose curve")


def _add_attribute(commands: Commands[argparse.ArgumentParser]) -> None:
    attribute = commands.add_parser("attribute", help="which features and tokens an answer rests on")
    _add_model(attribute)
    attribute.add_argument("--image", type=Path, action="append", default=[], help="a picture (repeat for several)")
    attribute.add_argument("--prompt", required=True, help="the question")
    attribute.add_argument("--wanted", required=True, help="the answer whose logit or log-probability is taken apart")
    attribute.add_argument("--unwanted", help="another answer: then the difference of the two logits is")
    attribute.add_argument("--tokens", choices=("all", "image", "text", "last"), default="all")
    attribute.add_argument(
        "--method", choices=("gradient", "grouped_gradients", "integrated_gradients"), default="gradient"
    )
    attribute.add_argument("--n-steps", type=int, default=4, help="groups or points (default: %(default)s)")
    attribute.add_argument("--top", type=int, default=10, help="features and nodes shown (default: %(default)s)")
    attribute.add_argument("--check", type=int, default=0, metavar="N", help="ablate the top N nodes for real")
    attribute.add_argument("--output", type=Path, help="also write everything to this JSON file")


def _add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help="hub name or folder of a vision-language model")
    parser.add_argument("--sae", type=Path, required=required, help="folder of an SAE-Lens SAE")
    parser.add_argument("--hook", help="where the SAE reads (default: what its metadata say)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")


def _add_judge(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--judge", required=required, help="model name at the server, or hub name or folder to load here"
    )
    parser.add_argument("--base-url", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--device", default="cpu", help="where to run what is loaded here")
    parser.add_argument(
        "--dialect", choices=("general", "scenes"), default="general", help="how the judge is spoken to"
    )
    parser.add_argument("--max-calls", type=int, help="stop after so many calls; run again to go on")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens, read and written")
    parser.add_argument("--max-money", type=float, help="stop after so much money, by the two prices below")
    parser.add_argument("--price-in", type=float, default=0.0, metavar="P", help="of a million tokens that it reads")
    parser.add_argument("--price-out", type=float, default=0.0, metavar="P", help="of a million tokens that it writes")
    parser.add_argument(
        "--structured", action="store_true", help="have the server hold replies to a JSON schema, where it can"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be asked, and what it would cost")
    parser.add_argument("--tokens-per-picture", type=int, default=1000, help="for --dry-run (default: %(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. A user's mistake prints one line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    if options.version:
        return _print_versions()
    if options.command is None:
        parser.print_help()
        return 2
    from sae_lens_multimodal.cli import commands

    try:
        commands.COMMANDS[options.command](options)
    except MultimodalError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt as stopped:
        sys.stderr.write(f"stopped{f': {stopped}' if str(stopped) else '; what was finished is on disk'}\n")
        return 130
    return 0


def _print_versions() -> int:
    from sae_lens_multimodal.files import package_versions

    for package, number in package_versions().items():
        sys.stdout.write(f"{package} {number}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
