"""Dividing what is asked, and asking what was held out by whole answers: of the set, and of what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sae_lens_multimodal.adapters.model import VisionLanguageModel
from sae_lens_multimodal.hooks.control_questions import Example, Questions
from sae_lens_multimodal.hooks.control_records import AnswerPair, Outcome, Rate
from sae_lens_multimodal.hooks.control_split import divide

Match = Callable[[str, str], bool]
"""Whether an answer is the wanted one."""


def same_answer(answer: str, wanted: str) -> bool:
    """Tell whether two answers are the same but for case and surrounding blanks."""
    return answer.strip().lower() == wanted.strip().lower()


@dataclass(frozen=True, kw_only=True)
class Split:
    """Examples and guards of the search, and those held out."""

    examples: Questions
    guards: Questions
    held_examples: Questions
    held_guards: Questions
    held_groups: tuple[list[int], list[int]]
    """For held-out examples and guards, the number of each one's group of pictures."""
    positives: Questions
    """Those that the search may see."""
    n_left_out: int
    """Positives that it may not see."""
    pictures_shared: bool

    @classmethod
    def of(
        cls,
        model: VisionLanguageModel,
        examples: Sequence[Example],
        guards: Sequence[Example],
        positives: Sequence[Example],
        *,
        share: float,
        seed: int,
        batch_size: int,
    ) -> Split:
        """Divide examples and guards, and leave out positives that show what is held out."""
        lists = (examples, guards)
        asked = [[one.conversation for one in some] for some in (*lists, positives)]
        division = divide(asked[:2], share, seed, positives=asked[2])

        def questions(some: Sequence[Example], flags: Sequence[bool], side: bool) -> Questions:
            chosen = [one for one, flag in zip(some, flags, strict=True) if flag == side]
            return Questions(model, chosen, batch_size=batch_size)

        groups = [
            [group for group, flag in zip(some, flags, strict=True) if flag]
            for some, flags in zip(division.groups, division.held, strict=True)
        ]
        return cls(
            examples=questions(examples, division.held[0], False),
            guards=questions(guards, division.held[1], False),
            held_examples=questions(examples, division.held[0], True),
            held_guards=questions(guards, division.held[1], True),
            held_groups=(groups[0], groups[1]),
            positives=questions(positives, division.left_out, False),
            n_left_out=sum(division.left_out),
            pictures_shared=division.pictures_shared,
        )


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts and how the model answers them by itself."""

    split: Split
    match: Match
    max_new_tokens: int
    before: tuple[list[str], list[str]]

    @classmethod
    def of(cls, model: VisionLanguageModel, split: Split, match: Match, max_new_tokens: int) -> HeldOut:
        """Ask the model by itself."""
        return cls(split, match, max_new_tokens, _asked(model, split, max_new_tokens))

    def ask(self, model: VisionLanguageModel) -> tuple[list[str], list[str]]:
        """The whole answers to examples and to guards."""
        return _asked(model, self.split, self.max_new_tokens)

    def success(self, answers: Sequence[str]) -> Rate:
        """How many examples are answered as wanted."""
        asked = self.split.held_examples.examples
        right = [self.match(one, example.wanted or "") for one, example in zip(answers, asked, strict=True)]
        return Rate.of(right, self.split.held_groups[0])

    def outcome(self, after: tuple[list[str], list[str]], what: str) -> Outcome:
        """Count what changed."""
        moved = [one != other for one, other in zip(after[1], self.before[1], strict=True)]
        if self.split.pictures_shared:
            what += ", on prompts of which the search saw pictures"
        return Outcome(
            success=self.success(after[0]), side_effects=Rate.of(moved, self.split.held_groups[1]), what=what
        )

    def pairs(self, after: tuple[list[str], list[str]]) -> list[AnswerPair]:
        """Every prompt with its answers."""
        found = []
        for some, old, new in zip((self.split.held_examples, self.split.held_guards), self.before, after, strict=True):
            each = zip(some.examples, some.prompts(), some.pictures(), old, new, strict=True)
            found += [
                AnswerPair(
                    conversation=example.conversation,
                    prompt=prompt,
                    wanted=example.wanted,
                    before=one,
                    after=other,
                    pictures=pictures,
                )
                for example, prompt, pictures, one, other in each
            ]
        return found


def _asked(model: VisionLanguageModel, split: Split, max_new_tokens: int) -> tuple[list[str], list[str]]:
    return split.held_examples.answers(model, max_new_tokens), split.held_guards.answers(model, max_new_tokens)


def answered_as_wanted(
    model: VisionLanguageModel, positives: Questions, examples: Sequence[Example], match: Match, max_new_tokens: int
) -> Questions:
    """Keep the positives that the model really answers as one of the examples is to be answered."""
    wanted = {one.wanted for one in examples if one.wanted is not None}
    answers = positives.answers(model, max_new_tokens)
    kept = [
        one
        for one, answer in zip(positives.examples, answers, strict=True)
        if any(match(answer, each) for each in wanted)
    ]
    return Questions(model, kept, batch_size=positives.batch_size)
