"""The paired bootstrap against the normal approximation and cases that can be worked out by hand."""

import numpy as np
import pytest

from keras_usm_lite.bootstrap import paired_bootstrap
from keras_usm_lite.error_rates import error_rates


def hypotheses(wrong):
    return ["no" if w else "yes" for w in wrong]


def test_the_interval_is_that_of_a_proportion_when_a_is_always_wrong():
    # errors_b / errors_a is then the share of wrong answers of b, whose standard error is known.
    wrong = np.arange(400) < 120
    result = paired_bootstrap(["yes"] * 400, hypotheses(np.ones(400)), hypotheses(wrong))
    half_width = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert result.relative_change == pytest.approx(-0.7)
    assert result.low == pytest.approx(-0.7 - half_width, abs=0.005)
    assert result.high == pytest.approx(-0.7 + half_width, abs=0.005)
    assert result.p_value == pytest.approx(2 / 10001, rel=0.2)


def test_it_reports_the_error_rates_that_jiwer_gives():
    references, a, b = ["turn it on", "stop", "go"], ["turn on", "shop", "go on"], ["", "stop", "go"]
    result = paired_bootstrap(references, a, b, draws=10)
    assert result.wer_a == pytest.approx(error_rates(references, a).wer)
    assert result.wer_b == pytest.approx(error_rates(references, b).wer)
    assert result.relative_change == pytest.approx(result.wer_b / result.wer_a - 1)
    assert (result.utterances, result.draws) == (3, 10)


