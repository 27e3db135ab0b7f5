"The mixture ablation: one budget, the same result on any number of processes, nothing chosen on a test set, a law that knows its error."
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict

import biomamba.ablation
from biomamba.ablation import Ablation, Point, adapt, arm_recipe, assemble_ablation, base_scores, each, identity_of_ablation, planned, read_part, read_point
from biomamba.checkpoints import load_model, load_tokenizer, save_model
from biomamba.collection import Collection
from biomamba.corpus import Corpus, open_collection, sample_source
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.mixing import (
    GENERAL, GOAL, SOURCES, Law, MixtureLaw, figures_of, fit_law, fit_mixture_law, grid_inside, interpolated, law_figures, leave_one_out,
    mean_loss, mixtures_asked, prediction_figures, propose, table_mixtures,
)
from biomamba.paper import table
from biomamba.perplexity import Scores
from biomamba.recipe import recipe
from biomamba.runs import Run, UserError

SMALL = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400, max_tokens=128, sequences_per_step=10, micro_batch_tokens=512, learning_rate=1e-2)
SOME = mixtures_asked("PubMed only; C4 only, 30%; Wikipedia only, 30%; 10% C4 + 10% Wikipedia; 20% C4 + 20% Wikipedia; 10% C4 + 20% Wikipedia")


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Ablation:
    "Two seeds of a small ablation, nothing trained yet."
    sizes = {"pubmed": 120, "c4": 80, "wikipedia": 30}
    collection = open_collection({name: sample_source(name, n) for name, n in sizes.items()}, SMALL)
    folder = tmp_path_factory.mktemp("ablation")
    save_model(new_model(mamba2_config(SMALL), seed=0), folder / "base", load_tokenizer(collection.tokenizer_folder))
    return Ablation(folder / "run", folder / "base", collection.folder, SMALL, 3, (5, 6), 8)


@pytest.fixture(scope="module")
def trained(ablation) -> Ablation:
    "Six configurations, trained and read on both parts; the last two trainings beside each other."
    Run(ablation.folder, identity_of_ablation(ablation, "small"))
    jobs = [job for shares in SOME.values() for job in ablation.jobs(shares)]
    each(adapt, jobs[-2:], processes=2)
    each(adapt, jobs)
    assert not list(ablation.folder.glob("*/test.json")), "training must not read a test set"
    each(read_point, [Point(job, "test", 1.0) for job in jobs])
    for part in ("validation", "test"): base_scores(ablation, part)
    return ablation


def points_of(mixtures) -> np.ndarray: return np.array([[s["c4"], s["wikipedia"]] for s in mixtures.values()])


X = points_of(table_mixtures())

# ---------------------------------------------------------------- one budget


def test_configurations_are_those_of_the_table():
    for name, c4, wikipedia, *_ in table(9).rows[1:]:
        shares = table_mixtures()[name]
        assert (shares["c4"], shares["wikipedia"]) == (c4 / 100, wikipedia / 100) and math.isclose(sum(shares.values()), 1)


@pytest.mark.parametrize("scale, steps", [("tiny", 30), ("130m", 200), ("130m", None)])
def test_configurations_differ_in_mixture_and_seed_alone(scale, steps):
    made = [dataclasses.asdict(arm_recipe(recipe(scale), shares, seed, steps)) for shares in table_mixtures().values() for seed in (42, 43)]
    apart = {name for one in made for name in one if one[name] != made[0][name]}
    assert apart == {"mixture", "seed"}
    assert steps is None or made[0]["sequences"] == steps * made[0]["sequences_per_step"]


def test_a_larger_share_holds_the_documents_of_a_smaller_one(ablation):
    of = lambda percent: Corpus(Collection(ablation.collection), arm_recipe(SMALL, {"pubmed": 1 - percent, "c4": percent, "wikipedia": 0.0}, 5, 10))
    labels = [{c.label(i) for i in range(len(c)) if c.label(i).startswith("c4")} for c in (of(0.1), of(0.3))]
    assert labels[0] and labels[0] < labels[1]


def test_plans_count_the_sequences_of_the_shares(ablation):
    [plan] = planned(ablation.jobs(SOME["10% C4 + 20% Wikipedia"])[:1])
    assert plan["sequences"] == {"pubmed": 21, "c4": 3, "wikipedia": 6}


# ---------------------------------------------------------------- trainings


