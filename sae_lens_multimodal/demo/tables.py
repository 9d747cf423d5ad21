"""The demo's numbers as tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_lens_multimodal.report.records import Cell, SummaryTable


def summary_tables(metrics: Mapping[str, Any]) -> list[SummaryTable]:
    """Arrange the metrics of a demo in small tables."""
    *first, steering = report_tables(metrics)
    return [*first, _scores(metrics["scores"]), steering]


def report_tables(metrics: Mapping[str, Any]) -> list[SummaryTable]:
    """Arrange those that a report does not sum up itself."""
    return [
        _reconstruction(metrics["reconstruction"]),
        _truth(metrics["truth"]),
        _naming(metrics["naming"]),
        _steering(metrics["steering"]),
    ]


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Write the tables as lines of plain text."""
    lines: list[str] = []
    for table in summary_tables(metrics):
        rows = [table.columns, *([_text(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
        lines += [table.caption]
        lines += ["  " + "  ".join(_padded(row, widths)) for row in rows]
        lines += [""]
    return [*lines, f"seconds: {sum(metrics['seconds'].values()):.0f} in all"]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _reconstruction(found: Mapping[str, Any]) -> SummaryTable:
    columns = ("explained_variance", "l0", "dead_share", "n_tokens")
    return SummaryTable(
        caption="Reconstruction, by modality",
        columns=("tokens", "explained variance", "L0", "dead", "measured"),
        rows=[(name, *(found[name][column] for column in columns)) for name in ("image", "text")],
        note="Measured on scenes that were not trained on; dead: share of all features that never fire there.",
    )


def _truth(found: Mapping[str, Any]) -> SummaryTable:
    kinds = ("colour", "shape", "texture", "glyph", "pairs", "background")
    sae = found["sae"]
    rows: list[tuple[Cell, ...]] = []
    for name, summary in found.items():
        if name == "cross_modal":
            continue
        for modality in ("image", "text"):
            best = (summary[modality]["elsewhere"][kind] for kind in kinds)
            rows.append((f"{name}, {modality}", *best, summary["clear_share"] if modality == "image" else None))
    return SummaryTable(
        caption=f"Best feature against the known truth ({sae['clear']} of {sae['live']} live features are clear, "
        f"{len(found['cross_modal'])} of them for what is seen and said alike)",
        columns=("average precision on", *kinds, "clear"),
        rows=rows,
        note="The best feature for each value, chosen on one half of the scenes and measured on the other; mean over "
        "the values. Image: against pixel masks. Text: against the words that name the attribute. Pairs: of colour, "
        "texture and shape. Clear: share of live features that fit some concept with at least 0.5, and as far above "
        "chance.",
    )


def _naming(found: Mapping[str, Any]) -> SummaryTable:
    columns = ("asked", "explained", "nothing_in_common", "clear", "right", "shuffled")
    return SummaryTable(
        caption="Explanations that name the right attribute",
        columns=("explained from", "asked", "explained", "nothing", "clear", "right", "shuffled"),
        rows=[(name, *(found[name][column] for column in columns)) for name in ("image", "text")],
        note="Right: share of the clear features. Shuffled: the same with another feature's explanation.",
    )


def _scores(found: Sequence[Mapping[str, Any]]) -> SummaryTable:
    return SummaryTable(
        caption="Judged explanations (balanced accuracy, chance 0.5)",
        columns=("test", "scored", "of", "score", "shuffled", "lift", "95% interval", "strict lift"),
        rows=[
            (
                f"{one['scorer']}, {one['modality']}",
                one["n_scored"],
                one["n_features"],
                _mean(one["balanced_accuracy"]),
                _mean(one["control_balanced_accuracy"]),
                _mean(one["lift"]),
                _interval(one["lift"]),
                _mean(one["lift_strict"]),
            )
            for one in found
        ],
        note="On examples that the explainer never saw. Lift: above the same test with another feature's explanation. "
        "Strict: over all features, with failures and missing explanations against them.",
    )


def _mean(interval: Mapping[str, float] | None) -> float | None:
    return None if interval is None else interval["mean"]


def _interval(interval: Mapping[str, float] | None) -> str:
    return "-" if interval is None else f"{interval['low']:.2f} to {interval['high']:.2f}"


def _steering(found: Mapping[str, Any]) -> SummaryTable:
    return SummaryTable(
        caption=f"Steering: one of two objects given another colour or shape ({found['features']} features)",
        columns=("lists of objects", "cases", "steered", "random feature", "other kept"),
        rows=[("colour and shape", found["cases"], found["success"], found["random_feature"], found["others_kept"])],
        note="Steered: the list names the object with the new attribute. Random feature: another one, set as high. "
        "Other kept: the second object is still named rightly.",
    )