def test_a_system_does_not_differ_from_itself():
    result = paired_bootstrap(["yes"] * 30, hypotheses(np.arange(30) < 9), hypotheses(np.arange(30) < 9), 500)
    assert (result.relative_change, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_pairing_makes_it_surer_than_the_same_errors_on_other_utterances():
    a = np.arange(200) < 60
    same, other = np.arange(200) < 50, np.arange(200) >= 150
    paired = paired_bootstrap(["yes"] * 200, hypotheses(a), hypotheses(same))
    unpaired = paired_bootstrap(["yes"] * 200, hypotheses(a), hypotheses(other))
    assert paired.relative_change == unpaired.relative_change
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2
    assert paired.p_value < 0.05 < unpaired.p_value


def test_the_p_value_finds_no_change_in_noise_about_as_often_as_it_should():
    rng = np.random.default_rng(0)
    p_values = []
    for seed in range(100):
        a, b = rng.random((2, 100)) < 0.3
        p_values.append(paired_bootstrap(["yes"] * 100, hypotheses(a), hypotheses(b), 200, seed).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.12
    assert 0.35 <= np.mean(np.array(p_values) < 0.5) <= 0.65


def test_trainings_of_one_recogniser_are_added_up_and_make_an_utterance_no_surer():
    a, b = hypotheses(np.arange(200) < 60), hypotheses(np.arange(200) < 45)
    one, three = paired_bootstrap(["yes"] * 200, a, b), paired_bootstrap(["yes"] * 200, [a] * 3, [b] * 3)
    assert three == one  # as three independent test sets they would look surer
    mixed = paired_bootstrap(["yes"] * 200, [a, b], [b, b], 100)
    assert (mixed.wer_a, mixed.wer_b) == pytest.approx((105 / 400, 90 / 400))
    with pytest.raises(ValueError, match="a has 1 trainings but b has 2"):
        paired_bootstrap(["yes"] * 200, a, [b, b])


def test_the_seed_fixes_the_result():
    a, b = hypotheses(np.arange(50) < 20), hypotheses(np.arange(50) < 17)
    first, again, other = (paired_bootstrap(["yes"] * 50, a, b, 999, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_draws_in_which_a_makes_no_errors_leave_the_interval_defined():
    result = paired_bootstrap(["yes"] * 3, ["no", "yes", "yes"], ["yes", "no", "yes"], 1000)
    assert result.low == -1
    assert result.high == np.inf


def test_it_prints_as_one_line():
    result = paired_bootstrap(["yes"] * 4, hypotheses([1, 1, 1, 1]), hypotheses([1, 1, 0, 0]), 100)
    assert str(result).startswith("WER 100.00 % -> 50.00 %: -50.0 % relative, 95 % interval -100.0 to ")
    assert str(result).endswith("(4 utterances, 100 draws)")


@pytest.mark.parametrize(
    "a, b, draws, message",
    [
        (["yes"], ["no"], 100, "no errors"),
        (["no"], ["no"], 0, "draws must be at least 1, got 0"),
        (["no"], [], 100, "1 references but 0 hypotheses"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, draws, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(["yes"], a, b, draws)


def test_drawing_whole_speakers_is_less_sure_where_they_differ_in_what_changes():
    spoken = ["one two three four"] * 60
    speakers = [f"speaker {number // 10}" for number in range(60)]
    before = ["one two three"] * 60
    after = ["one two three four" if number < 20 else "one two" for number in range(60)]  # good for two speakers only
    alone, grouped = (paired_bootstrap(spoken, before, after, groups=groups) for groups in (None, speakers))
    assert grouped.relative_change == alone.relative_change
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    assert (alone.groups, grouped.groups) == (60, 6) and "60 utterances of 6 groups" in str(grouped)


def test_an_interval_over_six_speakers_covers_the_truth_about_as_often_as_it_says():
    # Every speaker's errors change by an amount of his own, whose mean is no change: 95 of 100 intervals should hold 0.
    rng, speakers = np.random.default_rng(0), np.repeat(np.arange(6), 40)
    covered = []
    for seed in range(150):
        share = 0.4 + 0.1 * rng.standard_normal(6)
        a, b = rng.random(240) < 0.4, rng.random(240) < share[speakers]
        result = paired_bootstrap(["yes"] * 240, hypotheses(a), hypotheses(b), 1000, seed, groups=speakers)
        covered.append(result.low <= 0 <= result.high)
    assert 0.90 <= np.mean(covered) <= 0.99  # of the plain 2.5 and 97.5 % quantiles 0.87 do


@pytest.mark.parametrize(
    ("fewer", "sure"),
    [
        ([5, 4, 2, 1, -1], False),  # 1.5 % of the draws are no better: plain quantiles of 2.5 % would leave zero out
        ([4, 3, 2, 2, -1], False),  # 0.7 %
        ([5, 4, 3, 1, -2], False),  # 3.6 %
        ([5, 4, 3, 3, 4], True),
    ],
)
def test_interval_and_p_value_of_few_groups_agree(fewer, sure):
    speakers, place = np.repeat(np.arange(5), 20), np.tile(np.arange(20), 5)
    a, b = place < 10, place < 10 - np.repeat(fewer, 20)
    result = paired_bootstrap(["yes"] * 100, hypotheses(a), hypotheses(b), groups=speakers)
    assert (result.p_value < 0.05) == (not result.low <= 0 <= result.high) == sure


def test_groups_of_one_utterance_each_change_nothing():
    spoken, before, after = ["a b", "c d", "e f"] * 9, ["a", "c d", "e"] * 9, ["a b", "c", "f"] * 9
    alone = paired_bootstrap(spoken, before, after)
    assert paired_bootstrap(spoken, before, after, groups=[f"{number:02}" for number in range(27)]) == alone


@pytest.mark.parametrize(("groups", "message"), [(["a"], "1 entries for 2"), (["a", "a"], "one group")])
def test_groups_that_cannot_be_drawn_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(["a", "b"], ["a", "c"], ["a", "b"], groups=groups)


def test_one_utterance_gives_no_interval():
    with pytest.raises(ValueError, match="One utterance alone"):
        paired_bootstrap(["yes"], ["no"], ["yes"])


def trainings_with(wrong_words):
    """One text a training for each of 30 utterances of 20 words, all with the same number of wrong ones."""
    return [[" ".join(["no"] * wrong + ["yes"] * (20 - wrong))] * 30 for wrong in wrong_words]


def test_drawn_trainings_spread_as_the_standard_error_of_their_mean():
    spoken, wrong = [" ".join(["yes"] * 20)] * 30, [2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9]
    a, b = trainings_with([10, 10]), trainings_with(wrong)
    given = paired_bootstrap(spoken, a * 6, b)
    assert given.low == given.relative_change == given.high  # every utterance says the same of these trainings
    drawn = paired_bootstrap(spoken, a, b, trainings="independent")
    half_width = 2.08 * np.std(wrong, ddof=1) / np.sqrt(len(wrong)) / 10  # t of 30 utterances, expanded
    assert drawn.relative_change == given.relative_change == pytest.approx(np.mean(wrong) / 10 - 1)
    assert drawn.low == pytest.approx(drawn.relative_change - half_width, abs=0.01)
    assert drawn.high == pytest.approx(drawn.relative_change + half_width, abs=0.01)
    assert "independent trainings" in str(drawn)


def test_trainings_that_share_their_luck_are_surer_as_pairs():
    spoken = [" ".join(["yes"] * 20)] * 30
    a, b = trainings_with([5, 10, 20]), trainings_with([4, 8, 16])
    paired, apart = (paired_bootstrap(spoken, a, b, trainings=how) for how in ("paired", "independent"))
    assert paired.relative_change == apart.relative_change == pytest.approx(-0.2)
    assert paired.high - paired.low < 1e-9 < 0.5 < apart.high - apart.low


def test_drawing_trainings_that_are_all_the_same_changes_little():
    a, b = [hypotheses(np.arange(200) < 60)] * 4, [hypotheses(np.arange(200) < 45)] * 4
    given = paired_bootstrap(["yes"] * 200, a, b)
    for groups in (None, [f"{number:03}" for number in range(200)]):
        drawn = paired_bootstrap(["yes"] * 200, a, b, groups=groups, trainings="paired")
        assert (drawn.low, drawn.high) == pytest.approx((given.low, given.high), abs=0.02)


@pytest.mark.parametrize(
    ("number_a", "number_b", "how", "message"),
    [
        (2, 2, "each", "trainings='each' is not known"),
        (2, 3, "paired", "a has 2 trainings but b has 3.*independent"),
        (1, 3, "independent", "a has 1 and b 3"),
        (1, 1, "paired", "at least two"),
    ],
)
def test_trainings_that_cannot_be_drawn_are_refused(number_a, number_b, how, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(["yes"] * 4, [["no"] * 4] * number_a, [["yes"] * 4] * number_b, 10, trainings=how)


def test_one_training_that_went_wrong_gives_no_impossible_change():
    """Of 100 words, the trainings get 5 or 10 wrong, but one of them all of them."""
    better, well, badly = (hypotheses(np.arange(100) < wrong) for wrong in (5, 10, 100))
    cases = [([well, badly], [well, better]), ([well, well, badly], [well] * 3)]
    for a, b in [*cases, *((b, a) for a, b in cases)]:
        for trainings in ("paired", "independent"):
            result = paired_bootstrap(["yes"] * 100, a, b, 2000, trainings=trainings)
            assert -1 <= result.low <= result.relative_change <= result.high


def test_trainings_without_errors_can_be_drawn():
    result = paired_bootstrap(["yes"] * 9, [["no"] * 9] * 2, [["yes"] * 9] * 2, 100, trainings="paired")
    assert (result.low, result.high) == (-1, -1)