def test_alone_or_beside_others_a_training_ends_the_same(trained, tmp_path):
    alone = dataclasses.replace(trained, folder=tmp_path / "alone")
    shares = SOME["10% C4 + 20% Wikipedia"]
    each(adapt, alone.jobs(shares)[1:], processes=1)
    mine, theirs = (load_model(a.jobs(shares)[1].folder / "model").state_dict() for a in (alone, trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (alone.jobs(shares)[1].folder / "validation.json").read_bytes() == (trained.jobs(shares)[1].folder / "validation.json").read_bytes()


def test_no_process_is_started_where_all_is_finished(trained, monkeypatch):
    monkeypatch.setattr(biomamba.ablation, "ProcessPoolExecutor", None)
    jobs = [job for shares in SOME.values() for job in trained.jobs(shares)]
    assert [t["steps"] for t in each(adapt, jobs, processes=2)] == [3] * 12
    with pytest.raises(TypeError): each(adapt, Ablation(trained.folder.parent / "new", *list(vars(trained).values())[1:]).jobs(SOME["PubMed only"]), processes=2)


def test_only_what_is_missing_is_trained(trained):
    jobs = [job for shares in SOME.values() for job in trained.jobs(shares)]
    stamps = {job.folder: (job.folder / "training.json").stat().st_mtime_ns for job in jobs}
    before = (jobs[3].folder / "validation.json").read_bytes()
    shutil.rmtree(jobs[3].folder)
    each(adapt, jobs)
    again = {job.folder: (job.folder / "training.json").stat().st_mtime_ns for job in jobs}
    assert [folder for folder in stamps if again[folder] != stamps[folder]] == [jobs[3].folder]
    assert (jobs[3].folder / "validation.json").read_bytes() == before
    each(read_point, [Point(jobs[3], "test", 1.0)])


def test_no_checkpoint_is_left(trained):
    assert not list(trained.folder.rglob("checkpoints")) and len(list(trained.folder.glob("*/model"))) == 12


@pytest.mark.slow
def test_an_error_in_a_process_is_its_sentence(ablation, tmp_path):
    broken = dataclasses.replace(ablation, folder=tmp_path / "broken", steps=500)
    with pytest.raises(UserError, match="the mixture needs"):
        each(adapt, broken.jobs(SOME["Wikipedia only, 30%"]), processes=2)


def test_a_folder_belongs_to_one_budget(trained):
    Run(trained.folder, identity_of_ablation(dataclasses.replace(trained, seeds=(5, 6, 7)), "small"))
    for change in ({"steps": 4}, {"documents": 9}):
        with pytest.raises(UserError, match="belongs to another run"):
            Run(trained.folder, identity_of_ablation(dataclasses.replace(trained, **change), "small"))


# ---------------------------------------------------------------- between two models


def test_ends_and_middle_of_the_line(trained):
    job = trained.jobs(SOME["PubMed only"])[0]
    ends = [dict(load_model(folder).named_parameters()) for folder in (trained.base, job.folder / "model")]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for weight in (0.0, 0.3, 1.0):
        found = dict(interpolated(trained.base, job.folder / "model", weight).named_parameters())
        for name, p in found.items():
            wanted = (1 - weight) * ends[0][name].double() + weight * ends[1][name].double()
            assert torch.allclose(p.double(), wanted, atol=1e-6)
            assert weight == 0.3 or torch.equal(p, ends[int(weight)][name])


def test_the_base_is_read_once_for_all(trained):
    scores = [read_part(job, "validation", 0) for shares in SOME.values() for job in trained.jobs(shares)]
    assert all(np.array_equal(s["c4"].nats, scores[0]["c4"].nats) for s in scores)
    assert len(list(trained.folder.rglob("base/validation.json"))) == 1


# ---------------------------------------------------------------- intervals


def made_up(seed, seeds=3, documents=50, spread=0.0):
    generator = np.random.default_rng(seed)
    tokens, hardness = generator.integers(40, 500, documents), generator.normal(2, 0.3, documents)
    errors = generator.normal(0, spread, seeds) if spread else np.zeros(seeds)
    return [{s: Scores(tokens * (hardness + e), tokens, tokens) for s in SOURCES} for e in errors]


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_do():
    width = lambda i: i.high - i.low
    same, apart = made_up(1), made_up(1, spread=0.1)
    assert width(mean_loss(same, GOAL)) == pytest.approx(width(mean_loss(same[:1], GOAL)))
    assert width(mean_loss(apart, GOAL)) > 2 * width(mean_loss(same, GOAL))


def test_the_difference_from_the_base_is_paired():
    base = made_up(1)[0]
    shifted = [{s: Scores(x.nats - 0.1 * x.tokens, x.tokens, x.bytes) for s, x in base.items()}]
    found = mean_loss(shifted, GENERAL, [base])
    assert np.allclose([found.estimate, found.low, found.high], -0.1)


def test_a_document_without_a_finite_loss_is_left_out_of_all():
    models = made_up(2)
    clean = [{s: Scores(np.delete(x.nats, 7), np.delete(x.tokens, 7), np.delete(x.bytes, 7)) for s, x in m.items()} for m in models]
    models[1]["c4"].nats[7] = math.nan
    assert mean_loss(models, {"c4": 1.0}) == mean_loss(clean, {"c4": 1.0})


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = []
    for k in range(1000):
        generator = np.random.default_rng(k)
        tokens, hardness = generator.integers(40, 500, 60), generator.normal(0, 0.3, 60)
        models = [{"c4": Scores(tokens * (2 + hardness + e), tokens, tokens)} for e in generator.normal(0, 0.04, 3)]
        held.append(not mean_loss(models, {"c4": 1.0}, draws=1000).excludes(2.0))
    assert 0.935 <= np.mean(held) <= 0.985, np.mean(held)


# ---------------------------------------------------------------- the law


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 4), st.floats(0.1, 1), st.floats(-20, -1), st.floats(-20, -1))
def test_an_exponential_law_is_found_again(c, k, a, b):
    truth = Law("exponential", c, k, (a, b))
    found = fit_law("exponential", X, truth(X))
    new = np.array([[0.075, 0.05], [0.125, 0.2]])
    assert np.abs(found(new) - truth(new)).max() < 1e-4


