"""ROUGE of summaries, by the package `rouge-score` (the extra `eval`). Free of torch.

F1 of unigrams, of bigrams, and of the longest common subsequence (Lin, "ROUGE: A Package for Automatic Evaluation of
Summaries", 2004), with Porter's stemmer; of several references the best counts, figure by figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from tpserve.engine.errors import ConfigError

KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
Scores = dict[str, float]


class Rouge:
    """Scores summaries.

    Raises:
        ConfigError: the package is not there.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as e:
            raise ConfigError(f"ROUGE needs the extra `eval`: pip install 'tpserve[eval]' ({e})") from None
        self._scorer = RougeScorer(list(KINDS), use_stemmer=True)

    def score(self, summary: str, references: Sequence[str]) -> Scores:
        """F1 of each of `KINDS`, from 0 to 100."""
        found = self._scorer.score_multi(list(references), summary)
        return {kind: 100 * found[kind].fmeasure for kind in KINDS}


def mean(scores: Sequence[Scores]) -> Scores:
    """Of each of `KINDS`."""
    return {kind: sum(score[kind] for score in scores) / len(scores) for kind in KINDS}
