"lm-evaluation-harness, where it is installed, gives our bits per byte and our answers on an exported model, offline."
import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from biomamba.checkpoints import save_model
from biomamba.comparison import candidate, open_model, score_texts
from biomamba.harness import VERSION, lm_eval_tasks, question_tasks
from biomamba.heldout import test_texts as texts_of
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.perplexity import perplexity
from biomamba.qa import score_questions
from biomamba.questions import sample_qa
from biomamba.runs import UserError, recipe
from biomamba.steps import train_tokenizer, wrap_tokenizer

SOURCES = ("pubmed", "c4", "wikipedia")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=f"lm-eval is not installed: pip install 'lm_eval[hf]=={VERSION}'")
def test_the_harness_gives_our_numbers(tmp_path):
    if version("lm_eval") != VERSION:
        pytest.skip(f"lm-eval {version('lm_eval')} is installed and the task files were tried with {VERSION}")
    texts = {s: [t[:900] for t in some] for s, some in texts_of("sample", documents=3).items()}
    tokenizer = wrap_tokenizer(train_tokenizer([t for some in texts.values() for t in some], 500))
    save_model(new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=500)), 0), tmp_path / "model", tokenizer)
    files = sample_qa({"questions": 24, "batches": 2, "batch": 12})
    given = {"pubmedqa": str(files), "bioasq": str(files / "bioasq" / "sample_batch2.json")}
    lm_eval_tasks(str(tmp_path / "tasks"), documents=3, characters=900, **given)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--include_path", str(tmp_path / "tasks"),
               "--tasks", ",".join(f"biomamba_{s}" for s in (*SOURCES, "pubmedqa", "bioasq")), "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "1", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    c = candidate("ours", tmp_path / "model")
    model = open_model(c)
    for s in SOURCES:
        ours = perplexity(score_texts(c, model, texts[s])).bits_per_byte
        assert math.isclose(theirs[f"biomamba_{s}"]["bits_per_byte,none"], ours, rel_tol=1e-5), s
    for name, (classes, questions) in question_tasks(**given).items():
        answers = {p.id: p for p in score_questions(model, tokenizer, questions, classes, max_tokens=2048)}
        [samples] = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        logged = [json.loads(line) for line in samples.read_text().splitlines()]
        assert {s["doc"]["id"] for s in logged} == set(answers) and len(answers) == 12
        for sample in logged:
            likelihoods = [float(r[0][0]) for r in sample["resps"]]
            assert likelihoods == pytest.approx([answers[sample["doc"]["id"]].scores[c] for c in classes], rel=1e-4)
        accuracy = sum(p.gold == p.prediction for p in answers.values()) / len(answers)
        assert math.isclose(theirs[name]["acc,none"], accuracy, rel_tol=1e-9), name


@pytest.mark.parametrize("name", ["thesis.txt", "pairs.jsonl", "settings.yaml"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}, which is no task file"):
        lm_eval_tasks(str(tmp_path), documents=2)
    assert (tmp_path / name).read_text() == "mine"


def test_written_again_the_folder_is_the_same(tmp_path):
    first = lm_eval_tasks(str(tmp_path / "tasks"), sources=["c4"], documents=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "tasks").iterdir()}
    assert lm_eval_tasks(str(tmp_path / "tasks"), sources=["c4"], documents=2) == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "tasks").iterdir()} == before and "biomamba_c4" in first


def test_tasks_of_notes_are_marked_and_their_owners_alone(tmp_path):
    from biomamba.runs import restricted
    from biomamba.sample import write_sample
    write_sample(tmp_path / "hospital", documents=30, notes=20)
    lm_eval_tasks(str(tmp_path / "tasks"), corpus=str(tmp_path / "hospital"), sources=["notes", "c4"], documents=2)
    assert "MIMIC" in (restricted(tmp_path / "tasks") or "") and (tmp_path / "tasks").stat().st_mode & 0o077 == 0
    lm_eval_tasks(str(tmp_path / "plain"), corpus=str(tmp_path / "hospital"), sources=["c4"], documents=2)
    assert restricted(tmp_path / "plain") is None
