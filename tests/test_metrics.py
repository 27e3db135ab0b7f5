"Metrics: scikit-learn, statsmodels and rouge-score as oracles, properties, refusals, a light import."
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, f1_score, log_loss
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from biomamba.metrics import (ACCURACY, ROUGE, accuracy_interval, answer_metrics, bootstrap_metric, brier, calibration_error, ceiling,
                              confidences, ece, f1, holm, majority_answer, measure, paired_answers, probabilities, reliability,
                              risk_coverage, rouge_scores, seed_interval)
from biomamba.paper import SCALES
from biomamba.paper_results import published_table, qa_score
from biomamba.runs import UserError

YES_NO, THREE = ("yes", "no"), ("yes", "no", "maybe")
answers = st.lists(st.tuples(st.sampled_from(THREE), st.sampled_from([*THREE, "neither"])), min_size=2, max_size=40)


def test_importing_is_light():
    code = "import biomamba.metrics, sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "sklearn", "statsmodels", "rouge_score", "nltk", "pandas", "scipy", "matplotlib"} & set(loaded)


@settings(deadline=None, max_examples=60)
@given(answers)
def test_answers_agree_with_scikit_learn(pairs):
    golds, givens = zip(*pairs)
    for classes in (YES_NO, THREE):
        found = {name: measure(metric, golds, givens) for name, metric in answer_metrics(classes).items()}
        each = f1_score(golds, givens, labels=list(classes), average=None, zero_division=0)
        assert found["accuracy"] == pytest.approx(accuracy_score(golds, givens))
        assert [found[f"{c} F1"] for c in classes] == pytest.approx(each)
        assert found["macro-F1"] == pytest.approx(np.mean(each))


@settings(deadline=None, max_examples=60)
@given(answers)
def test_no_accuracy_is_above_its_ceiling(pairs):
    golds, givens = zip(*pairs)
    binary = [g if g in YES_NO else "yes" for g in givens]
    assert measure(ACCURACY, golds, binary) <= ceiling(golds, YES_NO) + 1e-12
    majority = majority_answer(golds)
    assert measure(ACCURACY, golds, [majority] * len(golds)) == max(golds.count(c) for c in golds) / len(golds)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("benchmark, column", [("BioASQ", "BioASQ macro-F1"), ("PubMedQA", "PubMedQA macro-F1")])
def test_the_papers_macro_f1_is_the_mean_over_yes_and_no(scale, benchmark, column):
    printed = published_table(8).row(f"BioMamba-{scale.upper()}")[column]
    each = [qa_score(benchmark, f"{answer} F1", scale, "adapted+sft") for answer in YES_NO]
    assert printed == pytest.approx(np.mean(each), abs=1.01e-3)


def test_a_row_of_the_paper_from_its_confusion_table():
    "1.3B, adapted: 86 true yes and 54 true no found, 13 of 25 maybe answered yes (the audit's only fit)."
    golds = ["yes"] * 103 + ["no"] * 72 + ["maybe"] * 25
    givens = ["yes"] * 86 + ["no"] * 17 + ["no"] * 54 + ["yes"] * 18 + ["yes"] * 13 + ["no"] * 12
    assert measure(ACCURACY, golds, givens) == 0.70
    for answer in YES_NO:
        assert measure(f1(YES_NO, answer), golds, givens) == pytest.approx(qa_score("PubMedQA", f"{answer} F1", "1.3b", "adapted+sft"), abs=5e-4)


@pytest.mark.parametrize("right, n, printed", [(74, 82, (81.9, 95.0)), (146, 200, (66.5, 78.7)), (44, 82, (42.9, 64.0))])
def test_the_papers_intervals(right, n, printed):
    interval = accuracy_interval(["yes"] * n, ["yes"] * right + ["no"] * (n - right))
    assert (round(100 * interval.low, 1), round(100 * interval.high, 1)) == printed
    assert (interval.low, interval.high) == pytest.approx(proportion_confint(right, n, method="wilson"))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(YES_NO), st.sampled_from(YES_NO), st.sampled_from(YES_NO)), min_size=2, max_size=40))
def test_two_systems(triples):
    golds, first, second = zip(*triples)
    found = paired_answers(golds, first, second)
    a, b = (np.array([g == s for g, s in zip(golds, some)]) for some in (first, second))
    counts = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert found.p == pytest.approx(min(1, mcnemar(counts, exact=True).pvalue))
    assert found.difference.estimate == pytest.approx(b.mean() - a.mean()) == pytest.approx((found.only_second - found.only_first) / len(golds))
    back = paired_answers(golds, second, first)
    assert (back.p, back.only_first, back.only_second) == (found.p, found.only_second, found.only_first)