def test_left_out_predictions_of_the_linear_law_are_scikit_learns():
    y = 2 + X @ [0.4, -0.2] + np.random.default_rng(3).normal(0, 0.05, len(X))
    expected = y - cross_val_predict(LinearRegression(), X, y, cv=LeaveOneOut())
    assert np.allclose(leave_one_out("linear", X, y), expected)


def test_an_odd_configuration_shows_where_it_is_left_out():
    y = Law("exponential", 2, 0.5, (-9, -4))(X)
    y[11] -= 0.2
    errors = np.abs(leave_one_out("exponential", X, y))
    assert errors.argmax() == 11 and errors[11] > 0.15


@pytest.mark.slow
def test_predictions_hold_new_measurements_as_often_as_they_say():
    truth, new, held = Law("exponential", 2, 0.5, (-9, -4)), {"pubmed": 0.8, "c4": 0.075, "wikipedia": 0.125}, []
    for k in range(200):
        generator = np.random.default_rng(k)
        y = truth(X) + generator.normal(0, 0.01, len(X))
        law = MixtureLaw({"c4": fit_law("exponential", X, y, [truth.t])}, {"c4": leave_one_out("exponential", X, y)}, X)
        held.append(not law.predict(new, {"c4": 1.0}).excludes(truth(np.array([[0.075, 0.125]]))[0] + generator.normal(0, 0.01)))
    assert 0.92 <= np.mean(held) <= 1, np.mean(held)


def test_a_weighted_prediction_adds_errors_configuration_by_configuration():
    errors = np.random.default_rng(0).normal(0, 0.01, len(X))
    flat = Law("exponential", 2.0)
    opposed = MixtureLaw({s: flat for s in SOURCES}, {"pubmed": errors, "c4": -errors, "wikipedia": 0 * errors}, X)
    shares = {"pubmed": 0.9, "c4": 0.05, "wikipedia": 0.05}
    even = opposed.predict(shares, {"pubmed": 0.5, "c4": 0.5})
    assert even.low == even.high == 2.0
    from scipy.stats import t
    alone = opposed.predict(shares, {"pubmed": 1.0})
    assert math.isclose(alone.high - 2, t.ppf(0.975, 12) * math.sqrt(np.mean(errors**2)))


def test_the_proposal_is_new_inside_and_best():
    losses = {n: {"pubmed": 2 + 0.3 * (s["c4"] + s["wikipedia"]), "c4": 3 + 0.3 * math.exp(-15 * s["c4"]), "wikipedia": 3 + 0.3 * math.exp(-15 * s["wikipedia"])}
              for n, s in table_mixtures().items()}
    law = fit_mixture_law(losses, table_mixtures())
    proposed = propose(law)
    truth = lambda s: 0.15 * (s["c4"] + s["wikipedia"]) + 0.075 * (math.exp(-15 * s["c4"]) + math.exp(-15 * s["wikipedia"]))
    every = [dict(zip(SOURCES, (1 - p.sum(), *p))) for p in grid_inside(X)]
    assert truth(proposed) == pytest.approx(min(map(truth, every)), abs=1e-6)
    assert proposed not in table_mixtures().values() and math.isclose(sum(proposed.values()), 1)
    assert propose(law, {"pubmed": 1.0, "c4": 0.0, "wikipedia": 0.0})["pubmed"] >= 0.97


