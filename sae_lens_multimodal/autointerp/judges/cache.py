"""An answer cache that wraps any judge: one SQLite file, keyed by the content of the request and the judge's id."""

from __future__ import annotations

import dataclasses
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from sae_lens_multimodal.autointerp.judges.base import (
    FailureKind,
    Judge,
    JudgeFailure,
    JudgeReply,
    JudgeRequest,
    Outcome,
)
from sae_lens_multimodal.autointerp.judges.log_probabilities import tokens_from_text, tokens_to_text
from sae_lens_multimodal.autointerp.judges.wrapped import WrappedJudge
from sae_lens_multimodal.errors import StoreError

SCHEMA_VERSION = 1

_ANSWERS = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    judge TEXT NOT NULL,
    prompt TEXT NOT NULL,
    reply TEXT NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    seconds REAL NOT NULL,
    created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""
# a table of its own: files made before it stay good, and versions of the package that do not know it pass it over
_LOG_PROBABILITIES = """
CREATE TABLE IF NOT EXISTS log_probabilities (
    key TEXT PRIMARY KEY REFERENCES answers (key),
    tokens TEXT NOT NULL
)
"""


class CachedJudge(WrappedJudge):
    """Asks the judge inside only what was never asked before; equal requests of one call are asked once.

    Replies are kept whether or not they parse; other failures are not, so that a later run tries again.

    Args:
        judge: who answers what is not known yet.
        path: the SQLite file; made if missing.

    Raises:
        StoreError: the file is not an answer cache of this version.
    """

    def __init__(self, judge: Judge, path: Path | str) -> None:
        super().__init__(judge)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open_schema()
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path} is not an answer cache ({error}); give another file.") from error

    def __len__(self) -> int:
        """How many answers are kept."""
        with closing(self._connect()) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30.0, isolation_level=None)

    def _open_schema(self) -> None:
        with closing(self._connect()) as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if found != SCHEMA_VERSION and tables:
                raise StoreError(
                    f"{self.path} has schema version {found}; this version of the package reads {SCHEMA_VERSION}. "
                    "Give another file."
                )
            connection.execute(_ANSWERS)
            connection.execute(_LOG_PROBABILITIES)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def knows(self, request: JudgeRequest) -> bool:
        """Tell whether a request was answered before."""
        with closing(self._connect()) as connection:
            return _look_up(connection, self._key(request)) is not None

    def _key(self, request: JudgeRequest) -> str:
        return hashlib.sha256(f"{self.judge.cache_name}\n{request.digest}".encode()).hexdigest()

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        places: dict[str, list[int]] = {}
        with closing(self._connect()) as connection:
            for index, request in enumerate(requests):
                key = self._key(request)
                known = None if key in places else _look_up(connection, key)
                if known is not None:
                    yield index, known
                else:
                    places.setdefault(key, []).append(index)
            unknown = list(places)
            for position, outcome in self.judge.stream([requests[places[key][0]] for key in unknown]):
                key = unknown[position]
                reply = _reply_to_keep(outcome)
                if reply is not None:
                    self._keep(connection, key, requests[places[key][0]], reply)
                yield from ((index, _repeated(outcome, again=n > 0)) for n, index in enumerate(places[key]))

    def _keep(self, connection: sqlite3.Connection, key: str, request: JudgeRequest, reply: JudgeReply) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT OR REPLACE INTO answers (key, judge, prompt, reply, tokens_in, tokens_out, seconds) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, self.judge.id, request.text, reply.text, reply.tokens_in, reply.tokens_out, reply.seconds),
        )
        if reply.log_probabilities is not None:
            connection.execute(
                "INSERT OR REPLACE INTO log_probabilities (key, tokens) VALUES (?, ?)",
                (key, tokens_to_text(reply.log_probabilities)),
            )
        connection.execute("COMMIT")


def _look_up(connection: sqlite3.Connection, key: str) -> JudgeReply | None:
    query = (
        "SELECT reply, tokens_in, tokens_out, seconds, tokens FROM answers LEFT JOIN log_probabilities USING (key) "
        "WHERE key = ?"
    )
    row = connection.execute(query, (key,)).fetchone()
    if row is None:
        return None
    return JudgeReply(
        text=row[0],
        cached=True,
        tokens_in=row[1],
        tokens_out=row[2],
        seconds=row[3],
        log_probabilities=None if row[4] is None else tokens_from_text(row[4]),
    )


def _reply_to_keep(outcome: Outcome) -> JudgeReply | None:
    """Take the reply as it came, one that does not parse included: asking again would bring the same."""
    if isinstance(outcome, JudgeReply):
        return outcome
    if outcome.kind is not FailureKind.UNPARSABLE or not outcome.reply:
        return None
    return outcome.cost or JudgeReply(text=outcome.reply)


def _repeated(outcome: Outcome, *, again: bool) -> Outcome:
    """Mark the second and later answers to equal requests as cached: they cost nothing."""
    if isinstance(outcome, JudgeFailure) or not again:
        return outcome
    return dataclasses.replace(outcome, cached=True)
