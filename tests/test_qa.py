"Question answering: splits of the real and of the synthetic files, refusals, one prompt, predictions, the whole run at its smallest."
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from biomamba.checkpoints import load_model, save_model
from biomamba.mamba2 import EOS, mamba2_config, new_model
from biomamba.metrics import ACCURACY, measure
from biomamba.protocols import (base_of, models_of, paired_results, protocol_results, qa_recipe, run_arm, share_of,
                                splits_of)
from biomamba.qa import (Prediction, ask, candidates, generated_answers, prompt_text, prompts_of, qa_example, read_answer, read_predictions,
                         score_questions, write_settings)
from biomamba.questions import (YES_NO, YES_NO_MAYBE, Question, apart, balanced, bioasq_files, bioasq_items,
                                bioasq_parts, check_apart, hold_out, published_split, read_bioasq_set,
                                read_pubmedqa_set, repeated, yes_no_split)
from biomamba.recipe import recipe
from biomamba.runs import UserError
from biomamba.sample import sample_documents, sample_questions
from biomamba.statistics import tango_interval
from biomamba.steps import train_tokenizer, wrap_tokenizer
from biomamba.training import weights_of

DATA = Path(os.environ.get("BIOMAMBA_DATA", "nowhere")) / "qa"
real = pytest.mark.skipif(not DATA.exists(), reason="BIOMAMBA_DATA names no folder with qa/")
SHAPE = dict(d_model=32, layers=2, state=8, head_dim=16, vocabulary=512)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught: call()
    return str(caught.value)


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    "Sixty questions of PubMedQA with every second in the official list, and three batches of BioASQ."
    folder = tmp_path_factory.mktemp("qa")
    records = dict(sample_questions("pubmedqa", 60))
    write_json(folder / "ori_pqal.json", records)
    write_json(folder / "test_ground_truth.json", {i: r["final_decision"] for i, r in list(records.items())[::2]})
    for b in range(3): write_json(folder / f"{b + 9}B1_golden.json", {"questions": [r for _, r in sample_questions("bioasq", 16, start=16 * b)]})
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 120)), 512))