@pytest.mark.parametrize("names, says", [
    ("PubMed only; C4 only, 5%", "at least 6"),
    ("PubMed only; C4 only, 5%; C4 only, 10%; C4 only, 20%; C4 only, 30%; PubMed only", "at least 6"),
])
def test_too_few_configurations_are_refused(names, says):
    mixtures = mixtures_asked(names)
    with pytest.raises(UserError, match=says):
        fit_mixture_law({n: dict.fromkeys(SOURCES, 2.0 + s["c4"]) for n, s in mixtures.items()}, mixtures)


def test_the_ablation_refuses_too_few_and_none_at_all_before_anything_is_made(tmp_path, monkeypatch):
    from biomamba.cli import run_notebook
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    for asked, says in (({"configurations": "PubMed only; C4 only, 5%"}, "at least 6"), ({"steps": 0}, "steps=0 in the recipe"), ({"dial": "0.5 nan"}, "numbers from 0 to 1")):
        with pytest.raises(UserError, match=says): run_notebook("11b_mixture", {"run_dir": str(tmp_path / "run"), **asked}, tmp_path / "run")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_configurations_on_one_line_are_refused():
    mixtures = mixtures_asked({str(k): {"pubmed": 1 - k / 100, "c4": k / 100} for k in range(0, 30, 5)})
    with pytest.raises(UserError, match="one direction"):
        fit_mixture_law({n: dict.fromkeys(SOURCES, 2.0) for n in mixtures}, mixtures)


# ---------------------------------------------------------------- nothing is chosen on a test set


def decided(ablation, mixtures=SOME):
    "Proposal, best configuration and point of the dial."
    run = Run(ablation.folder, identity_of_ablation(ablation, "small"))
    measured = {n: [read_part(job, "validation") for job in ablation.jobs(s)] for n, s in mixtures.items()}
    losses = {n: {s: float(np.mean([m[s].loss for m in models])) for s in SOURCES} for n, models in measured.items()}
    law = fit_mixture_law(losses, mixtures)
    proposed = propose(law)
    each(adapt, ablation.jobs(proposed), processes=1)
    prediction = prediction_figures(law, proposed, [read_part(job, "validation") for job in ablation.jobs(proposed)])
    return assemble_ablation(run, ablation, mixtures, GOAL, law_figures(law, losses), {"shares": proposed, "prediction": prediction}, {"PubMed only": [0.0, 0.5, 1.0]})


def test_test_sets_decide_nothing_and_results_say_what_was_measured(trained):
    results = decided(trained)
    generator = np.random.default_rng(0)
    for path in trained.folder.glob("*/test*.json"):
        kept = json.loads(path.read_text())
        for about in kept.values(): about["nats"] = [n * generator.uniform(0.5, 2) for n in about["nats"]]
        path.write_text(json.dumps(kept))
    again = decided(trained)
    for key in ("best", "law"): assert again[key] == results[key]
    assert again["proposal"]["shares"] == results["proposal"]["shares"] and again["proposal"]["prediction"] == results["proposal"]["prediction"]
    assert again["dial"]["PubMed only"]["chosen"] == results["dial"]["PubMed only"]["chosen"]
    assert again["mixtures"]["PubMed only"]["test"] != results["mixtures"]["PubMed only"]["test"]
    assert json.loads(json.dumps(results, allow_nan=False)) and results["seeds"] == [5, 6]
    zero, _, one = results["dial"]["PubMed only"]["points"]
    assert zero["validation"]["gain"]["value"] == 0 and one["validation"] == results["mixtures"]["PubMed only"]["validation"]


def test_figures_agree_with_each_other():
    base, models = made_up(4)[0], made_up(5, spread=0.02)
    models = [{s: Scores(x.nats, base[s].tokens, x.bytes) for s, x in m.items()} for m in models]
    found = figures_of(models, base)
    changes = [math.log1p(found["change"][s]["value"]) for s in SOURCES]
    assert found["gain"]["value"] == pytest.approx(-changes[0]) and found["general"]["value"] == pytest.approx((changes[1] + changes[2]) / 2)
    assert found["goal"]["value"] == pytest.approx(changes[0] / 2 + (changes[1] + changes[2]) / 4)


@pytest.mark.parametrize("asked, says", [
    ("PubMed alone", "did you mean 'PubMed only'"), ({"x": {"pubmed": 0.9}}, "sum to 1"), ({"x": {"pubmed": 0.5, "notes": 0.5}}, "share of 'notes'"),
])
def test_configurations_that_are_none_are_refused(asked, says):
    with pytest.raises(UserError, match=says): mixtures_asked(asked)
