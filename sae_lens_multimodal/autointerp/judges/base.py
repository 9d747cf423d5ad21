"""What a judge is: it answers requests made of text and pictures, or says in a typed failure why it did not."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeAlias, final

from PIL import Image
from tqdm import tqdm

from sae_lens_multimodal.autointerp.judges.log_probabilities import ReplyToken

Part: TypeAlias = str | Image.Image
"""One piece of a request: text, or a picture."""

PICTURE_MARK = "<image>"
"""Stands for a picture where a request is shown as text."""


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One question to a judge."""

    parts: tuple[Part, ...]
    """Text and pictures in the order in which the judge reads them."""
    max_new_tokens: int = 64
    """The longest reply, in tokens."""
    choices: tuple[str, ...] | None = None
    """The only valid replies; any other is an unparsable one. None: free text."""
    schema: str | None = None
    """The reply's JSON schema, for judges that can be held to one; the prompt says the same in words, and readers
    check the reply whether or not it was held to it."""
    prompt_version: str = ""
    """Which phrasing this is; a new version is never answered from an old version's cache."""
    top_log_probabilities: int = 0
    """How many of the likeliest tokens to name at every place of the reply, with their log-probabilities, where the
    judge can; 0: none are asked for."""
    given_reply: str | None = None
    """Words that the judge does not choose: it says how likely each of their tokens is as its reply. Only some can."""

    @cached_property
    def digest(self) -> str:
        """Hash of everything that can change the answer, apart from the judge."""
        content = hashlib.sha256()
        _feed(content, f"{self.prompt_version}|{self.max_new_tokens}|{self.choices!r}".encode())
        if self.top_log_probabilities or self.given_reply is not None:
            _feed(content, f"log-probabilities {self.top_log_probabilities} of {self.given_reply!r}".encode())
        for part in self.parts:
            if isinstance(part, str):
                _feed(content, b"text" + part.encode())
            else:
                _feed(content, f"{part.mode}{part.size}".encode() + part.tobytes())
        return content.hexdigest()

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The pictures among the parts."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        """The request as text, with a mark for every picture."""
        return "\n".join(part if isinstance(part, str) else PICTURE_MARK for part in self.parts)


def _feed(content: hashlib._Hash, piece: bytes) -> None:
    """Add a piece together with its length, so that two pieces cannot pass for one."""
    content.update(len(piece).to_bytes(8, "big"))
    content.update(piece)


class FailureKind(StrEnum):
    """Why there is no answer."""

    REFUSED = "refused"
    """The model declined, or a content filter did."""
    REJECTED = "rejected"
    """The request was not accepted: too long, or a shape that the judge cannot read."""
    SERVER = "server"
    """The server reported an error of its own, also after retries."""
    TIMEOUT = "timeout"
    """No reply in time."""
    EMPTY = "empty"
    """A reply without text."""
    UNPARSABLE = "unparsable"
    """A reply in another shape than asked for."""


TRANSIENT = frozenset({FailureKind.SERVER, FailureKind.TIMEOUT, FailureKind.EMPTY})
"""Kinds of failure that another try may cure."""


@dataclass(frozen=True, kw_only=True)
class JudgeReply:
    """What the judge said."""

    text: str
    """Stripped of blanks; one of the request's choices, spelt as there, if it had any."""
    cached: bool = False
    """Whether it was read from the answer cache."""
    tokens_in: int = 0
    """Tokens of the prompt; 0 where the judge does not say."""
    tokens_out: int = 0
    """Tokens of the reply; 0 where the judge does not say."""
    seconds: float = 0.0
    """How long it took; shared evenly among requests answered as one batch."""
    log_probabilities: tuple[ReplyToken, ...] | None = field(default=None, repr=False)
    """Of each token of the reply as it came; None where they were not asked for, or the judge gives none."""