@pytest.fixture(scope="module")
def newborn(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    save_model(new_model(mamba2_config(recipe("tiny", **SHAPE)), seed=0), folder, tokenizer)
    return folder


def question(i, answer="yes", benchmark="bioasq", **fields) -> Question:
    return Question(**dict(id=str(i), question=f"Question {i}?", context=f"Context {i}.", answer=answer, benchmark=benchmark, pmids=(f"p{i}",)) | fields)


# ---------------------------------------------------------------- the real files

@real
def test_the_published_split_of_the_real_file():
    found, truth = read_pubmedqa_set(DATA)
    assert len(found) == 1000 and not found.counts and len(truth) == 500
    train, test = ([found.questions[i] for i in part] for part in published_split(1000))
    assert Counter(q.answer for q in test) == {"yes": 103, "no": 72, "maybe": 25}
    assert Counter(q.answer for q in train) == {"yes": 449, "no": 266, "maybe": 85}
    assert len({q.id for q in train} & set(truth)) == 394


@real
def test_the_three_protocols_of_the_real_files():
    splits, missing, _ = splits_of("130m", str(DATA / "ori_pqal.json"), str(DATA))
    binary, three = splits
    assert not missing and {name: len(some) for name, some in binary.tests.items()} == {"as_published": 200, "binary": 175, "bioasq": 26}
    assert len(three.tests["official"]) == 500 == len(three.train) + len(three.validation)
    assert binary.counts["pubmedqa_training_questions"] == 800 and binary.counts["bioasq_items"] == bioasq_items(800, 0.65) == 1485
    assert binary.counts["bioasq_repeated"] == 1485 - binary.counts["bioasq_balanced"] > 1400
    assert {q.batch for q in binary.tests["bioasq"]} == {"12B2"} and {q.batch for q in binary.train} == {"", "12B1"}


@real
def test_no_scored_question_of_the_real_files_was_trained_on():
    for split in splits_of("tiny", str(DATA), str(DATA))[0]:
        seen = {key for q in (*split.train, *split.validation) for key in (q.id, q.question.lower(), q.context, *q.pmids)}
        for some in split.tests.values():
            assert not seen & {key for q in some for key in (q.id, q.question.lower(), q.context, *q.pmids)}


# ---------------------------------------------------------------- splits

def test_a_planted_test_question_is_taken_out_of_training(texts):
    pubmedqa, truth = read_pubmedqa_set(texts)
    train, test = bioasq_parts(str(texts))
    one, other = read_bioasq_set(test, "test").questions[:2]
    planted = read_bioasq_set(train, "train")
    before = yes_no_split(pubmedqa, planted, read_bioasq_set(test, "test")).counts["left_out"]
    planted.questions += [dataclasses.replace(one, id="a", context="x", pmids=()), question("b", pmids=other.pmids), question("c", context=other.context.upper())]
    split = yes_no_split(pubmedqa, planted, read_bioasq_set(test, "test"))
    after = split.counts["left_out"]
    for why in ("question", "source abstract", "context"):
        key = f"same {why} as a held-out question"
        assert after[key] == before.get(key, 0) + 1
    assert not {"a", "b", "c"} & {q.id for q in (*split.train, *split.validation)}


@pytest.mark.parametrize("change, why", [(dict(id="1"), "id"), (dict(question="question  1"), "question"),
                                         (dict(context="CONTEXT 1"), "context"), (dict(pmids=("x", "p1")), "source abstract")])
def test_touching_questions_are_refused(change, why):
    planted = question(2, **change)
    assert apart([planted, question(3)], [question(1)])[0] == [question(3)]
    assert f"the same {why}" in refusal(lambda: check_apart([question(3), planted], [question(1)]))
    check_apart([question(3)], [question(1)])


def test_a_test_question_in_training_stops_the_run(texts, newborn, tmp_path):
    "Planted behind the split's back, it is refused before anything is trained."
    [split] = splits_of("tiny", None, str(texts))[0]
    planted = dataclasses.replace(split, train=(*split.train, split.tests["bioasq"][0]))
    said = refusal(lambda: run_arm(tmp_path, "base", newborn, planted, qa_recipe("tiny", "base", 42, 1)))
    assert "touch the bioasq questions" in said and not list(tmp_path.iterdir())


def test_splits_share_nothing_and_lose_nothing(texts):
    splits, missing, read = splits_of("tiny", str(texts), str(texts))
    assert not missing
    for split in splits:
        held = [q for some in split.tests.values() for q in some]
        check_apart(split.train, held), check_apart(split.validation, held), check_apart(split.train, split.validation)
    binary, three = splits
    left_out = sum(binary.counts["left_out"].values())
    unbalanced = binary.counts["bioasq_questions"] - binary.counts["bioasq_balanced"]
    questions = {q.id for q in (*binary.train, *binary.validation, *binary.tests["as_published"], *binary.tests["bioasq"])}
    assert len(questions) + left_out + unbalanced == sum(map(len, read)) or binary.counts["bioasq_repeated"] == 0
    assert {q.id for q in three.tests["official"]} <= set(json.loads((texts / "test_ground_truth.json").read_text()))


def test_validation_moves_with_no_other_question():
    many = [question(i) for i in range(100)]
    chosen = {q.id for q in hold_out(many)[1]}
    assert len(chosen) == 10 and chosen == {q.id for q in hold_out(many[::-1])[1]} and len(hold_out(many, most=3)[1]) == 3
    fewer = {q.id for q in hold_out([q for q in many if q.id != min(chosen)])[1]}
    assert len(chosen & fewer) == 9 - (len(fewer) < 10)


def test_balance_and_repetition():
    many = [question(i, "yes" if i % 3 else "no") for i in range(30)]
    even = balanced(many)
    assert Counter(q.answer for q in even) == {"yes": 10, "no": 10} and even == balanced(many[::-1])
    assert Counter(q.id for q in repeated(even, 45)).most_common(1)[0][1] == 3 and len(repeated(even, 45)) == 45
    assert [bioasq_items(800, r) for r in (0.65, 0.7, 0)] == [1485, 1866, 0]
    assert share_of("130m") == 0.65 and share_of("1.3b") == 0.70


def test_batches_are_ordered_by_their_numbers(tmp_path):
    for name in ("12B10", "12B2", "7B1"): write_json(tmp_path / f"{name}_golden.json", {"questions": []})
    write_json(tmp_path / "test_ground_truth.json", {"1": "yes"})
    assert [p.name.split("_")[0] for p in bioasq_files(tmp_path)] == ["7B1", "12B2", "12B10"]
    train, test = bioasq_parts(str(tmp_path))
    assert len(train) == 2 and [p.name for p in test] == ["12B10_golden.json"]


def test_a_training_file_is_never_the_test(tmp_path):
    for name in ("training13b", "training12b", "13B4_golden", "13B1_golden"): write_json(tmp_path / f"{name}.json", {"questions": []})
    train, test = bioasq_parts(str(tmp_path))
    assert [p.stem for p in train] == ["training12b", "training13b", "13B1_golden"] and [p.stem for p in test] == ["13B4_golden"]


# ---------------------------------------------------------------- bad input

def entry(**fields) -> dict:
    return {"QUESTION": "Is it?", "CONTEXTS": ["One."], "final_decision": "yes"} | fields


def test_bad_records_are_named_and_counted(tmp_path):
    good = {str(i): entry(QUESTION=f"Is it {i}?") for i in range(60)}
    bad = {"100": entry(QUESTION="A?", final_decision="perhaps"), "101": entry(QUESTION="B?", CONTEXTS=[]), "102": entry(QUESTION="is it 7"),
           "103": entry(QUESTION="Is it 8?", final_decision="no"), "104": entry(QUESTION="C?", final_decision=None)}
    found, _ = read_pubmedqa_set(write_json(tmp_path / "ori_pqal.json", good | bad))
    assert len(found) == 60 and dict(found.counts) == {
        "an answer that is neither yes, no nor maybe": 1, "no contexts": 1, "the same question again": 1,
        "the same question again, with another answer": 1, "without an answer": 1}
    assert any("102: the same question again" in line for line in found.named) and any("ori_pqal.json at 61" in line for line in found.named)


def test_many_bad_records_are_refused(tmp_path):
    entries = {str(i): entry(QUESTION=f"Is it {i}?", final_decision="yes" if i % 5 else "da") for i in range(50)}
    assert "10 of 50 records are corrupt" in refusal(lambda: read_pubmedqa_set(write_json(tmp_path / "q.json", entries)))
    asked = {"id": "1", "body": "Is it?", "type": "yesno", "exact_answer": "maybe", "snippets": [{"text": "One."}]}
    assert "1 records" in refusal(lambda: read_bioasq_set([write_json(tmp_path / "b.json", {"questions": [asked]})], "b"))


def test_bioasq_without_snippets_is_left_out_and_counted(tmp_path):
    asked = [r for _, r in sample_questions("bioasq", 30)]
    asked[3]["snippets"] = []; asked[4] = asked[5] | {"exact_answer": "no" if asked[5]["exact_answer"] == "yes" else "yes"}
    found = read_bioasq_set([write_json(tmp_path / "1.json", {"questions": asked})], "b")
    assert found.counts["no snippets"] == 1 and found.counts["the same question again, with another answer"] == 1 and len(found) == 28


def test_a_compressed_file_beside_its_list(tmp_path):
    write_json(tmp_path / "q.json.gz", {str(i): entry(QUESTION=f"Is it {i}?") for i in range(3)})
    write_json(tmp_path / "test_ground_truth.json", {"0": "yes"})
    found, truth = read_pubmedqa_set(tmp_path)
    assert len(found) == 3 and truth == {"0": "yes"}


def files(folder, **contents):
    for name, content in contents.items(): write_json(folder / f"{name}.json", content)
    return folder


@pytest.mark.parametrize("make, says", [
    (lambda t: read_pubmedqa_set(t / "nowhere"), "does not exist"),
    (lambda t: read_pubmedqa_set(files(t, a={"1": entry()}, b={"2": entry()})), "holds 2 files of PubMedQA, a.json, b.json"),
    (lambda t: read_pubmedqa_set(files(t, a={"1": entry()}, truth={"9": "yes"})), "lists 1 ids that the questions lack, such as 9"),
    (lambda t: read_pubmedqa_set(files(t, a={"1": entry()}, truth={"1": "no"})), "1 is 'no' there and 'yes' here"),
    (lambda t: read_pubmedqa_set(files(t, a={"1": entry()}, truth={"1": "no"}, truth2={"1": "yes"})), "2 lists of test answers"),
    (lambda t: read_pubmedqa_set(files(t, a={"1": entry(final_decision=None)}) / "a.json"), "holds no question with an answer"),
    (lambda t: bioasq_files(files(t, a={"1": entry()})), "holds no file of BioASQ"),
    (lambda t: bioasq_parts(str(files(t, a={"questions": []}))), "at least two batches"),
    (lambda t: bioasq_parts("x", train="y"), "the folder alone or the two others"),
    (lambda t: bioasq_parts(test="y"), "both are needed"),
    (lambda t: splits_of("780m"), "neither pubmedqa nor bioasq is given"),
    (lambda t: splits_of("tiny", str(files(t, a={str(i): entry(QUESTION=f"Is it {i}?", CONTEXTS=[f"Text {i}."]) for i in range(20)}))), "has the answer no"),
    (lambda t: models_of("130m"), "adapted is not given"),
    (lambda t: hold_out([question(1)]), "1 questions are left"),
])
def test_refusals(tmp_path, make, says):
    assert says in refusal(lambda: make(tmp_path))


def test_what_is_not_given_is_absent_and_says_why(texts, tmp_path):
    _, missing, _ = splits_of("tiny", None, str(texts))
    assert set(missing) == {"as_published", "binary", "official"}
    alone = tmp_path / "ori_pqal.json"
    alone.write_bytes((texts / "ori_pqal.json").read_bytes())
    _, missing, _ = splits_of("tiny", str(alone))
    assert set(missing) == {"official", "bioasq"} and "test_ground_truth.json" in missing["official"]


# ---------------------------------------------------------------- prompts and scores

def test_one_prompt_for_training_and_scoring(tokenizer, texts):
    asked = read_pubmedqa_set(texts)[0].questions
    for q, made in zip(asked, prompts_of(asked, YES_NO_MAYBE, tokenizer, 128)):
        for answer in YES_NO_MAYBE:
            example = qa_example(dataclasses.replace(q, answer=answer), YES_NO_MAYBE, tokenizer, 128)
            assert np.array_equal(example.prompt, made.prompt), "the answer must not show in the prompt"
            assert example.tokens <= 128 and example.answer[-1] == EOS and tokenizer.decode(example.answer[:-1]) == f" {answer}"
        text = tokenizer.decode(made.prompt[1:])
        assert text.startswith("Context:") and text.endswith(f"\nQuestion: {q.question}\nAnswer:")
        whole = qa_example(q, YES_NO_MAYBE, tokenizer, 4000)
        assert whole.cut == 0 and made.cut == len(whole.prompt) - len(made.prompt)


def test_the_parts_of_a_prompt_make_the_ids_of_the_whole_text(tokenizer):
    assert len(tokenizer(" the").input_ids) < len(tokenizer(" ").input_ids) + len(tokenizer("the").input_ids), "else nothing could differ"
    for context in ("the patients of the trial were well.", " the patients of the trial were well. \n"):
        asked = question(1, context=context)
        assert qa_example(asked, YES_NO, tokenizer, 4000).prompt[1:].tolist() == tokenizer(prompt_text(asked)).input_ids


def test_a_question_that_fills_the_window_is_named(tokenizer):
    long = question(1, question="Does it? " * 60)
    assert qa_example(long, YES_NO, tokenizer, 64) is None
    assert "1 questions leave no room for a context in 64 tokens, such as 1" in refusal(lambda: prompts_of([long, question(2)], YES_NO, tokenizer, 64))


def test_scores_do_not_depend_on_company(newborn, tokenizer, texts):
    model, asked = load_model(newborn), read_pubmedqa_set(texts)[0].questions[:12]
    together = score_questions(model, tokenizer, asked, YES_NO_MAYBE, 160)
    for q, p in zip(asked, together):
        [alone] = score_questions(model, tokenizer, [q], YES_NO_MAYBE, 160, micro_batch_tokens=64)
        assert list(alone.scores.values()) == pytest.approx(list(p.scores.values()), abs=1e-4) and alone.prompt_sha256 == p.prompt_sha256
        assert p.prediction == max(p.scores, key=p.scores.get) and p.probabilities.sum() == pytest.approx(1)


def test_a_likelihood_by_hand(newborn, tokenizer):
    model, q = load_model(newborn), question(1)
    [p] = score_questions(model, tokenizer, [q], YES_NO, 128)
    prompt = qa_example(q, YES_NO, tokenizer, 128).prompt
    for answer, ids in zip(YES_NO, candidates(YES_NO, tokenizer)):
        with torch.no_grad(): log = model(torch.tensor(np.concatenate([prompt, ids]))[None]).logits[0].log_softmax(-1)
        assert p.scores[answer] == pytest.approx(sum(float(log[len(prompt) - 1 + k, i]) for k, i in enumerate(ids)), abs=1e-4)


def test_what_was_written_is_never_guessed_at(newborn, tokenizer):
    asked = [question(i) for i in range(3)]
    written = generated_answers(load_model(newborn), tokenizer, asked, score_questions(load_model(newborn), tokenizer, asked, YES_NO, 64), 64)
    assert all(p.generated is not None for p in written)
    assert [read_answer(t, YES_NO) for t in ("", " maybe yes", "yesterday", " YES.", "(no)", " nothing")] == ["neither", "neither", "neither", "yes", "no", "neither"]
    assert generated_answers(load_model(newborn), tokenizer, [], []) == []


# ---------------------------------------------------------------- results

def made_up(pattern: str, golds: str) -> list[Prediction]:
    word = {"y": "yes", "n": "no", "m": "maybe"}
    return [Prediction(str(i), word[g], {c: -0.1 if c == word[p] else -2.5 for c in YES_NO}, word[p], "0" * 16) for i, (p, g) in enumerate(zip(pattern, golds))]


def test_results_of_known_answers():
    golds = "yyyynnmm"
    base, adapted = [made_up("yyyyyyyy", golds), made_up("nnnnnnnn", golds)], [made_up("yyyynnyy", golds), made_up("yyyynyyy", golds)]
    found = protocol_results({"base": base, "adapted": adapted}, YES_NO)
    assert found["majority"] == {"answer": "yes", "accuracy": 0.5} and found["ceiling"] == 0.75
    assert found["arms"]["base"]["accuracy"]["each"] == [0.5, 0.25] and found["arms"]["adapted"]["accuracy"]["mean"] == pytest.approx(0.6875)
    paired = found["adapted_minus_base"]
    assert paired["over_items"]["mean"] == pytest.approx(0.3125) and [p["difference"] for p in paired["by_seed"]] == pytest.approx([0.25, 0.375])
    assert [(p["only_base"], p["only_adapted"]) for p in paired["by_seed"]] == [(0, 2), (1, 4)] and paired["by_seed"][0]["mcnemar_p"] == 0.5
    assert found["arms"]["base"]["above_majority"]["mean"] == pytest.approx(-0.125)
    one = protocol_results({"base": base[:1], "adapted": adapted[:1]}, YES_NO)
    by_seed = one["adapted_minus_base"]["by_seed"][0]
    assert one["adapted_minus_base"]["over_items"] == {"mean": by_seed["difference"], "ci95": by_seed["ci95"]}, "one seed: both are of the same answers"
    assert by_seed["ci95"] == [(w := tango_interval(0, 2, 8)).low, w.high]
    same = protocol_results({"base": base[:1], "adapted": base[:1]}, YES_NO)
    assert same["adapted_minus_base"]["over_items"]["ci95"][0] < -0.3 and same["arms"]["base"]["above_majority"]["ci95"][1] > 0.3
    assert one["arms"]["base"]["accuracy"]["ci95"] is None and len(one["arms"]["base"]["wilson"]) == 1
    json.dumps(found, allow_nan=False)


def test_other_items_are_no_comparison():
    with pytest.raises(AssertionError): paired_results([made_up("yn", "yn")], [made_up("yn", "yn")[::-1]])


def test_a_run_folder_knows_its_base(newborn, tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "cache" / "base" / "x" / "model"
    made.mkdir(parents=True)
    for p in newborn.iterdir(): (made / p.name).write_bytes(p.read_bytes())
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for p in newborn.iterdir(): (run / "model" / p.name).write_bytes(p.read_bytes())
    identity = {"model": "base made at scale tiny", "weights_sha256": weights_of(newborn)}
    write_json(run / "recipe.json", identity)
    assert base_of(run) == made and models_of("tiny", None, str(run)) == {"base": made, "adapted": run / "model"}
    write_json(run / "recipe.json", identity | {"weights_sha256": "0"})
    assert "none in" in refusal(lambda: base_of(run))


def test_models_of_two_tokenizers_are_refused(newborn, tmp_path):
    other = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("c4", 60)), 512))
    save_model(load_model(newborn), tmp_path / "other", other)
    assert "different tokenizers" in refusal(lambda: models_of("tiny", str(newborn), str(tmp_path / "other")))


