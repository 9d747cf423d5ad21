"""What a judge around another judge takes over from the one inside."""

from __future__ import annotations

from sae_lens_multimodal.autointerp.judges.base import Judge


class WrappedJudge(Judge):
    """A judge that passes requests on: it has the name, the cache and the abilities of the one inside.

    Args:
        judge: the one inside.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    @property
    def id(self) -> str:
        """The id of the judge inside."""
        return self.judge.id

    @property
    def cache_name(self) -> str:
        """That of the judge inside."""
        return self.judge.cache_name

    @property
    def gives_log_probabilities(self) -> bool:
        """As the judge inside."""
        return self.judge.gives_log_probabilities

    @property
    def rates_given_replies(self) -> bool:
        """As the judge inside."""
        return self.judge.rates_given_replies
