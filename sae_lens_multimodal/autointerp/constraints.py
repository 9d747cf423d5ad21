"""A judge that marks the constraints of questions; what it says must stand in the question, or it is a failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sae_lens_multimodal.autointerp.judges.base import FailureKind, Judge, JudgeFailure, JudgeReply, JudgeRequest
from sae_lens_multimodal.errors import ConfigError
from sae_lens_multimodal.hooks.constraints import ConstrainedQuestion, Constraint, Picture, mark

PROMPT_VERSION = "constraints-1"
_TASK = """A question about a picture holds constraints: words that the answer has to meet.
Visual ones stand for something in the picture, such as "this director" or "the man with the bat". Textual ones stand
for themselves, such as "Golden Globe" or "in 1994".
Question: {question}
Reply with JSON alone, copying the words exactly: {{"visual": ["..."], "textual": ["..."]}}.
Either list may be empty."""


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """What became of one question."""

    question: str
    found: ConstrainedQuestion | None
    """None where the judge failed."""
    failure: JudgeFailure | None = None


def annotate_constraints(
    judge: Judge,
    questions: Sequence[str],
    *,
    pictures: Sequence[Sequence[Picture]] | None = None,
    answers: Sequence[str | None] | None = None,
    progress: bool = True,
) -> list[Annotated]:
    """Have a judge mark the constraints of questions of any VQA data.

    Args:
        judge: any judge; it reads the question alone.
        questions: the questions.
        pictures: each question's pictures, for the result.
        answers: each question's answer, for the result.
        progress: show a bar.

    Returns:
        One for each question, in order. A reply that is no JSON of the shape asked for, marks nothing or names words
        that do not stand in the question, is a failure that is kept with the reply.

    Raises:
        JudgeError: the judge cannot be asked at all.
        ConfigError: there are not as many pictures or answers as questions.
    """
    for name, given in (("pictures", pictures), ("answers", answers)):
        if given is not None and len(given) != len(questions):
            raise ConfigError(f"Got {len(given)} {name} for {len(questions)} questions; expected one for each.")
    requests = [
        JudgeRequest(parts=(_TASK.format(question=one),), max_new_tokens=128, prompt_version=PROMPT_VERSION)
        for one in questions
    ]
    found = []
    for at, (request, outcome) in enumerate(zip(requests, judge.ask_all(requests, progress=progress), strict=True)):
        marked = outcome if isinstance(outcome, JudgeFailure) else _marked(request, outcome, questions[at])
        if isinstance(marked, JudgeFailure):
            found.append(Annotated(question=questions[at], found=None, failure=marked))
            continue
        question = ConstrainedQuestion(
            question=questions[at],
            constraints=marked,
            pictures=() if pictures is None else tuple(pictures[at]),
            answer=None if answers is None else answers[at],
            name=str(at),
        )
        found.append(Annotated(question=questions[at], found=question))
    return found


def _marked(request: JudgeRequest, reply: JudgeReply, question: str) -> tuple[Constraint, ...] | JudgeFailure:
    text = reply.text.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        value = json.loads(text)
        words = [(kind, one) for kind in ("visual", "textual") for one in value.get(kind, [])]
        constraints = [mark(question, one, kind=kind) for kind, one in words]
    except (json.JSONDecodeError, AttributeError, TypeError, ConfigError) as error:
        return JudgeFailure.of(request, FailureKind.UNPARSABLE, f"The judge's reply is of no use: {error}", reply.text)
    if not constraints:
        return JudgeFailure.of(request, FailureKind.UNPARSABLE, "The judge marked nothing.", reply.text)
    return tuple(sorted(constraints, key=lambda one: one.start))