def test_an_arm_reads_the_test_once(newborn, texts, tmp_path):
    splits, *_ = splits_of("tiny", str(texts), str(texts))
    tuned = qa_recipe("tiny", "base", 42, 2, {"max_tokens": 96, "evaluations": 1})
    first = run_arm(tmp_path, "base", newborn, splits[1], tuned, write=True)
    folder = tmp_path / "three-base-42"
    stamps = {p: (folder / p).stat().st_mtime_ns for p in ("predictions.jsonl", "test_read.json", "model/model.safetensors")}
    again = run_arm(tmp_path, "base", newborn, splits[1], tuned, write=True)
    assert again == first and stamps == {p: (folder / p).stat().st_mtime_ns for p in stamps}
    stored = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert set(stored[0]) == {"protocol", "id", "gold", "scores", "prediction", "prompt_sha256", "cut", "batch", "generated"}
    assert [s["id"] for s in stored] == [q.id for q in splits[1].tests["official"]] and set(stored[0]["scores"]) == set(YES_NO_MAYBE)
    trained = {q.id for q in (*splits[1].train, *splits[1].validation)}
    assert not trained & {s["id"] for s in stored}, "no scored id was trained on"
    assert measure(ACCURACY, [p.gold for p in read_predictions(folder / "predictions.jsonl")["official"]], [p.prediction for p in again["predictions"]["official"]]) <= 1


