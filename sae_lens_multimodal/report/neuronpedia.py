"""Exporting features in Neuronpedia's own formats: the folder that its importer reads, and what its interface takes.

The layout and the names of the fields are those of SAEDashboard (`neuronpedia_export.py`) and of Neuronpedia
(`lib/db/import.ts`, `prisma/schema.prisma`, `api/feature/upload-batch`), as of August 2026.
"""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae_lens_multimodal.errors import ConfigError, StoreError
from sae_lens_multimodal.files import MANIFEST_NAME, read_json, write_bytes, write_manifest
from sae_lens_multimodal.report.formats import utf8
from sae_lens_multimodal.report.gather import name_of
from sae_lens_multimodal.report.neuronpedia_heads import NeuronpediaNames, created, head_rows
from sae_lens_multimodal.report.neuronpedia_rows import FeatureRows, RowMaker
from sae_lens_multimodal.report.runs import SortedRun

if TYPE_CHECKING:
    from sae_lens_multimodal.features.store import FeatureStore
    from sae_lens_multimodal.report.records import Run

KIND, SCHEMA_VERSION = "neuronpedia-export", 1
BATCH = 128
"""Features to a file; the most that one upload may hold."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One SAE on one model, as Neuronpedia names it."""

    model_id: str
    source_id: str


def export_neuronpedia(
    store: FeatureStore,
    output: Path | str,
    *,
    run: Run | None = None,
    output_tokens: Mapping[int, Sequence[tuple[str, float]]] | None = None,
    features: Sequence[int] | None = None,
    names: NeuronpediaNames | None = None,
    max_examples: int = 16,
    max_tokens: int = 128,
    progress: bool = True,
) -> Path:
    """Write a store's features as Neuronpedia imports them; see docs/report.md for what fits and what does not.

    Args:
        store: what every feature responds to.
        output: a new folder, or one with an earlier export, which is replaced.
        run: explanations and scores, as `read_run` reads them; measures and verdicts have no place there.
        output_tokens: tokens that a feature writes towards; None: those of the store's descriptions.
        features: which; None: all that were ever active.
        names: what things are called there.
        max_examples: of each list of each modality.
        max_tokens: tokens shown of each example, around the strongest; a picture counts as one. At most 1024.
        progress: show a bar on stderr.

    Returns:
        The folder of the source, as the importer expects it: `output/{model}/{layer}-{set}`.

    Raises:
        ConfigError: a name that Neuronpedia does not take, a hook without a layer, or too many tokens.
        FeatureError: a feature is not in the store.
        StoreError: the folder holds something else.
    """
    output, names = Path(output).resolve(), names or NeuronpediaNames()
    if not 1 <= max_tokens <= 1024 or max_examples < 1:
        raise ConfigError(f"max_tokens={max_tokens}, max_examples={max_examples}; expected 1 to 1024, and at least 1.")
    _check_output(output)
    source = _source(store, names)
    maker = RowMaker(
        store=store,
        run=None if run is None else SortedRun.of(run),
        output_tokens=output_tokens,
        model_id=source.model_id,
        source_id=source.source_id,
        names=names,
        created=created(store),
        max_examples=max_examples,
        max_tokens=max_tokens,
    )
    chosen = list(store.features if features is None else features)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        building = Path(folder) / "export"
        part = building / source.model_id / source.source_id
        for name, row in head_rows(store, names, source.model_id, source.source_id).items():
            write_bytes(part / f"{name}.jsonl", _lines([row]))
        for number, start in enumerate(tqdm(range(0, len(chosen), BATCH), desc="export", disable=not progress)):
            rows = [maker.rows(feature) for feature in chosen[start : start + BATCH]]
            _write_batch(part, number, rows, source)
        settings = {"model_id": source.model_id, "source_id": source.source_id, "n_features": len(chosen)}
        write_manifest(building, kind=KIND, schema_version=SCHEMA_VERSION, settings=settings)
        if output.exists():
            output.rename(Path(folder) / "replaced")
        building.rename(output)
    return output / source.model_id / source.source_id


def _source(store: FeatureStore, names: NeuronpediaNames) -> _Source:
    layer = names.layer
    if layer is None:
        found = re.search(r"(?:^|\.)blocks\.(\d+)\.", store.hook_name)
        if found is None:
            raise ConfigError(f"the hook {store.hook_name!r} names no layer; give NeuronpediaNames(layer=...).")
        layer = int(found[1])
    model_id = names.model_id or _spelt(name_of(store.settings.get("model_name")) or "")
    for what, name in (("model_id", model_id), ("source_set", names.source_set)):
        if not re.fullmatch(r"[a-z0-9_-]{1,128}", name):
            raise ConfigError(f"{what} is {name!r}; Neuronpedia takes small letters, digits, dashes and underscores.")
    return _Source(
        model_id=model_id,
        source_id=f"{layer}-{names.source_set}",
    )


def _spelt(name: str) -> str:
    """Make a name of what a hub or a folder calls a model.

    Example:
        >>> _spelt("llava-hf/Llama3-LLaVA.NeXT-8B")
        'llama3-llava-next-8b'
    """
    return re.sub(r"[^a-z0-9_-]+", "-", name.rpartition("/")[2].lower()).strip("-")


def _write_batch(folder: Path, number: int, batch: Sequence[FeatureRows], source: _Source) -> None:
    tables = {
        "features": [one.feature for one in batch],
        "activations": [row for one in batch for row in one.activations],
        "explanations": [row for one in batch for row in one.explanations],
        "explanation_scores": [row for one in batch for row in one.scores],
    }
    for name, rows in tables.items():
        if rows:
            packed = gzip.compress(_lines(rows), compresslevel=5, mtime=0)
            write_bytes(folder / name / f"batch-{number}.jsonl.gz", packed)
    uploaded = [one.upload for one in batch if one.upload["activations"]]
    if uploaded:
        body = {"modelId": source.model_id, "source": source.source_id, "features": uploaded}
        write_bytes(folder / "upload" / f"batch-{number}.json", _lines([body]))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_cleaned(row), allow_nan=False) + "\n" for row in rows).encode()


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Replace what a database refuses: half surrogate pairs, and the character 0."""
    if isinstance(value, str):
        return utf8(value).replace("\0", " ")
    if isinstance(value, Mapping):
        return {key: _cleaned(one) for key, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list | tuple) else value


def _check_output(output: Path) -> None:
    """See that nothing of the user's own would be replaced."""
    if not output.exists():
        return
    if not output.is_dir():
        raise StoreError(f"{output} is a file; give a folder for the export.")
    found = {entry.name for entry in output.iterdir()}
    manifest = read_json(output / MANIFEST_NAME) if MANIFEST_NAME in found else {}
    if found and (not isinstance(manifest, dict) or manifest.get("kind") != KIND):
        raise StoreError(f"{output} is not empty and holds no export for Neuronpedia; give a new folder.")
