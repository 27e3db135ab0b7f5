"The audit against the paper's text, the real test set, and arithmetic done another way."
import dataclasses
import itertools
import json
import re
from collections import Counter
from fractions import Fraction

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings, strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from biomamba import claims, paper_results
from biomamba.audit import (ITEMS, PUBMEDQA_GOLD, VERDICTS, Finding, _totals, accuracy_figure, accuracy_interval, confusion_tables,
                            correct_answers, findings_table, least_discordant, least_p, mixture_figure, mixture_scores, outside_classes, outside_figure,
                            published_least_p, published_outside, published_tables)
from biomamba.claims import PRINTED_INTERVALS, all_findings
from biomamba.paper import SCALES, TABLES, table
from biomamba.paper_results import ARMS, RESULTS, published_table

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:/\d+|:\d+)?"
NAMES = r"MIMIC-IV\S*|Mamba2\S*|ROUGE-\d|R-\d|v2\.2|C4|F1|BioMamba-\S+|Meditron3\S*|BioASQ 13B|\d+(?:\.\d+)?[MB]\b"


def numbers(text: str) -> set[str]:
    "The figures of a text, without those of names, scales, tables, sections and references."
    text = re.sub(r"\[undef[^\]]*\]|(?:Tables?|Figures?|Sections?) A?\d+", "", text)
    return {found.rstrip(",") for found in re.findall(NUMBER, re.sub(NAMES, "", text))}


def part(text: str, start: str, end: str) -> str:
    "The prose between two headings, without tables and headings."
    lines = text.splitlines()
    return "\n".join(line for line in lines[lines.index(start) + 1:lines.index(end)] if not line.startswith("|") and not re.match(r"\d\.\d ", line))


# ---------------------------------------------------------------- claims and the text

def test_every_figure_of_the_running_text_stands_in_a_claim(paper):
    text = paper.read_text(encoding="utf-8")
    printed = numbers(part(text, "Abstract", "1 Introduction")) | numbers(part(text, "3 Results", "4 Discussion")) | numbers(part(text, "4 Discussion", "Ethical Approval"))
    claimed = set().union(*(numbers(finding.claim) for finding in all_findings()))
    assert len(printed) > 60
    assert printed - claimed <= {"1", "2", "3"}, "the findings of Section 3.2 are numbered (1) to (3)"


def test_every_figure_of_a_claim_is_the_papers(paper):
    text = re.sub(r"\s+", " ", paper.read_text(encoding="utf-8"))
    for finding in all_findings():
        for number in numbers(finding.claim):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,]*\d)", text), (number, finding.claim)


def test_sections_exist(paper):
    text = paper.read_text(encoding="utf-8")
    for section in {s.strip() for finding in all_findings() for s in re.split(r",| to ", finding.where)}:
        heading = section if section in ("Abstract",) or section.startswith("Table ") else None
        pattern = rf"\b{heading}\b" if heading else rf"^(?:Appendix )?{re.escape(section)} [A-Z]"
        assert re.search(pattern, text, re.M), section


def test_claims_are_told_apart_and_judged():
    findings = all_findings()
    assert len({f.claim for f in findings}) == len(findings)
    assert all(f.verdict in VERDICTS.values() and f.where and f.computation for f in findings)
    assert all(f.consequence for f in findings if not f.holds)
    assert {f.verdict for f in findings} == set(VERDICTS.values())


@pytest.mark.parametrize("start", ["BioMamba+SFT matches or exceeds", "the mixture is 80% PubMed", "the PubMedQA test is a binary split", "public models were measured",
                                   "discharge generation goes on gaining", "the tokenizer has 50,280", "1,114 BioASQ and 800 PubMedQA"])
def test_what_does_not_hold(start):
    assert [f.verdict for f in all_findings() if f.claim.startswith(start)] == ["does not hold"]