def test_the_bootstrap_of_f1_is_that_of_all_resamples():
    "Four items have 256 resamples; the drawn bounds are the enumerated ones."
    golds, givens = np.array(["yes", "yes", "no", "no"]), np.array(["yes", "no", "no", "no"])
    every = [f1_score(golds[list(i)], givens[list(i)], labels=list(YES_NO), average="macro", zero_division=0) for i in itertools.product(range(4), repeat=4)]
    found = bootstrap_metric(f1(YES_NO), golds, givens, draws=1000, level=0.8)
    assert found.estimate == pytest.approx(f1_score(golds, givens, average="macro"))
    assert (found.low, found.high) == pytest.approx(np.quantile(every, [0.1, 0.9], method="inverted_cdf"))


def test_the_difference_of_a_system_to_itself_is_nothing():
    golds, givens = ["yes", "no", "yes"], ["yes", "yes", "yes"]
    found = bootstrap_metric(f1(YES_NO), golds, givens, givens, draws=100)
    assert (found.low, found.estimate, found.high) == (0, 0, 0)


def test_students_interval():
    values = np.random.default_rng(1).normal(0.6, 0.05, 5)
    low, high = student.interval(0.95, 4, values.mean(), values.std(ddof=1) / np.sqrt(5))
    assert (seed_interval(values).low, seed_interval(values).high) == pytest.approx((low, high))
    assert seed_interval([0.5, 0.5, 0.5]).low == 0.5


def test_holm_keeps_order_and_never_lowers():
    p = [0.04, 0.001, 0.5, 0.02]
    found = holm(p)
    assert found == pytest.approx([0.08, 0.004, 0.5, 0.06]) and holm([]) == []


# ---------------------------------------------------------------- calibration