@dataclass(frozen=True, kw_only=True)
class JudgeFailure:
    """That there is no usable answer, and why."""

    kind: FailureKind
    message: str
    """One line: what was got and what was expected."""
    digest: str
    """Hash of the request."""
    prompt: str
    """The request as text."""
    reply: str | None = None
    """The reply as it came, if one came."""
    cost: JudgeReply | None = field(default=None, compare=False, repr=False)
    """What came back and is of no use, with what it cost; it is not written down."""

    @classmethod
    def of(
        cls,
        request: JudgeRequest,
        kind: FailureKind,
        message: str,
        reply: str | None = None,
        *,
        cost: JudgeReply | None = None,
    ) -> JudgeFailure:
        """Say that `request` failed."""
        line = " ".join(message.split())
        return cls(kind=kind, message=line, digest=request.digest, prompt=request.text, reply=reply, cost=cost)

    def to_json(self) -> dict[str, Any]:
        """Give the failure as JSON values."""
        return {
            "kind": self.kind.value,
            "message": self.message,
            "digest": self.digest,
            "prompt": self.prompt,
            "reply": self.reply,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JudgeFailure:
        """Read what `to_json` gave."""
        return cls(**{**value, "kind": FailureKind(value["kind"])})


Outcome: TypeAlias = JudgeReply | JudgeFailure
"""What becomes of a request."""


@dataclass
class Ledger:
    """What a judge was asked and what it cost."""

    calls: int = 0
    """Requests that the judge itself worked on."""
    cached: int = 0
    """Requests answered from the cache, at no cost."""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    """Time of all calls added up; with calls side by side, more than the clock shows."""
    failures: Counter[str] = field(default_factory=Counter)
    """How many requests failed, by kind."""

    def record(self, raw: Outcome, outcome: Outcome) -> None:
        """Count one request: what came back, and what was made of it. A reply that is of no use has its cost, too."""
        if isinstance(outcome, JudgeFailure):
            self.failures[outcome.kind.value] += 1
        came = raw if isinstance(raw, JudgeReply) else raw.cost
        if came is not None and came.cached:
            self.cached += 1
            return
        self.calls += 1
        if came is not None:
            self.tokens_in += came.tokens_in
            self.tokens_out += came.tokens_out
            self.seconds += came.seconds

    def since(self, before: Ledger) -> Ledger:
        """Give what was added to an earlier state of the same ledger."""
        return Ledger(
            **{name: getattr(self, name) - getattr(before, name) for name in _SUMS},
            failures=self.failures - before.failures,
        )

    def plus(self, other: Ledger) -> Ledger:
        """Give the sum of two ledgers."""
        return Ledger(
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            failures=self.failures + other.failures,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Ledger:
        """Read what `to_json` gave."""
        return cls(**{**value, "failures": Counter(value["failures"])})

    def to_json(self) -> dict[str, Any]:
        """Give the ledger as JSON values."""
        return {
            "calls": self.calls,
            "cached": self.cached,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "seconds": round(self.seconds, 3),
            "failures": dict(sorted(self.failures.items())),
        }


_SUMS = ("calls", "cached", "tokens_in", "tokens_out", "seconds")


class Judge(ABC):
    """A model that answers requests.

    A subclass gives `id` and `_replies`. A failure that concerns one request is an outcome; a judge that cannot be
    asked at all raises `JudgeError`.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()

    @property
    @abstractmethod
    def id(self) -> str:
        """Which model this is, as shown to people. Never holds a secret."""

    @property
    def cache_name(self) -> str:
        """What answers are cached under: the id and every setting that can change an answer."""
        return self.id

    @property
    def gives_log_probabilities(self) -> bool:
        """Whether it may say how likely the tokens of its replies were; a server is only known once it was asked."""
        return False

    @property
    def rates_given_replies(self) -> bool:
        """Whether it can say how likely words are that it did not choose."""
        return False

    @abstractmethod
    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield every request's index and raw outcome once, in any order, as soon as it is known."""

    @final
    def stream(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        """Yield every request's index and outcome once, in the order in which they become known.

        Raises:
            JudgeError: the judge cannot be asked at all; what was yielded before stays valid.
        """
        for index, raw in self._replies(requests):
            outcome = checked(requests[index], raw)
            self.ledger.record(raw, outcome)
            yield index, outcome

    @final
    def ask_all(self, requests: Sequence[JudgeRequest], *, progress: bool = True) -> list[Outcome]:
        """Answer many requests; outcomes come in the order of the requests."""
        outcomes: dict[int, Outcome] = {}
        with tqdm(total=len(requests), desc="judge", unit="request", disable=not progress) as bar:
            for index, outcome in self.stream(requests):
                outcomes[index] = outcome
                bar.update()
        return [outcomes[index] for index in range(len(requests))]

    @final
    def ask(self, request: JudgeRequest) -> Outcome:
        """Answer one request."""
        return self.ask_all([request], progress=False)[0]


def checked(request: JudgeRequest, outcome: Outcome) -> Outcome:
    """Turn a reply that is empty or none of the request's choices into a failure.

    Example:
        >>> request = JudgeRequest(parts=("is it red ?",), choices=("yes", "no"))
        >>> checked(request, JudgeReply(text=" Yes.")).text
        'yes'
        >>> checked(request, JudgeReply(text="perhaps")).kind
        <FailureKind.UNPARSABLE: 'unparsable'>
    """
    if isinstance(outcome, JudgeFailure):
        return outcome
    text = outcome.text.strip()
    if not text:
        message = "The judge's reply has no text."
        return JudgeFailure.of(request, FailureKind.EMPTY, message, outcome.text, cost=outcome)
    if request.choices is not None:
        spelt = {choice.casefold(): choice for choice in request.choices}
        bare = text.strip(" .!\"'").casefold()
        if bare not in spelt:
            message = f"The judge replied {_short(text)}; expected one of {', '.join(map(repr, request.choices))}."
            return JudgeFailure.of(request, FailureKind.UNPARSABLE, message, outcome.text, cost=outcome)
        text = spelt[bare]
    return dataclasses.replace(outcome, text=text)


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
