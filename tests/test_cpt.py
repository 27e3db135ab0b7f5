"Continued pretraining from end to end: the same twice, from anywhere, and one sentence for every mistake."
import ast
import gzip
import json
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest

from biomamba.building import build
from biomamba.contamination import EvaluationSet, evaluation_sets
from biomamba.corpus import Corpus, note_beside
from biomamba.records import Document
from biomamba.runs import Recipe, UserError, recipe
from biomamba.sample import sample_documents
from biomamba.training import open_corpus

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 400, "max_tokens": 128, "sequences_per_step": 4,
         "evaluations": 2, "validation_documents": 4, "base_steps": 4, "micro_batch_tokens": 512, "learning_rate": 1e-2}
SIZES = {"pubmed": 120, "c4": 60, "wikipedia": 30}
VOLATILE = {"seconds", "tokens_per_second"}


def write_source(folder: Path, documents: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    "A small corpus folder."
    folder = tmp_path_factory.mktemp("texts")
    for name, n in SIZES.items():
        write_source(folder / name, [{"id": d.id, "text": d.text} for d in sample_documents(name, n)])
    return folder


def cells() -> tuple[list[str], str, list[str]]:
    "The notebook's code: before the parameters, the parameters, after them."
    nb = nbformat.read(ROOT / "nbs" / "10_cpt.ipynb", 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    return [c.source for c in code[:at]], code[at].source, [c.source for c in code[at + 1:]]


def run(**parameters) -> dict:
    "Run the notebook's cells in this process, as papermill would; returns its names."
    before, defaults, after = cells()
    injected = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    names = {"In": [""], "__name__": "__main__"}
    for source in [*before, defaults, injected, *after]:
        names["In"].append(source)
        exec(compile(ast.parse(source), "<cell>", "exec"), names)
    return names


def stable(results: dict) -> dict:
    "Results without times and rates."
    return json.loads(json.dumps(results | {"training": {k: v for k, v in results["training"].items() if k not in VOLATILE}}))


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory) -> Path:
    "A finished small run."
    folder = tmp_path_factory.mktemp("runs") / "one"
    run(scale="tiny", corpus=str(texts), run_dir=str(folder), steps=6, seed=1, overrides=SMALL)
    return folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------------------------------- what a run leaves

def test_results_hold_the_contract(finished):
    results = results_of(finished)
    assert {"scale", "seed", "recipe", "corpus_fingerprint", "versions", "perplexity", "change", "training", "environment"} <= set(results)
    for model in ("base", "adapted"):
        for source in SIZES:
            figure = results["perplexity"][model][source]
            assert figure["ci95"][0] <= figure["ppl"] <= figure["ci95"][1] and figure["tokens"] > 0 < figure["documents"] and figure["bits_per_byte"] > 0
    assert set(results["change"]) == set(SIZES) and all({"relative", "ci95"} == set(c) for c in results["change"].values())
    training = results["training"]
    assert {"steps", "documents", "tokens", "best_step", "best_validation_loss", "seconds", "tokens_per_second"} <= set(training)
    assert set(training["best_validation_loss"]) == {"selection", *SIZES} and training["steps"] == 6 and training["documents"] == 24
    assert {"gpu", "driver", "cuda", "os", "python", "torch", "mamba_ssm", "transformers", "datasets"} == set(results["environment"])


def test_metrics_have_a_line_per_step_and_per_validation(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"} <= set(line) for line in steps)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6]


def test_stock_transformers_loads_the_model(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from biomamba.checkpoints import load_model

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(finished / "model"), AutoTokenizer.from_pretrained(finished / "model")
    assert type(stock).__name__ == "Mamba2ForCausalLM"
    ids = tokenizer("The patients were followed for 12 months.", return_tensors="pt")["input_ids"]
    ours = load_model(finished)
    with torch.no_grad():
        assert (stock(ids).logits - ours(ids).logits).abs().max() < 1e-4
    assert (tokenizer.eos_token_id, stock.generation_config.eos_token_id) == (0, 0)
    assert "Limits" in (finished / "model" / "README.md").read_text()


def test_the_same_seed_gives_the_same_results_and_another_does_not(finished, texts, tmp_path):
    run(scale="tiny", corpus=str(texts), run_dir=str(tmp_path / "again"), steps=6, seed=1, overrides=SMALL)
    run(scale="tiny", corpus=str(texts), run_dir=str(tmp_path / "other"), steps=6, seed=2, overrides=SMALL)
    one, again, other = (stable(results_of(folder)) for folder in (finished, tmp_path / "again", tmp_path / "other"))
    assert one == again
    assert one["perplexity"]["base"] == other["perplexity"]["base"] and one["perplexity"]["adapted"] != other["perplexity"]["adapted"]


def test_a_finished_run_is_returned_as_it_is(finished, texts):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".safetensors")}
    names = run(scale="tiny", corpus=str(texts), run_dir=str(finished), steps=6, seed=1, overrides=SMALL)
    assert names["results"] == results_of(finished)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.parent.name != "figures" and "tokenizer" not in p.name)


