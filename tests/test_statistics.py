"Intervals and paired tests: oracles, invariances, bounds on memory, refusals."
import itertools
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

import biomamba
from biomamba.runs import UserError
from biomamba.statistics import (Interval, bootstrap_ratio, discordant, mcnemar_exact, normal_quantile, paired_bootstrap,
                                 paired_difference, paired_ratio_change, resampled_sums, tango_interval, wilson_interval)


def documents(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Losses in nats and token counts of n made-up documents."
    generator = np.random.default_rng(seed)
    tokens = generator.integers(40, 550, size=n)
    return tokens * generator.normal(2.1, 0.4, size=n), tokens


def test_the_exact_bootstrap_distribution_of_four_documents():
    nats, tokens = documents(4)
    every = np.array(list(itertools.product(range(4), repeat=4)))
    exact = np.exp(nats[every].sum(1) / tokens[every].sum(1))
    drawn = bootstrap_ratio(nats, tokens, draws=100_000, level=0.8)
    low, high = np.quantile(exact, [0.1, 0.9], method="inverted_cdf")
    neighbours = np.unique(exact)
    for bound, truth in ((drawn.low, low), (drawn.high, high)):
        assert abs(np.searchsorted(neighbours, bound) - np.searchsorted(neighbours, truth)) <= 2


def test_scipy_finds_the_same_bounds():
    nats, tokens = documents(60)
    ours = bootstrap_ratio(nats, tokens, draws=20_000)
    theirs = scipy.stats.bootstrap(
        (nats, tokens), lambda s, t, axis: np.exp(s.sum(axis=axis) / t.sum(axis=axis)), paired=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(5)).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(theirs, rel=5e-3)


def test_the_token_mean_is_not_the_mean_of_document_means():
    ratio = bootstrap_ratio([100.0, 900.0], [100, 300], None)
    assert ratio.estimate == 2.5 and (1 + 3) / 2 != 2.5


def test_groups_of_draws_change_nothing():
    columns = np.stack(documents(1500))
    index = np.random.default_rng(3).integers(0, 1500, size=(2000, 1500))
    whole = np.stack([column[index].sum(axis=1) for column in columns], axis=1)
    assert np.array_equal(resampled_sums(columns, 2000, seed=3), whole)


def test_one_seed_one_interval_in_another_process_too():
    nats, tokens = documents(50)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from test_statistics import *; "
            "print(bootstrap_ratio(*documents(50)).high.hex())")
    run = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)],
                         capture_output=True, text=True, check=True, cwd=Path(biomamba.__file__).parents[1])
    assert run.stdout.strip() == bootstrap_ratio(nats, tokens).high.hex()
    assert bootstrap_ratio(nats, tokens, seed=1) != bootstrap_ratio(nats, tokens)


def test_a_hundred_thousand_documents_fit_in_little_memory():
    nats, tokens = documents(100_000)
    tracemalloc.start()
    interval = bootstrap_ratio(nats, tokens, draws=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 and 8.1 < interval.low < interval.high < 8.3


def test_the_caller_keeps_its_random_numbers():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bootstrap_ratio(*documents(5))
    assert np.array_equal(before, np.random.get_state()[1])


def test_paired_change_is_narrower_than_unpaired_and_turns_around():
    nats, tokens = documents(300)
    other = nats - 0.1 * tokens
    there, back = paired_ratio_change(nats, other, tokens), paired_ratio_change(other, nats, tokens)
    assert (there.low, there.estimate, there.high) == pytest.approx((math.expm1(-0.1),) * 3)
    assert (1 + there.estimate) * (1 + back.estimate) == pytest.approx(1)
    assert bootstrap_ratio(nats, tokens).high - bootstrap_ratio(nats, tokens).low > 0.5


def test_no_change_is_exactly_zero():
    nats, tokens = documents(30)
    change = paired_ratio_change(nats, nats, tokens)
    assert (change.estimate, change.low, change.high) == (0, 0, 0) and not change.excludes(0)


def test_the_mean_difference_has_the_sign_of_the_second_system():
    assert paired_bootstrap([1.0, 2.0, 3.0], [2.0, 3.0, 5.0]).estimate == pytest.approx(4 / 3)


def test_an_interval_is_plain_data():
    interval = Interval(1.0, 0.0, 2.0, n=40)
    assert interval.data() == {"value": 1.0, "ci95": [0.0, 2.0]}
    assert interval.data("mean", math.expm1) == {"mean": math.expm1(1), "ci95": [0.0, math.expm1(2)]}


def test_few_documents_are_named():
    assert repr(bootstrap_ratio(*documents(5))).endswith("from 5")
    assert "from" not in repr(bootstrap_ratio(*documents(30)))


@pytest.mark.parametrize("interval, text", [
    (Interval(8.4213, 8.3101, 8.5288), "8.42 [8.31, 8.53]"), (Interval(0.5, 0.5, 0.5), "0.50 [0.50, 0.50]"),
    (Interval(928.31, 912.2, 943.9), "928 [912, 944]"), (Interval(-0.1, -0.11, -0.09), "-0.100 [-0.110, -0.090]"),
    (Interval(0.0, 0.0, math.inf), "0.00 [0.00, inf]")])
def test_an_interval_shows_two_digits_of_its_width(interval, text):
    assert repr(interval) == text


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 2, 25, 82, 200])
def test_wilson_agrees_with_statsmodels_everywhere(n, level):
    for successes in range(n + 1):
        ours = wilson_interval(successes, n, level)
        assert (ours.low, ours.high) == pytest.approx(proportion_confint(successes, n, 1 - level, "wilson"), abs=1e-9)
        assert 0 <= ours.low <= ours.estimate <= ours.high <= 1


