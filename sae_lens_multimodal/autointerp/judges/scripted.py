"""A judge that answers by a rule given in Python: for tests, and for showing what a perfect or blind judge scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sae_lens_multimodal.autointerp.judges.base import Judge, JudgeReply, JudgeRequest, Outcome
from sae_lens_multimodal.errors import JudgeError


class ScriptedJudge(Judge):
    """Answers with what a function says, or with the next line of a list.

    Args:
        answers: a function from the request to its reply (text, a whole `JudgeReply`, or a failure made with
            `JudgeFailure.of`), or a sequence of replies used up in order.
        name: shown as the judge's id.

    Example:
        >>> judge = ScriptedJudge(lambda request: "yes" if "red" in request.text else "no")
        >>> judge.ask(JudgeRequest(parts=("is it red ?",))).text
        'yes'
    """

    def __init__(
        self, answers: Callable[[JudgeRequest], str | Outcome] | Sequence[str], *, name: str = "scripted"
    ) -> None:
        super().__init__()
        self._answer = answers if callable(answers) else None
        self._lines = iter(()) if callable(answers) else iter(answers)
        self._name = name
        self.requests: list[JudgeRequest] = []
        """Everything that was asked, in order."""

    @property
    def id(self) -> str:
        """The name given."""
        return self._name

    @property
    def gives_log_probabilities(self) -> bool:
        """It may: a whole `JudgeReply` can hold them."""
        return True

    def _replies(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[int, Outcome]]:
        for index, request in enumerate(requests):
            self.requests.append(request)
            answer = self._answer(request) if self._answer is not None else self._next_line()
            yield index, JudgeReply(text=answer) if isinstance(answer, str) else answer

    def _next_line(self) -> str:
        line = next(self._lines, None)
        if line is None:
            raise JudgeError(f"The script ran out after {len(self.requests) - 1} replies; give one for every request.")
        return line
