"""Is one recogniser better than another, or did the test set decide? A paired bootstrap over utterances."""

import dataclasses

import jiwer
import numpy as np

from keras_usm_lite.error_rates import comparable_texts

_CHUNK = 2**20  # resampled utterances held in memory at a time


@dataclasses.dataclass(frozen=True)
class PairedBootstrap:
    """The relative change of the word error rate from recogniser a to recogniser b.

    Attributes:
        wer_a: word error rate of a, a fraction.
        wer_b: word error rate of b, a fraction.
        relative_change: `wer_b / wer_a - 1`; negative if b is better.
        low: lower end of the 95 % interval of `relative_change`.
        high: upper end of the 95 % interval of `relative_change`.
        p_value: two-sided p-value of "there is no change".
        utterances: number of utterances.
        draws: number of resampled test sets.
        groups: number of groups that were drawn; as many as utterances if those were.
    """

    wer_a: float
    wer_b: float
    relative_change: float
    low: float
    high: float
    p_value: float
    utterances: int
    draws: int
    groups: int

    def __str__(self):
        drawn = f"{self.utterances} utterances" + (f" of {self.groups} groups" if self.groups < self.utterances else "")
        return (
            f"WER {100 * self.wer_a:.2f} % -> {100 * self.wer_b:.2f} %: "
            f"{100 * self.relative_change:+.1f} % relative, "
            f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} %, "
            f"p = {self.p_value:.2g} ({drawn}, {self.draws} draws)"
        )


def paired_bootstrap(references, hypotheses_a, hypotheses_b, draws=10000, seed=0, groups=None):
    """Resamples the utterances of a test set to see how sure the WER change from a to b is.

    Each draw takes as many utterances as there are, with replacement and the same ones for a and b, and
    computes `change = errors_b / errors_a - 1` over them (the number of reference words cancels). The
    interval spans the 2.5 and 97.5 % quantiles of the changes; with `n` draws the p-value is
    `min(1, 2 (1 + min(#{change <= 0}, #{change >= 0})) / (1 + n))`. Utterances are taken to be independent;
    if few speakers said many utterances each, the truth is less sure than the interval says. With `groups`,
    whole groups are drawn instead, as many as there are.

    Source: M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation", ICASSP 2004.

    Args:
        references: list of the texts that were spoken.
        hypotheses_a: list of the texts that recogniser a, the baseline, found; or one such list for each of several
            trainings (seeds) of it, whose errors on an utterance are added up and drawn together.
        hypotheses_b: the same of recogniser b, as many trainings.
        draws: number of resampled test sets.
        seed: seed of the resampling.
        groups: None, or for each utterance what it is drawn together with, such as the name of its speaker.

    Returns:
        The `PairedBootstrap`.

    Raises:
        ValueError: if `draws` is below 1, the lists differ in length, a reference is empty, a makes no errors, a and b
            have different numbers of trainings, or there is only one utterance or group.

    Example:
        >>> spoken, found_a, found_b = ["one two", "three"], ["one", "four"], ["one too", "three"]
        >>> result = paired_bootstrap(spoken * 50, found_a * 50, found_b * 50)
        >>> result.relative_change
        -0.5
        >>> result.low < -0.5 < result.high < 0
        True
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}. Some thousands are usual.")
    runs_a, runs_b = _runs(hypotheses_a), _runs(hypotheses_b)
    if len(runs_a) != len(runs_b):
        raise ValueError(f"a has {len(runs_a)} trainings but b has {len(runs_b)}. Compare as many of each.")
    errors_a, words = _errors_and_words(references, runs_a)
    errors_b, _ = _errors_and_words(references, runs_b)
    if not errors_a.any():
        raise ValueError("Recogniser a makes no errors, so no change relative to it is defined. Swap a and b.")

    drawn_a, drawn_b = errors_a, errors_b
    if groups is not None:
        drawn_a, drawn_b = _by_group(errors_a, errors_b, groups)
    rng = np.random.default_rng(seed)
    count = len(drawn_a)
    if count < 2:
        raise ValueError("One utterance alone says nothing about others; give at least two to draw from.")
    rows = max(1, _CHUNK // count)
    changes = np.concatenate(
        [
            _resampled_changes(drawn_a, drawn_b, rng.integers(count, size=(min(rows, draws - done), count)))
            for done in range(0, draws, rows)
        ]
    )
    # A draw in which a makes no errors can have an infinite change: pick quantiles, do not interpolate.
    low, high = np.quantile(changes, [0.025, 0.975], method="inverted_cdf")
    rarer_side = min(np.count_nonzero(changes <= 0), np.count_nonzero(changes >= 0))
    return PairedBootstrap(
        wer_a=float(errors_a.sum() / words.sum()),
        wer_b=float(errors_b.sum() / words.sum()),
        relative_change=float(errors_b.sum() / errors_a.sum() - 1),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (1 + rarer_side) / (1 + draws)),
        utterances=len(words),
        draws=draws,
        groups=count,
    )


def _runs(hypotheses):
    """Returns a list of lists of texts, also for the one list of a single training."""
    return [hypotheses] if not hypotheses or isinstance(hypotheses[0], str) else list(hypotheses)


def _errors_and_words(references, runs):
    """Returns the word errors and the reference words of each utterance, summed over the runs, as two arrays."""
    errors = words = 0
    for hypotheses in runs:
        output = jiwer.process_words(*comparable_texts(references, hypotheses))
        errors = errors + np.array([_errors(alignment) for alignment in output.alignments])
        words = words + np.array([len(spoken) for spoken in output.references])
    return errors, words


def _by_group(errors_a, errors_b, groups):
    """Returns the errors of each group, of a and of b."""
    if len(groups) != len(errors_a):
        raise ValueError(f"groups has {len(groups)} entries for {len(errors_a)} utterances; give one for each.")
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError("All utterances are in one group; at least two are needed to draw from.")
    return np.bincount(numbers, weights=errors_a), np.bincount(numbers, weights=errors_b)


def _errors(alignment):
    """Returns the number of words that are replaced, left out or added."""
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )


def _resampled_changes(errors_a, errors_b, picks):
    """Returns the relative change of each row of picks; where neither side has errors, it is no change."""
    sum_a, sum_b = errors_a[picks].sum(axis=1), errors_b[picks].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sum_a == sum_b, 0.0, sum_b / sum_a - 1)
