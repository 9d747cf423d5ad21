"""Making the features' pages, one after the other or in several processes at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.report.assets import Assets
from sae_lens_multimodal.report.gather import Findings, Limits, Links, feature_view
from sae_lens_multimodal.report.index_data import IndexEntry
from sae_lens_multimodal.report.render import render_feature
from sae_lens_multimodal.report.script_data import write_page

if TYPE_CHECKING:
    from sae_lens_multimodal.report.view import ReportView


@dataclass(frozen=True, kw_only=True)
class Pages:
    """What is needed to make any page of a report."""

    folder: Path
    report: ReportView
    links: Links
    limits: Limits

    def write(self, store: FeatureStore, assets: Assets, feature: int, findings: Findings) -> IndexEntry:
        """Write one feature's page, and give what the index says of it."""
        view = feature_view(store, feature, findings, self.links, assets, self.limits)
        write_page(self.folder / view.url, render_feature(self.report, view))
        return IndexEntry.of(view)


def write_pages(
    store: FeatureStore, pages: Pages, features: Iterable[int], findings: Findings, *, workers: int
) -> Iterator[IndexEntry]:
    """Write the pages of features, and yield what the index says of each, in order.

    Args:
        store: what every feature responds to.
        pages: what all pages need.
        features: which.
        findings: what was found out about them.
        workers: processes; 1 for none beside this one.
    """
    if workers <= 1:
        assets = Assets(pages.folder)
        yield from (pages.write(store, assets, feature, findings) for feature in features)
        return
    tasks = ((feature, findings.only(feature)) for feature in features)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(store.folder, store.dataset, pages)
    ) as pool:
        yield from pool.map(_write, tasks)


_worker: tuple[FeatureStore, Assets, Pages] | None = None
"""What a process of its own works with."""


def _begin(folder: Path, dataset: object, pages: Pages) -> None:
    global _worker
    _worker = (FeatureStore.open(folder, dataset=dataset), Assets(pages.folder), pages)


def _write(task: tuple[int, Findings]) -> IndexEntry:
    assert _worker is not None
    store, assets, pages = _worker
    return pages.write(store, assets, *task)