@pytest.mark.parametrize("number, row, column, cell, part, start", [
    ("2", ["BioMamba-1.3B"], "C4", 15.00, claims.perplexity_claims, "C4 perplexity changes"),
    ("2", ["BioMamba-370M"], "Wikipedia", 16.18, claims.perplexity_claims, "Wikipedia perplexity falls"),
    ("2", ["BioMamba-130M"], "PubMed", 8.30, claims.perplexity_claims, "the relative reduction"),
    ("3", ["Meditron3-Gemma2-2B"], "C4", 14.00, claims.context_claims, "BioMamba-2.7B has the lowest"),
    ("4", ["BioMamba-1.3B+SFT"], "discharge R-2", 3.70, claims.rouge_claims, "BioMamba+SFT matches"),
    ("4", ["Mamba2-370M+SFT"], "completion R-2", 0.90, claims.rouge_claims, "fine-tuning raises"),
    ("4", ["BioMamba-780M+SFT"], "completion R-1", 7.70, claims.scale_claims, "completion R-1 saturates"),
    ("A10", ["370M"], "epochs", 3, claims.scale_claims, "BioMamba+SFT was fine-tuned"),
    ("A12", ["BioMamba+SFT"], "R-1", 16.53, claims.example_claims, "Table A12 gains"),
    ("7", ["BioMedLM"], "discharge R-2", 4.00, claims.external_claims, "BioMamba-130M+SFT exceeds"),
    ("11", ["370M"], "PubMedQA adapted+sft", 65.00, claims.gain_claims, "PubMedQA accuracy gains"),
    ("A8", ["BioMamba-1.3B", "CPT + SFT"], "yes F1", 0.790, claims.score_claims, "macro-F1 is the mean"),
    ("9", ["PubMed only"], "C4", 26.00, claims.mixture_claims, "PubMed alone"),
    ("9", ["20% C4 + 20% Wikipedia"], "PubMed", 8.40, claims.mixture_claims, "10% C4 + 10% Wikipedia has"),
    ("12", ["780M"], "best step", 5000, claims.curve_claims, "the best validation loss"),
    ("11", ["1.3B"], "BioASQ gain", 15.00, claims.discussion_claims, "continued pretraining gains most"),
])
def test_one_changed_cell_changes_the_verdict(number, row, column, cell, part, start, monkeypatch):
    "The verdicts are computed, not written down."
    judge = lambda: next(finding.holds for finding in part() if finding.claim.startswith(start))
    before, one = judge(), published_table(number)
    place, old = one.columns.index(column), tuple(one.row(*row).values())
    assert old[place] != cell
    rows = tuple((*old[:place], cell, *old[place + 1:]) if r == old else r for r in one.rows)
    changed = dataclasses.replace(one, rows=rows)
    monkeypatch.setitem(TABLES if number in TABLES else RESULTS, number, changed)
    if hasattr(paper_results, f"_TABLE_{number}"): monkeypatch.setattr(paper_results, f"_TABLE_{number}", changed)
    assert judge() is not before


def test_the_table_of_findings_escapes_and_counts():
    shown = findings_table([Finding("a < b", "x", "y", True), Finding("c", "x", "y", None, "z")])
    assert "a &lt; b" in shown._repr_html_() and "Verdicts: 1 × holds, 1 × cannot be decided." in shown._repr_markdown_()
    assert not any("|" in cell for row in findings_table(all_findings()).rows for cell in row), "a bar would break the Markdown table"


# ---------------------------------------------------------------- intervals and tests

def test_printed_intervals_are_in_the_text_and_wilsons(paper):
    text = paper.read_text(encoding="utf-8")
    found = set(re.findall(r"(\d+\.\d+%) (?:accuracy )?\((\d+/\d+); 95% confidence interval, ([\d.]+)% to ([\d.]+)%\)", text))
    assert found == {(accuracy, count, str(low), str(high)) for accuracy, count, low, high in PRINTED_INTERVALS.values()}
    for (benchmark, *_), (_, count, low, high) in PRINTED_INTERVALS.items():
        right, n = map(int, count.split("/"))
        assert n == ITEMS[benchmark]
        assert tuple(round(100 * v, 1) for v in proportion_confint(right, n, method="wilson")) == (low, high)