def test_the_root_and_nbs_mean_the_same_folder(monkeypatch):
    from biomamba.runs import resolve
    places = []
    for folder in (ROOT, ROOT / "nbs"):
        monkeypatch.chdir(folder)
        places.append(resolve("runs/some"))
    assert places == [ROOT / "runs" / "some"] * 2


def test_plan_only_loads_nothing(monkeypatch):
    import biomamba.checkpoints as checkpoints
    monkeypatch.setattr(checkpoints, "find_checkpoint", lambda *_: pytest.fail("a plan looked for a checkpoint"))
    with pytest.raises(SystemExit) as stopped:
        run(scale="2.7b", plan_only=True)
    assert stopped.value.code == 0


# ---------------------------------------------------------------- what it trains on

def shares_of(folder: Path, unit: str) -> dict[str, float]:
    "What the manifest of a run says of its mixture."
    return {name: about[f"share_of_{unit}"] for name, about in json.loads((folder / "manifest.json").read_text())["mixture"].items()}


@pytest.mark.parametrize("mixture, unit, wanted", [
    ("80/10/10 tokens", "tokens", {"pubmed": 0.8, "c4": 0.1, "wikipedia": 0.1}),
    ('{"shares": {"pubmed": 0.2, "c4": 0.2, "wikipedia": 0.6}, "by": "documents", "total": 20, "repeats": {"wikipedia": 2}}', "documents", {"pubmed": 0.2, "c4": 0.2, "wikipedia": 0.6})])
def test_a_mixture_reaches_the_training(texts, tmp_path, mixture, unit, wanted):
    "The training opens its corpus anew, from the recipe in the run folder: it has the run's fingerprint and the shares that were asked for."
    folder = tmp_path / "run"
    names = run(scale="tiny", corpus=str(texts), run_dir=str(folder), mixture=mixture, steps=2, overrides=SMALL)
    trained = open_corpus(names["collection"].folder, Recipe(**json.loads((folder / "recipe.json").read_text())["recipe"]), "train")
    assert trained.fingerprint == results_of(folder)["corpus_fingerprint"] and trained.mixture.by == unit
    assert shares_of(folder, unit) == pytest.approx(wanted, abs=0.05)
    assert trained.fingerprint != Corpus(names["collection"], recipe("tiny", **SMALL | {"mixture": names["chosen"].mixture})).fingerprint
    assert (len(np.unique(trained.index)) < len(trained)) == ("repeats" in mixture)


@pytest.mark.slow
def test_a_mixture_reaches_several_processes(texts, tmp_path):
    found = [run(scale="tiny", corpus=str(texts), run_dir=str(tmp_path / str(n)), mixture="80/10/10 tokens", steps=2, processes=n, overrides=SMALL)["results"] for n in (1, 2)]
    assert found[0]["corpus_fingerprint"] == found[1]["corpus_fingerprint"]
    assert found[0]["training"]["best_validation_loss"]["selection"] == pytest.approx(found[1]["training"]["best_validation_loss"]["selection"], rel=1e-5)