scores = st.lists(st.tuples(st.sampled_from(THREE), st.tuples(*[st.floats(-50, 0)] * 3)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(scores)
def test_probabilities_and_their_bounds(pairs):
    golds, given = zip(*pairs)
    p = probabilities(np.array(given))
    assert p.sum(axis=1) == pytest.approx(np.ones(len(p))) and p == pytest.approx(probabilities(np.array(given) - 700))
    assert 0 <= measure(brier(THREE), golds, p) <= 1 and 0 <= measure(ece(THREE), golds, p) <= 1
    right = np.eye(3)[[THREE.index(g) for g in golds]]
    assert measure(brier(THREE), golds, right) == measure(ece(THREE), golds, right) == 0
    assert log_loss(golds, p, labels=sorted(THREE)) >= 0


def test_an_answer_outside_the_classes_is_never_right():
    p = np.array([[1.0, 0.0]])
    assert measure(brier(YES_NO), ["maybe"], p) == measure(brier(YES_NO), ["no"], p) == 1.0 and measure(ece(YES_NO), ["maybe"], p) == 1.0


def test_bins_hold_every_answer_once():
    sure = np.array([0.0, 0.05, 0.1, 0.1999, 0.2, 0.999, 1.0])
    found = reliability(sure, np.ones(7))
    assert [(b.low, b.n) for b in found] == [(0.0, 2), (0.1, 2), (0.2, 1), (0.9, 2)]
    assert calibration_error(sure, np.ones(7)) == pytest.approx(1 - sure.mean())


@pytest.mark.parametrize("bins", [10, 100, 1000])
def test_a_confidence_on_a_border_belongs_to_the_upper_bin(bins):
    "Also where confidence × bins falls short of the whole number, as 0.29 × 100 does."
    for k in range(bins): assert reliability([k / bins], [1], bins=bins)[0].low == k / bins


def test_a_calibrated_system_is_found_calibrated():
    generator = np.random.default_rng(2)
    sure = generator.uniform(0.5, 1, 40_000)
    right = generator.random(40_000) < sure
    assert calibration_error(sure, right) < 0.02 < calibration_error(np.minimum(sure + 0.1, 1), right)


def test_risk_and_coverage():
    generator = np.random.default_rng(4)
    sure, right = generator.random(300), generator.random(300) < 0.7
    coverage, risk = risk_coverage(sure, right)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(1 - right.mean())
    for k in (1, 10, 299): assert risk[k - 1] == pytest.approx(1 - right[np.argsort(-sure)[:k]].mean())
    best = risk_coverage(right.astype(float), right)[1]
    assert best[: right.sum()].max() == 0 and (best <= risk + 1e-12).all()


def test_confidence_belongs_to_the_given_answer():
    sure, right = confidences(["no", "no"], np.array([[0.2, 0.8], [0.9, 0.1]]), YES_NO)
    assert sure.tolist() == [0.8, 0.9] and right.tolist() == [True, False]


# ---------------------------------------------------------------- texts

words = st.lists(st.sampled_from("fever cough aspirin patients discharged stable".split()), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(words, words)
def test_rouge_1_by_counting(reference, text):
    "Unigrams after Porter's stemmer: the words here keep their identity under it."
    shared = sum(min(reference.count(w), text.count(w)) for w in set(reference))
    found = rouge_scores(" ".join(reference), " ".join(text))
    assert found["ROUGE-1 recall"] == pytest.approx(shared / len(reference))
    assert found["ROUGE-1 F1"] == pytest.approx(2 * shared / (len(reference) + len(text)))
    assert found["ROUGE-L F1"] <= found["ROUGE-1 F1"] + 1e-12


def test_rouge_l_is_not_rouge_lsum():
    from rouge_score.rouge_scorer import RougeScorer
    reference, text = "one two\nthree four", "three four\none two"
    summed = RougeScorer(["rougeLsum"], use_stemmer=True).score(reference, text)["rougeLsum"].fmeasure
    assert rouge_scores(reference, text)["ROUGE-L F1"] == 0.5 < summed == 1.0


def test_what_a_caller_does_to_rouge_scores_changes_no_later_ones():
    first = rouge_scores("fever and cough", "fever")
    kept = dict(first)
    first["ROUGE-1 F1"] = -1.0
    assert rouge_scores("fever and cough", "fever") == kept


def test_rouge_is_stemmed_and_empty_texts_count():
    assert rouge_scores("patient discharge", "patients discharged")["ROUGE-2 F1"] == 1.0
    assert measure(ROUGE["ROUGE-1 F1"], ["a b", "a b"], ["a b", ""]) == 0.5


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("call, says", [
    (lambda: measure(ACCURACY, ["yes"], ["yes", "no"]), "1 true and 2 given"),
    (lambda: measure(f1(YES_NO), [], []), "macro-F1 was asked for no items"),
    (lambda: f1(YES_NO, "perhaps"), "'perhaps'"),
    (lambda: majority_answer([]), "at least one training item"),
    (lambda: seed_interval([0.5]), "1 runs"),
    (lambda: bootstrap_metric(ACCURACY, ["yes"], ["yes"]), "at least 2"),
    (lambda: bootstrap_metric(ACCURACY, ["yes", "no"], ["yes", "yes"], level=95), "level is 95"),
    (lambda: bootstrap_metric(ACCURACY, ["yes", "no"], ["yes", "yes"], draws=3), "draws is 3"),
    (lambda: bootstrap_metric(ACCURACY, ["yes", "no"], ["yes", "yes"], draws=0), "draws is 0"),
    (lambda: seed_interval([0.5, 0.6], level=95), "level is 95"),
    (lambda: seed_interval([0.5, float("nan"), 0.6]), r"values\[1\] is nan"),
    (lambda: holm([0.01, float("nan"), 0.03]), r"p_values\[1\] is nan"),
    (lambda: holm([0.01, 1.5, -0.03]), r"p_values\[1\] is 1.5; a number from 0 to 1"),
    (lambda: holm([0.01, -0.03]), r"p_values\[1\] is -0.03"),
    (lambda: reliability([float("nan"), 0.5], [1, 0]), r"confidence\[0\] is nan"),
    (lambda: reliability([0.5, 1.2], [1, 0]), r"confidence\[1\] is 1.2; a number from 0 to 1"),
    (lambda: reliability([0.5, 0.6], [1]), "equal length"),
    (lambda: measure(brier(YES_NO), ["yes"], [[float("nan")] * 2]), "a probability of nan"),
    (lambda: measure(brier(YES_NO), ["yes"], [[-0.2, -1.8]]), "a probability of -0.2; numbers from 0 to 1"),
    (lambda: calibration_error([], []), "confidence holds 0 values; at least 1"),
    (lambda: risk_coverage([0.5, float("nan")], [1, 0]), r"confidence\[1\] is nan"),
])
def test_refusals(call, says):
    with pytest.raises(UserError, match=says): call()