@pytest.mark.parametrize("benchmark, scale, arm", list(itertools.product(ITEMS, SCALES, ARMS[1:])))
def test_intervals_are_wilsons(benchmark, scale, arm):
    ours = accuracy_interval(benchmark, scale, arm)
    theirs = proportion_confint(correct_answers(benchmark, scale, arm), ITEMS[benchmark], method="wilson")
    assert (ours.low, ours.high) == pytest.approx(theirs, abs=1e-9)


@given(st.integers(0, 12), st.integers(0, 6))
def test_no_pair_of_answer_lists_gives_a_smaller_p(ahead, both_ways):
    "The bound is reached without, and never crossed with, questions that only the worse model got right."
    p = mcnemar([[0, both_ways], [ahead + both_ways, 0]], exact=True).pvalue
    assert p >= least_p([0], [ahead]) - 1e-12
    if both_ways == 0: assert p == pytest.approx(least_p([0], [ahead]))


@given(st.lists(st.tuples(st.sampled_from("yn"), st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_no_answers_with_the_same_right_answers_by_class_give_a_smaller_p(questions):
    "Any answers of two models: the test on them gives no less than the bound from their right answers by class."
    before, after = ([sum(question[0] == c and question[k] for question in questions) for c in "yn"] for k in (1, 2))
    lost, gained = sum(a and not b for _, a, b in questions), sum(b and not a for _, a, b in questions)
    least = least_discordant(before, after)
    assert lost >= least[0] and gained >= least[1] and gained - lost == least[1] - least[0]
    assert min(1, mcnemar([[0, lost], [gained, 0]], exact=True).pvalue) >= least_p(before, after) - 1e-12


def test_mcnemar_on_bioasq_at_130m_cannot_reach_five_percent():
    "23 more right yeses and 11 fewer right noes: statsmodels' test of the only table that fits."
    assert published_outside("BioASQ", "130m", "base+sft") == {0: {(20, 24)}} and published_outside("BioASQ", "130m", "adapted+sft") == {0: {(43, 13)}}
    assert published_least_p("BioASQ", "130m") == pytest.approx(mcnemar([[0, 11], [23, 0]], exact=True).pvalue) == pytest.approx(0.0576, abs=5e-5)
    assert "130m 0.058" in claims.gain_claims()[0].consequence and "at no scale" in claims.gain_claims()[0].consequence


# ---------------------------------------------------------------- tables of answers

def figures(gold: str, said: str) -> tuple[int, float, float]:
    "Right answers and both F1 scores, rounded half up from exact fractions."
    f1 = [Fraction(2 * sum(g == s == c for g, s in zip(gold, said)), gold.count(c) + said.count(c)) for c in "yn"]
    return sum(g == s and g != "o" for g, s in zip(gold, said)), *(int(f * 1000 + Fraction(1, 2)) / 1000 for f in f1)


def every_table(yes: int, no: int, neither: int, unanswered: int):
    "Answers to a known truth, one list for each table of counts."
    ways = lambda n: [(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]
    for y, n, o in itertools.product(ways(yes), ways(no), ways(neither)):
        if y[2] + n[2] + o[2] == unanswered and y[0] and n[1]:
            yield "y" * yes + "n" * no + "o" * neither, "".join(a * k for counts in (y, n, o) for a, k in zip("yno", counts))


@pytest.mark.parametrize("gold, unanswered", [((6, 4, 0), 0), ((5, 4, 3), 0), ((5, 4, 3), 2), ((3, 5, 2), 1), ((4, 3, 0), 1), ((3, 4, 1), 4), ((4, 2, 2), 5), ((2, 4, 2), 5)])
def test_the_search_finds_exactly_the_tables_that_enumeration_finds(gold, unanswered):
    by_figures = {}
    for truth, said in every_table(*gold, unanswered):
        right = [sum(g == s == c for g, s in zip(truth, said)) for c in "yn"]
        by_figures.setdefault(figures(truth, said), set()).add((*right, said.count("y")))
    assert len(by_figures) > 3
    for (correct, yes_f1, no_f1), tables in by_figures.items():
        assert set(confusion_tables(gold, correct, yes_f1, no_f1, unanswered)) == tables


def test_numbers_outside_are_exactly_those_of_some_truth_and_answers():
    "All truths and answers of six questions: what the search allows for a row is what some of them give."
    n, by_figures = 6, {}
    for yes, no in itertools.product(range(1, n + 1), repeat=2):
        if yes + no > n: continue
        for unanswered in range(n + 1):
            for truth, said in every_table(yes, no, n - yes - no, unanswered):
                by_figures.setdefault(figures(truth, said), set()).add(truth.count("o") + said.count("o"))
    assert len(by_figures) > 20
    for (correct, yes_f1, no_f1), outside in by_figures.items():
        assert set(outside_classes(n, correct, yes_f1, no_f1)) == outside


def test_a_figure_halfway_between_two_fits_both_roundings():
    assert all(32 in _totals(1, printed, 60) for printed in (0.062, 0.063)), "2/32 is 0.0625"
    assert list(_totals(1500, 1.0, 0)) == [3000]


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 20), st.data())
def test_no_true_table_is_missed(yes, no, neither, data):
    y, n, o = data.draw(st.integers(1, yes)), data.draw(st.integers(1, no)), data.draw(st.integers(0, neither))
    gold = "y" * yes + "n" * no + "o" * neither
    said = "y" * y + "n" * (yes - y) + "n" * n + "y" * (no - n) + "y" * o + "n" * (neither - o)
    assert (y, n, said.count("y")) in confusion_tables((yes, no, neither), *figures(gold, said))
    assert (y, n) in outside_classes(yes + no + neither, *figures(gold, said))[neither]


def test_the_published_split_of_the_real_file(data):
    from datasets import Dataset
    records = json.loads((data / "qa" / "ori_pqal.json").read_text(encoding="utf-8"))
    split = Dataset.from_dict({"label": [record["final_decision"] for record in records.values()]}).train_test_split(test_size=0.2, seed=42)
    counts = {name: Counter(split[name]["label"]) for name in ("train", "test")}
    assert tuple(counts["test"][label] for label in ("yes", "no", "maybe")) == PUBMEDQA_GOLD
    assert tuple(counts["train"][label] for label in ("yes", "no", "maybe")) == (449, 266, 85)


def test_seven_rows_fit_one_table_each():
    tables = {(scale, arm): published_tables(scale, arm) for scale in SCALES for arm in ARMS[1:]}
    assert {row: found for row, found in tables.items() if found} == {
        ("370m", "base+sft"): [(85, 46, 17)], ("370m", "adapted+sft"): [(88, 44, 17)], ("780m", "adapted+sft"): [(86, 49, 16)],
        ("1.3b", "base+sft"): [(87, 43, 17)], ("1.3b", "adapted+sft"): [(86, 54, 13)], ("2.7b", "base+sft"): [(90, 51, 16)], ("2.7b", "adapted+sft"): [(92, 54, 17)]}


# ---------------------------------------------------------------- Table 9 and the pictures

def test_robust_scores_leave_the_untrained_base_and_the_group_of_one_out():
    scores = mixture_scores("PubMed")
    assert set(scores) == set(table(9).column("configuration")[2:])
    assert sorted(abs(score.z) for score in scores.values())[len(scores) // 2] == pytest.approx(1 / 1.4826)


@pytest.mark.parametrize("draw, axes, says", [(accuracy_figure, 2, "overlap"), (outside_figure, 1, "seven meet at 25"), (mixture_figure, 3, "Two rows")])
def test_pictures_say_what_they_show(draw, axes, says):
    figure = draw()
    titles = [axis.get_title(loc="left") for axis in figure.axes] + [figure.get_suptitle()]
    assert len(figure.axes) == axes and any(says in title for title in titles)
    plt.close(figure)