def test_a_built_corpus_is_trained_on_and_scores_know_what_was_kept_out(texts, tmp_path):
    met, unmet = (EvaluationSet(name, [Document("1", next(sample_documents("pubmed", 1, start=i)).text, "exam")]) for i, name in enumerate(("met", "unmet")))
    (tmp_path / "exam" / "met").mkdir(parents=True)
    (tmp_path / "exam" / "met" / "a.jsonl").write_text(json.dumps({"id": "1", "text": met.documents[0].text}) + "\n")
    build(texts, tmp_path / "corpus", vocabulary=SMALL["vocabulary"], base=True, against=tmp_path / "exam")
    asked = dict(scale="tiny", against=str(tmp_path / "exam"), steps=2, overrides=SMALL)
    built = run(corpus=str(tmp_path / "corpus"), run_dir=str(tmp_path / "run"), **asked)
    assert built["collection"].folder == tmp_path / "corpus"
    [kept_out] = evaluation_sets(tmp_path / "exam")
    assert note_beside(tmp_path / "run" / "model", kept_out) == "" and note_beside(tmp_path / "run" / "model", unmet) == "not decontaminated"
    assert stable(run(corpus=str(texts), run_dir=str(tmp_path / "other"), **asked)["results"])["perplexity"] == stable(built["results"])["perplexity"]

    file = tmp_path / "corpus" / "train" / "c4" / "data-00000-of-00001.arrow"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))      # the change hides its time
    refused("train/c4/data-00000-of-00001.arrow has another content", corpus=str(tmp_path / "corpus"), run_dir=str(tmp_path / "third"), **asked)


# ---------------------------------------------------------------- mistakes

def refused(*parts: str, **parameters) -> str:
    with pytest.raises(UserError) as caught:
        run(**parameters)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


def test_unknown_scale():
    refused("'8b'", "tiny, 130m", scale="8b")


def test_unknown_parameter():
    refused("'sede'", "did you mean 'seed'", sede=1)


def test_unknown_recipe_field():
    refused("'learning_rat'", "did you mean 'learning_rate'", overrides={"learning_rat": 1})


@pytest.mark.parametrize("parameters, part", [
    (dict(steps=0), "steps=0"), (dict(steps="many"), "steps='many'"), (dict(seed=-1), "seed=-1"),
    (dict(mixture={"pubmed": 0.7}), "sum to 1"), (dict(mixture="half"), "mixture='half'"),
    (dict(overrides={"precision": "fp8"}), "precision='fp8'"), (dict(overrides={"clip": 0}), "clip=0"),
])
def test_values_out_of_range(parameters, part):
    refused(part, "accepted", **parameters)


def test_processes_out_of_range(texts, tmp_path):
    refused("processes=0", "accepted", corpus=str(texts), run_dir=str(tmp_path / "r"), overrides=SMALL, processes=0)


def test_missing_corpus_folder(tmp_path):
    refused(str(tmp_path / "nowhere"), "'sample'", corpus=str(tmp_path / "nowhere"))


def test_corpus_without_a_source(texts, tmp_path):
    shutil.copytree(texts / "pubmed", tmp_path / "pubmed")
    refused("no folder 'c4/'", "it has pubmed", corpus=str(tmp_path))


def broken(texts: Path, folder: Path, documents: list[dict]) -> str:
    "A copy of the corpus whose c4 is something else."
    for name in ("pubmed", "wikipedia"):
        shutil.copytree(texts / name, folder / name)
    write_source(folder / "c4", documents)
    return str(folder)


def test_empty_source(texts, tmp_path):
    corpus = broken(texts, tmp_path / "c", [])
    refused("c4 holds no document", corpus=corpus, overrides=SMALL)


