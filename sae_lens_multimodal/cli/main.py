"""The console script: its commands and how their mistakes are shown."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

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
    _add_harvest(commands)
    _add_explain(commands)
    _add_score(commands)
    _add_report(commands)
    _add_steer(commands)
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


def _add_harvest(commands: Commands[argparse.ArgumentParser]) -> None:
    harvest = commands.add_parser("harvest", help="top examples and statistics of every feature, in one pass")
    _add_model(harvest)
    harvest.add_argument("--dataset", required=True, help="hub name, folder, or .parquet/.json file")
    harvest.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    harvest.add_argument("--output", type=Path, required=True, help="folder of the feature store")
    harvest.add_argument("--max-prompts", type=int, help="stop after this many prompts")
    harvest.add_argument("--batch-size", type=int, default=8, help="prompts a forward pass (default: %(default)s)")
    harvest.add_argument("--n-top", type=int, default=16, help="top examples a feature (default: %(default)s)")
    harvest.add_argument("--rank", choices=("max", "mean"), default="max", help="by what the top is chosen")
    harvest.add_argument("--keep-images", choices=("bytes", "reference"), default="bytes")
    harvest.add_argument("--seed", type=int, default=0)


def _add_explain(commands: Commands[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser("explain", help="have a VLM explain features from where they fire")
    explain.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    _add_judge(explain)
    explain.add_argument("--features", help="for example 3,17,40-60 (default: all that have examples)")
    explain.add_argument("--output", type=Path, help="folder for explanations.jsonl (default: inside the store)")
    explain.add_argument("--seed", type=int, default=0)


def _add_score(commands: Commands[argparse.ArgumentParser]) -> None:
    score = commands.add_parser("score", help="have a judge score the explanations on examples that were not shown")
    score.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    _add_judge(score)
    score.add_argument("--explanations", type=Path, help="explanations.jsonl (default: the store's own)")
    score.add_argument("--output", type=Path, help="folder for scores.jsonl (default: inside the store)")
    score.add_argument("--seed", type=int, default=0)


def _add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="a browsable report from a feature store")
    report.add_argument("store", type=Path, help="folder of a feature store (made by harvest)")
    report.add_argument("--output", type=Path, required=True, help="folder of the report")
    report.add_argument("--explanations", type=Path, help="folder or file of explanations (default: the store's own)")
    report.add_argument("--scores", type=Path, help="folder of scores (default: the store's own)")
    report.add_argument("--title", help="title of the report")


def _add_steer(commands: Commands[argparse.ArgumentParser]) -> None:
    steer = commands.add_parser("steer", help="ask a question with and without steered features")
    _add_model(steer)
    steer.add_argument("--image", type=Path, action="append", default=[], help="a picture (repeat for several)")
    steer.add_argument("--prompt", required=True, help="the question")
    steer.add_argument("--set", action="append", default=[], metavar="F=X", help="set feature F to X")
    steer.add_argument("--add", action="append", default=[], metavar="F=X", help="add X to feature F")
    steer.add_argument("--scale", action="append", default=[], metavar="F=X", help="multiply feature F by X")
    steer.add_argument("--ablate", action="append", default=[], metavar="F", help="set feature F to zero")
    steer.add_argument("--tokens", choices=("all", "image", "text", "last"), default="all")
    steer.add_argument("--steps", choices=("all", "prefill", "decoding"), default="all")
    steer.add_argument("--error", choices=("keep", "drop"), default="keep", help="what becomes of the SAE's error")
    steer.add_argument("--max-new-tokens", type=int, default=64)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub name or folder of a vision-language model")
    parser.add_argument("--sae", type=Path, required=True, help="folder of an SAE-Lens SAE")
    parser.add_argument("--hook", help="where the SAE reads (default: what its metadata say)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, … (default: the checkpoint's)")


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", required=True, help="model name at the server, or hub name or folder to load here")
    parser.add_argument("--base-url", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    parser.add_argument("--device", default="cpu", help="where to run a judge that is loaded here")
    parser.add_argument(
        "--dialect", choices=("general", "scenes"), default="general", help="how the judge is spoken to"
    )


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
