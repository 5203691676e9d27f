"""Is one recogniser better than another, or did the test set decide? A paired bootstrap over utterances."""

import dataclasses

import jiwer
import numpy as np
from scipy import stats

from keras_usm_lite.error_rates import comparable_texts

_CHUNK = 2**20  # resampled utterances held in memory at a time
TRAININGS = ("given", "paired", "independent")


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
        trainings: which trainings the interval speaks of: "given", or drawn "paired" or "independent".
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
    trainings: str

    def __str__(self):
        drawn = f"{self.utterances} utterances" + (f" of {self.groups} groups" if self.groups < self.utterances else "")
        drawn += "" if self.trainings == "given" else f", {self.trainings} trainings"
        return (
            f"WER {100 * self.wer_a:.2f} % -> {100 * self.wer_b:.2f} %: "
            f"{100 * self.relative_change:+.1f} % relative, "
            f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} %, "
            f"p = {self.p_value:.2g} ({drawn}, {self.draws} draws)"
        )


def paired_bootstrap(references, hypotheses_a, hypotheses_b, draws=10000, seed=0, groups=None, trainings="given"):
    """Resamples the utterances of a test set, and trainings, to see how sure the WER change from a to b is.

    Each draw takes as many utterances as there are, with replacement and the same ones for a and b, and
    computes `change = errors_b / errors_a - 1` over them (the number of reference words cancels). The
    interval spans the quantiles `q` and `1 - q` of the changes, where, with `n` utterances,

        q = Phi(sqrt(n / (n - 1)) t_(n-1)(2.5 %))

    is 2.5 % for many, and less for few, as from few the spread is known less well and comes out too small ("expanded
    percentile interval"). Of five or fewer no interval is wide enough: that from the lowest to the highest draw, which
    is then given, holds the truth in at most 94, 87, 75 and 50 % of cases for 5, 4, 3 and 2. The p-value is twice the
    share of draws on the rarer side of no change, `(1 + min(#{change <= 0}, #{change >= 0})) / (1 + draws)`, corrected
    the same way. Utterances are taken to be independent; if few speakers said many utterances each, the truth is less
    sure than the interval says. With `groups`, whole groups are drawn instead, as many as there are, and `n` is their
    number.

    An interval of "given" trainings says how other utterances would judge these very models. What the recipe does with
    other seeds is another question: for that each draw takes trainings, too, with replacement. As the variance of `n`
    drawn of `n` is `(n - 1) / n` times what it should be, the errors of training `i` are multiplied by

        c (E_i / mean E)^(sqrt(n / (n - 1)) - 1)

    where `E_i` is their sum and `c` keeps the mean: error rates that differ by little then differ `sqrt(n / (n - 1))`
    times as much, and none becomes negative. With three or four trainings the interval is too short still, as theirs
    is a guess at the spread.

    Source: M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance
    evaluation", ICASSP 2004; for few groups T. Hesterberg, "What teachers should know about the bootstrap",
    arXiv:1411.5279 (expanded percentile interval); for trainings and utterances at once A. B. Owen, "The pigeonhole
    bootstrap", arXiv:0712.1111.

    Args:
        references: list of the texts that were spoken.
        hypotheses_a: list of the texts that recogniser a, the baseline, found; or one such list for each of several
            trainings (seeds) of it, whose errors on an utterance are added up and drawn together.
        hypotheses_b: the same of recogniser b; as many trainings, if they are not "independent".
        draws: number of resampled test sets.
        seed: seed of the resampling.
        groups: None, or for each utterance what it is drawn together with, such as the name of its speaker.
        trainings: "given", the interval is about these; or they are drawn, at least two of each: "paired", training
            `i` of a with training `i` of b, which began from it or shares what makes its luck; or "independent".

    Returns:
        The `PairedBootstrap`.

    Raises:
        ValueError: if `draws` is below 1, `trainings` is not known, the lists differ in length, a reference is empty, a
            makes no errors, there are not as many trainings as needed, or there is only one utterance or group.

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
    _check_trainings(len(runs_a), len(runs_b), trainings)
    errors_a, words = _errors_and_words(references, runs_a)
    errors_b, _ = _errors_and_words(references, runs_b)
    if not errors_a.any():
        raise ValueError("Recogniser a makes no errors, so no change relative to it is defined. Swap a and b.")
    wer_a, wer_b = (float(errors.sum() / (len(errors) * words.sum())) for errors in (errors_a, errors_b))

    drawn_a, drawn_b = (_spread(errors, trainings) for errors in (errors_a, errors_b))
    if groups is not None:
        drawn_a, drawn_b = _by_group(drawn_a, groups), _by_group(drawn_b, groups)
    rng = np.random.default_rng(seed)
    count = drawn_a.shape[1]
    if count < 2:
        raise ValueError("One utterance alone says nothing about others; give at least two to draw from.")
    rows = max(1, _CHUNK // (count * max(len(drawn_a), len(drawn_b))))
    changes = np.concatenate(
        [
            _resampled_changes(drawn_a, drawn_b, min(rows, draws - done), trainings, rng)
            for done in range(0, draws, rows)
        ]
    )
    # A draw in which a makes no errors can have an infinite change: pick quantiles, do not interpolate.
    tail = _drawn_share(0.025, count)
    low, high = np.quantile(changes, [tail, 1 - tail], method="inverted_cdf")
    rarer_side = (1 + min(np.count_nonzero(changes <= 0), np.count_nonzero(changes >= 0))) / (1 + draws)
    return PairedBootstrap(
        wer_a=wer_a,
        wer_b=wer_b,
        relative_change=wer_b / wer_a - 1,
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * _true_share(rarer_side, count)),
        utterances=len(words),
        draws=draws,
        groups=count,
        trainings=trainings,
    )


def _drawn_share(share, count):
    """Returns which tail of the draws stands for a tail of the truth, of `count` that are drawn from."""
    return float(stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf(share, count - 1)))


def _true_share(share, count):
    """Returns which tail of the truth a tail of the draws stands for."""
    return float(stats.t.cdf(np.sqrt((count - 1) / count) * stats.norm.ppf(share), count - 1))


def _check_trainings(number_a, number_b, trainings):
    """Refuses what cannot be drawn as asked for."""
    if trainings not in TRAININGS:
        raise ValueError(f"trainings={trainings!r} is not known; choose one of {TRAININGS}.")
    if trainings != "independent" and number_a != number_b:
        raise ValueError(
            f"a has {number_a} trainings but b has {number_b}. Compare as many of each, or draw them with "
            "trainings='independent'."
        )
    if trainings != "given" and min(number_a, number_b) < 2:
        raise ValueError(
            f"trainings={trainings!r} draws from trainings, of which a has {number_a} and b {number_b}. Give at least "
            "two of each, or trainings='given'."
        )


def _runs(hypotheses):
    """Returns a list of lists of texts, also for the one list of a single training."""
    return [hypotheses] if not hypotheses or isinstance(hypotheses[0], str) else list(hypotheses)


def _errors_and_words(references, runs):
    """Returns the word errors `[runs, utterances]` and the reference words of each utterance, two arrays."""
    outputs = [jiwer.process_words(*comparable_texts(references, hypotheses)) for hypotheses in runs]
    errors = [[_errors(alignment) for alignment in output.alignments] for output in outputs]
    return np.array(errors, float), np.array([len(spoken) for spoken in outputs[0].references])


def _spread(errors, trainings):
    """Returns what is drawn from: the sum of given trainings, else each, as far apart as the variance asks for."""
    if trainings == "given":
        return errors.sum(axis=0, keepdims=True)
    totals, number = errors.sum(axis=1, keepdims=True), len(errors)
    if not totals.any():
        return errors
    spread = errors * (totals / totals.mean()) ** (np.sqrt(number / (number - 1)) - 1)
    return spread * (errors.sum() / spread.sum())


def _by_group(errors, groups):
    """Returns the errors `[runs, groups]`."""
    if len(groups) != errors.shape[1]:
        raise ValueError(f"groups has {len(groups)} entries for {errors.shape[1]} utterances; give one for each.")
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError("All utterances are in one group; at least two are needed to draw from.")
    return np.stack([np.bincount(numbers, weights=run) for run in errors])


def _errors(alignment):
    """Returns the number of words that are replaced, left out or added."""
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )


def _resampled_changes(errors_a, errors_b, draws, trainings, rng):
    """Returns the relative change of each draw; where neither side has errors, it is no change."""
    count = errors_a.shape[1]
    picks = rng.integers(count, size=(draws, count))
    sums_a, sums_b = (errors[:, picks].sum(axis=2) for errors in (errors_a, errors_b))  # [runs, draws]
    if trainings != "given":
        runs_a = runs_b = rng.integers(len(sums_a), size=sums_a.shape)
        if trainings == "independent":
            runs_b = rng.integers(len(sums_b), size=sums_b.shape)
        sums_a, sums_b = np.take_along_axis(sums_a, runs_a, 0), np.take_along_axis(sums_b, runs_b, 0)
    mean_a, mean_b = sums_a.mean(axis=0), sums_b.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean_a == mean_b, 0.0, mean_b / mean_a - 1)