def test_mcnemar_agrees_with_statsmodels_everywhere():
    for only_a, only_b in itertools.product(range(12), repeat=2):
        a = np.array([1] * only_a + [0] * only_b + [1, 0])
        b = np.array([0] * only_a + [1] * only_b + [1, 0])
        table = [[1, only_a], [only_b, 1]]
        assert discordant(a, b) == (only_a, only_b)
        assert mcnemar_exact(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_mcnemar_takes_thousands_of_items():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 20_000)) < 0.7
    only_a, only_b = discordant(a, b)
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_one_question_and_of_very_many():
    assert mcnemar_exact([1], [0]) == mcnemar_exact([1], [1]) == 1.0
    assert 0 < mcnemar_exact([1] * 1200, [0] * 1200) < 1e-300


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 7, 30])
def test_tangos_interval_holds_the_differences_that_its_score_accepts(n, level):
    "The restricted likelihood is maximised here by search, not by Tango's formula."
    z = scipy.stats.norm.ppf((1 + level) / 2)
    def score(b, c, change):
        low, high = max(0.0, -change), (1 - change) / 2  # of the share that only the first gets right
        loss = lambda q: -(scipy.special.xlogy(b, q) + scipy.special.xlogy(c, q + change) + scipy.special.xlogy(n - b - c, max(0.0, 1 - 2 * q - change)))
        q = min(scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x, low, high, key=loss)
        return (c - b - n * change) / np.sqrt(n * (2 * q + change * (1 - change)))
    for b, c in [(b, c) for b in range(0, n + 1, 3) for c in range(0, n + 1 - b, 3)]:
        found, other = tango_interval(b, c, n, level), tango_interval(c, b, n, level)
        assert -1 <= found.low <= found.estimate <= found.high <= 1 and found.low < found.high
        assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
        for bound in {found.low, found.high} - {-1.0, 1.0}: assert abs(score(b, c, bound)) == pytest.approx(z, rel=2e-3)


@pytest.mark.parametrize("b, c", [(0.0, 0.012), (0.012, 0.012), (0.1, 0.2)])
def test_tangos_interval_covers(b, c):
    "Simulated: 82 questions, few or many of which tell the systems apart."
    drawn = np.random.default_rng(5).multinomial(82, [b, c, 1 - b - c], size=1500)
    held = np.mean([not tango_interval(int(first), int(second), 82).excludes(c - b) for first, second, _ in drawn])
    assert 0.93 < held


def test_right_and_wrong_never_have_an_interval_of_width_zero():
    same = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert same.estimate == 0 and same.low == pytest.approx(-same.high) and same.high > 0.4
    assert paired_difference([True, False], [True, True]) == tango_interval(0, 1, 2)
    shares = [0.0, 0.2, 1.0], [0.4, 0.2, 1.0]
    assert paired_difference(*shares) == paired_bootstrap(*shares)


@pytest.mark.parametrize("p", [1e-300, 1e-9, 0.2, 0.5, 0.9])
def test_normal_quantile(p):
    assert normal_quantile(p) == pytest.approx(scipy.stats.norm.ppf(p), abs=1e-8)


@pytest.mark.parametrize("call, sentence", [
    (lambda: bootstrap_ratio([], []), "numerator holds 0 values"),
    (lambda: bootstrap_ratio([1.0], [2]), "numerator holds 1 values"),
    (lambda: bootstrap_ratio([1.0, 2.0], [3, 0]), r"denominator\[1\] is 0"),
    (lambda: bootstrap_ratio([1.0, np.inf], [3, 4]), r"numerator\[1\] is inf"),
    (lambda: bootstrap_ratio([1.0, 2.0], [3, 4, 5]), "equal length"),
    (lambda: bootstrap_ratio([[1.0], [2.0]], [[3], [4]]), "flat"),
    (lambda: bootstrap_ratio([1.0, 2.0], [3, 4], level=95), "level is 95"),
    (lambda: bootstrap_ratio([1.0, 2.0], [3, 4], draws=10), "draws is 10"),
    (lambda: paired_ratio_change([1.0, 2.0], [1.0, np.nan], [3, 4]), r"numerator_b\[1\] is nan"),
    (lambda: paired_bootstrap([1.0], [2.0]), "a holds 1"),
    (lambda: wilson_interval(3, 2), "3 correct of 2"), (lambda: wilson_interval(0, 0), "0 correct of 0"),
    (lambda: wilson_interval(1, 2, 1.0), "level is 1.0"), (lambda: normal_quantile(0.0), "p is 0.0"),
    (lambda: mcnemar_exact([0.5, 1.0], [1.0, 0.0]), "true and false"), (lambda: mcnemar_exact([], []), "correct_a holds 0 values"),
    (lambda: tango_interval(3, 2, 4), "3 and 2 of 4 items"), (lambda: tango_interval(-1, 2, 4), "-1 and 2 of 4 items"),
    (lambda: tango_interval(0, 0, 0), "0 and 0 of 0 items"), (lambda: tango_interval(1, 2, 4, 95), "level is 95"),
    (lambda: paired_difference([1.0, np.nan], [0.0, 1.0]), r"a\[1\] is nan")])
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_module_run_from_inside_the_package_still_finds_the_standard_library():
    package = Path(biomamba.__file__).parent
    run = subprocess.run([sys.executable, "-m", "biomamba.statistics"], cwd=package, capture_output=True, text=True,
                         env={"PYTHONPATH": str(package.parent), "PATH": ""})
    assert run.returncode == 0, run.stderr