def test_all_duplicates(texts, tmp_path):
    text = next(sample_documents("c4", 1)).text
    corpus = broken(texts, tmp_path / "c", [{"id": str(i), "text": text} for i in range(60)])
    refused("'c4' has 1 documents after cleaning", corpus=corpus, overrides=SMALL)


def test_too_few_documents_for_the_held_out_sets(texts, tmp_path):
    corpus = broken(texts, tmp_path / "c", [{"id": d.id, "text": d.text} for d in sample_documents("c4", 9)])
    refused("'c4' has 9 documents", "at least 12", corpus=corpus, overrides=SMALL)


def test_too_few_documents_for_the_mixture(texts):
    refused("the mixture needs", "there are", corpus=str(texts), overrides=SMALL | {"sequences": 5000})


def test_truncated_file(texts, tmp_path):
    corpus = Path(broken(texts, tmp_path / "c", []))
    whole = gzip.compress((texts / "c4" / "texts.jsonl").read_bytes())
    (corpus / "c4" / "texts.jsonl").unlink()
    (corpus / "c4" / "texts.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refused("texts.jsonl.gz", corpus=str(corpus), overrides=SMALL)


def test_nothing_half_built_is_left_behind(texts, monkeypatch):
    import biomamba.collection as collection
    def broken(*_): raise OSError("the disk is full")
    monkeypatch.setattr(collection, "save_table", broken)
    cache = Path(os.environ["BIOMAMBA_CACHE"]) / "collections"
    before = set(cache.iterdir())
    with pytest.raises(OSError, match="disk is full"):
        run(corpus=str(texts), overrides=SMALL | {"vocabulary": 300})
    left = {p for p in set(cache.iterdir()) - before if p.suffix != ".lock"}
    assert all(p.name.startswith(".") for p in left), "what a next run goes on with is not named like a collection"
    assert not any(p.exists() for folder in left for p in folder.rglob("manifest.json"))


def test_run_dir_of_another_recipe(finished, texts):
    refused("belongs to another run", "recipe.learning_rate", corpus=str(texts), run_dir=str(finished), steps=6, seed=1, overrides=SMALL | {"learning_rate": 2e-2})


def test_run_dir_that_is_a_file(texts, tmp_path):
    (tmp_path / "file").write_text("")
    refused("is a file", corpus=str(texts), run_dir=str(tmp_path / "file"), steps=6, overrides=SMALL)


def test_a_folder_of_somebody_else_is_not_claimed(texts, tmp_path):
    (tmp_path / "model").mkdir()
    refused("is no run folder and holds model", corpus=str(texts), run_dir=str(tmp_path), steps=6, overrides=SMALL)


def test_a_mixture_without_what_the_base_needs(texts):
    refused("needs documents of c4, wikipedia", corpus=str(texts), mixture={"pubmed": 1.0}, overrides=SMALL)


def test_a_source_with_share_0_is_measured_and_not_trained_on(texts, tmp_path):
    mixture = {"pubmed": 1.0, "c4": 0.0, "wikipedia": 0.0}
    names = run(corpus=str(texts), run_dir=str(tmp_path / "r"), steps=2, mixture=mixture, overrides=SMALL)
    assert set(names["texts"].counts) == {"pubmed"} and set(names["results"]["change"]) == set(SIZES)


def test_a_checkpoint_of_another_shape(finished, texts):
    refused("has d_model=32 and the recipe of scale tiny 160", corpus=str(texts), model=str(finished))


def test_epochs_over_a_corpus_of_any_length(texts, tmp_path):
    names = run(corpus=str(texts), run_dir=str(tmp_path / "r"), overrides=SMALL | {"epochs": 1, "sequences_per_step": 64})
    assert names["results"]["training"]["steps"] == -(-len(names["texts"]) // 64)


def test_a_checkpoint_out_of_reach(monkeypatch):
    import biomamba.checkpoints as checkpoints
    monkeypatch.setattr(checkpoints, "is_offline_mode", lambda: True)
    message = refused("state-spaces/mamba2-780m", "tiny", scale="780m")
    assert "model" in message
