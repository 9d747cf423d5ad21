"""Which rows of a dataset were read, skipped or cut, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES_PER_REASON = 5


@dataclass
class SkipReport:
    """How many rows were read, kept and skipped, and why."""

    read: int = 0
    """Rows read."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows skipped, by reason."""
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """For each reason, the first few rows it met: index and message."""
    truncated: int = 0
    """Prompts that were kept, but cut at `context_size`."""

    @property
    def skipped(self) -> int:
        """Rows skipped in all."""
        return self.reasons.total()

    @property
    def kept(self) -> int:
        """Rows that became prompts."""
        return self.read - self.skipped

    def skip(self, reason: str, row: int, detail: str) -> None:
        """Count a row as skipped."""
        self.reasons[reason] += 1
        self._remember(reason, [(row, detail)])

    def add(self, other: SkipReport) -> None:
        """Count in addition what another report counts."""
        self.read += other.read
        self.truncated += other.truncated
        self.reasons.update(other.reasons)
        for reason, examples in other.examples.items():
            self._remember(reason, examples)

    def _remember(self, reason: str, examples: list[tuple[int, str]]) -> None:
        known = self.examples.setdefault(reason, [])
        new = [one for one in examples if one not in known]
        known += new[: _EXAMPLES_PER_REASON - len(known)]

    def summary(self) -> str:
        """One line for people.

        Example:
            >>> report = SkipReport(read=3)
            >>> report.skip("picture cannot be opened", 1, "truncated")
            >>> report.summary()
            '3 rows read, 2 kept, 1 skipped: 1 picture cannot be opened (first: row 1, truncated)'
        """
        head = f"{self.read} rows read, {self.kept} kept, {self.skipped} skipped"
        if self.truncated:
            head += f", {self.truncated} cut at context_size"
        if not self.reasons:
            return head
        reasons = []
        for reason, count in self.reasons.most_common():
            row, detail = self.examples[reason][0]
            reasons.append(f"{count} {reason} (first: row {row}, {detail})")
        return f"{head}: {'; '.join(reasons)}"

    def lines(self) -> list[str]:
        """A list for people of the rows that were skipped: a line for each reason and for each row remembered.

        Example:
            >>> report = SkipReport(read=9)
            >>> report.skip("picture cannot be opened", 1, "it is cut short")
            >>> report.lines()
            ['1 of 9 rows skipped: picture cannot be opened', '  row 1: it is cut short']
        """
        lines = []
        for reason, count in self.reasons.most_common():
            examples = self.examples.get(reason, [])
            lines.append(f"{count} of {self.read} rows skipped: {reason}")
            lines += [f"  row {row}: {detail}" for row, detail in examples]
            if count > len(examples):
                lines.append(f"  and {count - len(examples)} more")
        if self.truncated:
            lines.append(f"{self.truncated} of {self.read} prompts cut at context_size")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The counts and examples as JSON values, for a manifest."""
        return {
            "read": self.read,
            "kept": self.kept,
            "skipped": self.skipped,
            "truncated": self.truncated,
            "reasons": dict(self.reasons),
            "examples": {reason: [list(one) for one in examples] for reason, examples in self.examples.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SkipReport:
        """Read what `to_dict` gave."""
        return cls(
            read=int(content["read"]),
            reasons=Counter(content["reasons"]),
            examples={
                reason: [(int(row), str(detail)) for row, detail in examples]
                for reason, examples in content["examples"].items()
            },
            truncated=int(content.get("truncated", 0)),
        )