# ---------------------------------------------------------------- the command

def test_ask_prints_an_answer_with_its_probability(newborn, tmp_path):
    (tmp_path / "text.txt").write_text("Nine of ten patients recovered.")
    write_settings(newborn, YES_NO, 96)
    command = [sys.executable, "-c", "import sys; from biomamba.cli import main; sys.exit(main())", "ask", str(newborn), "--question", "Did most recover?", "--context"]
    done = subprocess.run([*command, str(tmp_path / "text.txt")], capture_output=True, text=True)
    (newborn / "qa.json").unlink()
    assert done.returncode == 0 and done.stdout.split(",")[0] in YES_NO and "with probability 0." in done.stdout, done.stderr
    lost = subprocess.run([*command, str(tmp_path / "none.txt")], capture_output=True, text=True)
    assert lost.returncode == 1 and lost.stderr.strip().splitlines()[-1].endswith("does not exist; a text file is accepted")


def test_a_model_that_was_not_taught_says_so(newborn, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("Nine of ten patients recovered.")
    found = ask(str(newborn), question="Did most recover?", context=str(tmp_path / "text.txt"), maybe=True, max_tokens=64)
    assert set(found.probabilities) == set(YES_NO_MAYBE) and sum(found.probabilities.values()) == pytest.approx(1)
    assert "was not fine-tuned on questions here" in caplog.text
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in refusal(lambda: ask(str(newborn), question="Is it?", context=str(tmp_path / "empty.txt")))
    (tmp_path / "picture.txt").write_bytes(bytes(range(256)))
    assert "no text in UTF-8" in refusal(lambda: ask(str(newborn), question="Is it?", context=str(tmp_path / "picture.txt")))
    assert "max_tokens=0" in refusal(lambda: ask(str(newborn), question="Is it?", context=str(tmp_path / "text.txt"), max_tokens=0))
