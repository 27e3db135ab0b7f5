"The built-in sample: seeds, variety, rates, numbers that agree, answers that follow from the text."

import hashlib
import json
import re
import subprocess
import sys

import pytest

from biomamba.abstracts import STUDY_GRAMMAR, study
from biomamba.conditions import DIAGNOSES
from biomamba.contamination import identities
from biomamba.documents import read_bioasq, read_documents, read_mimic, read_pubmedqa
from biomamba.encyclopedia import article
from biomamba.grammar import frame, frame_shares, near_duplicates, seeded, sentences
from biomamba.lexicons import LEXICONS
from biomamba.runs import UserError
from biomamba.sample import sample_document, sample_documents, sample_notes, sample_questions, write_sample

SOURCES = ("pubmed", "c4", "wikipedia")


@pytest.fixture(scope="module")
def texts():
    found = {source: [d.text for d in sample_documents(source, 1000)] for source in SOURCES}
    return found | {"notes": [note["text"] for note in sample_notes(1000)]}


# one sample, whatever the process, the order and the neighbours

DIGEST = """
import hashlib
from biomamba.sample import sample_documents, sample_notes, sample_questions
texts = [d.text for s in ("pubmed", "c4", "wikipedia") for d in sample_documents(s, 20, seed=5)]
texts += [str(n) for n in sample_notes(20, seed=5)] + [str(q) for k in ("pubmedqa", "bioasq") for q in sample_questions(k, 20, seed=5)]
print(hashlib.sha256("\\n".join(texts).encode()).hexdigest())
"""


def test_same_seed_same_bytes_in_another_process():
    runs = [subprocess.run([sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True) for salt in ("1", "2")]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.strip()) == 64


@pytest.mark.parametrize("source", SOURCES)
def test_a_document_depends_on_source_seed_and_index_only(source):
    straight = list(sample_documents(source, 30, seed=3))
    assert straight[20:] == list(sample_documents(source, 10, seed=3, start=20))
    assert [sample_document(source, 3, i) for i in reversed(range(30))] == straight[::-1]
    assert len({d.id for d in straight}) == 30 and not {d.text for d in straight} & {d.text for d in sample_documents(source, 30, seed=4)}


@pytest.mark.parametrize("source", SOURCES)
def test_documents_are_streamed(source):
    first = next(sample_documents(source, 10**12, start=10**9))
    assert first.id == f"sample-{source}-0-1000000000"


# says that it is synthetic

def test_every_record_is_marked(tmp_path):
    assert all(d.meta["synthetic"] is True for source in SOURCES for d in sample_documents(source, 5))
    assert all(record["synthetic"] is True for kind in ("pubmedqa", "bioasq") for _, record in sample_questions(kind, 5))
    assert all("SYNTHETIC NOTE" in note["text"].splitlines()[1] for note in sample_notes(20))
    folder = write_sample(tmp_path, documents=2, questions=2, notes=2)
    assert "synthetic" in (folder / "README.md").read_text()
    assert all("ynthetic" in line for source in SOURCES for line in (folder / source / "sample.jsonl").read_text().splitlines())


# varied

@pytest.mark.parametrize("source", (*SOURCES, "notes"))
def test_no_frame_is_common(texts, source):
    share, frame = frame_shares(texts[source])[0]
    assert share < 0.02, frame


@pytest.mark.parametrize("source", (*SOURCES, "notes"))
def test_near_duplicates_are_rare(texts, source):
    assert near_duplicates(texts[source]) < 0.01


def test_the_measures_see_repetition():
    mad = [f"We gave metformin to {n} mice. It did rain in {n} towns." for n in range(50)]
    assert frame_shares(mad)[0][0] == 0.5 and near_duplicates([mad[0]] * 50) == 0.98


def test_frames_know_every_term():
    missed = [term for terms in LEXICONS.values() for term in terms if "<" not in frame(f"We saw {term} there.")]
    assert not missed and frame("Metformin was given to 12 mice.") == frame("Lithium was given to 9,000 mice.")


def test_lengths_are_realistic(texts):
    words = {source: sorted(len(text.split()) for text in some) for source, some in texts.items()}
    assert 200 <= words["pubmed"][500] <= 300 and words["pubmed"][50] >= 100 and words["pubmed"][-1] <= 450
    assert words["c4"][10] >= 45 and words["c4"][-1] <= 1100 and words["c4"][900] - words["c4"][100] > 400
    assert words["wikipedia"][500] > 2 * words["c4"][500] and words["wikipedia"][-10] > 3000


def test_domains_differ_and_share_english(texts):
    vocabulary = {source: {word for text in texts[source][:300] for word in re.findall(r"[a-z]+", text.lower())} for source in SOURCES}
    common = set.intersection(*vocabulary.values())
    assert len(common) > 150 and {"the", "of", "was", "in"} <= common
    for source in SOURCES:
        others = set().union(*(vocabulary[other] for other in SOURCES if other != source))
        assert len(vocabulary[source] - others) > 300


@pytest.mark.parametrize("source", (*SOURCES, "notes"))
def test_no_grammar_marks_are_left(texts, source):
    for text in texts[source]:
        assert not re.search(r"[{}|^~]| [,;.](?= )|\.\.|(?<!^)  +(?! )(?=[a-z])|\ba [aei][a-z]{3}|\ban [bcdfgjk][a-z]", text), text


# numbers agree within a document

def test_arms_sum_and_percentages_follow():
    for i in range(300):
        kind = ("trial", "cohort", "cases", "genes", "accuracy", "pooled")[i % 6]
        facts = study(seeded("numbers", i), kind, ("yes", "no", "maybe")[i % 3])["facts"]
        n, n1, n2, e1, e2 = (int(facts[name].replace(",", "")) for name in ("n", "n1", "n2", "e1", "e2"))
        assert n == n1 + n2 and facts["p1"] == f"{100 * e1 / n1:.1f}" and facts["p2"] == f"{100 * e2 / n2:.1f}"
        assert facts["percent_women"] == f"{100 * int(facts['n_women'].replace(',', '')) / n:.0f}"


def test_percentages_in_the_text_follow_from_the_counts(texts):
    found = 0
    for text in texts["pubmed"]:
        for count, total, percent in re.findall(r"([\d,]+) of ([\d,]+) [a-z]+ \((\d+\.\d)%\)", text):
            assert percent == f"{100 * int(count.replace(',', '')) / int(total.replace(',', '')):.1f}", text
            found += 1
    assert found > 100


def test_arms_in_the_text_sum_to_the_total(texts):
    found = 0
    for text in texts["pubmed"]:
        if match := re.search(r"assigned ([\d,]+) .*?\(n = ([\d,]+)\).*?\(n = ([\d,]+)\)", text):
            total, first, second = (int(part.replace(",", "")) for part in match.groups())
            assert total == first + second
            found += 1
    assert found > 10


# answers follow from the text

def decision(results):
    if p := re.search(r"\d\.\d\d\]?[;,] P ([<=>]) (0\.\d+)", results):
        return "yes" if float(p[2]) < 0.05 else "maybe" if float(p[2]) < 0.2 else "no"
    sensitivity, specificity = (float(re.search(name + r".*?(\d+\.\d)%", results)[1]) for name in ("sensitivity", "specificity"))
    return "yes" if min(sensitivity, specificity) > 80 else "maybe" if specificity > 80 else "no"


def test_pubmedqa_records():
    records = dict(sample_questions("pubmedqa", 500, seed=2))
    counts = {answer: sum(r["final_decision"] == answer for r in records.values()) for answer in ("yes", "no", "maybe")}
    assert len(records) == 500 and counts["yes"] > 150 and counts["no"] > 100 and counts["maybe"] > 40
    for record in records.values():
        assert record["QUESTION"].endswith("?") and len(record["CONTEXTS"]) == len(record["LABELS"]) == 3 and all(record["CONTEXTS"])
        assert decision(record["CONTEXTS"][2]) == record["final_decision"]
        assert record["LONG_ANSWER"] not in " ".join(record["CONTEXTS"])


def test_bioasq_questions():
    questions = [question for _, question in sample_questions("bioasq", 300, seed=2)]
    assert {q["exact_answer"] for q in questions} == {"yes", "no"} and sum(q["exact_answer"] == "no" for q in questions) > 60
    for q in questions:
        assert q["type"] == "yesno" and q["body"].endswith("?") and isinstance(q["ideal_answer"], list)
        assert all(s["document"] in q["documents"] and len(s["text"]) == s["offsetInEndSection"] for s in q["snippets"])
        assert decision(" ".join(s["text"] for s in q["snippets"])) == q["exact_answer"]


def test_the_conclusion_agrees_with_the_answer():
    for answer, wrong in (("yes", r"no (?:benefit|evidence)|did not|not associated|inconclusive"), ("no", r"\b(?:significantly|superior)\b|inconclusive")):
        for kind in ("trial", "cohort", "cases", "genes"):
            texts = [STUDY_GRAMMAR.render(f"{kind}_{answer}", study(seeded("c", i), kind, answer)["facts"], seeded("c2", i)) for i in range(60)]
            assert not [text for text in texts if re.search(wrong, text)]


# notes

def test_notes_are_coherent():
    drugs = {}
    for note in sample_notes(300, seed=6):
        text = note["text"]
        part = dict(re.findall(r"^([A-Z][A-Za-z ]+):\n(.*?)(?=\n \n|\Z)", text, re.S | re.M))
        diagnosis = part["Discharge Diagnosis"].splitlines()[1]
        assert diagnosis in DIAGNOSES and diagnosis.lower() in part["Brief Hospital Course"].lower() and diagnosis in part["Discharge Instructions"]
        assert part["Chief Complaint"] in DIAGNOSES[diagnosis]["complaints"] and part["Chief Complaint"] in part["History of Present Illness"]
        lab = DIAGNOSES[diagnosis]["labs"][0].split()[0]
        assert all(f"{lab}-" in line for line in part["Pertinent Results"].splitlines() if "BLOOD" in line)
        before = [line.split(". ", 1)[1] for line in part["Medications on Admission"].splitlines()[1:]]
        after = [line.split(". ", 1)[1] for line in part["Discharge Medications"].splitlines()]
        assert before == drugs.get(note["subject_id"], before) and note["storetime"] > note["charttime"]
        assert all(re.search(r"\d", drug) and len(drug) < 70 for drug in after)
        drugs[note["subject_id"]] = after
    assert 120 < len(drugs) < 260


def test_note_columns_are_mimics():
    note = next(sample_notes(1))
    assert list(note) == ["note_id", "subject_id", "hadm_id", "note_type", "note_seq", "charttime", "storetime", "text"]
    assert note["note_id"] == f"{note['subject_id']}-DS-{note['note_seq']}" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", note["storetime"])


# articles

def test_long_articles_do_not_repeat_themselves():
    for i in range(60):
        said = sentences(article(1, i)["text"])
        assert len(set(said)) >= 0.97 * len(said)


# files and bad input

def test_written_files_read_back(tmp_path):
    folder = write_sample(tmp_path / "new" / "folder", documents=25, questions=10, notes=10, seed=8)
    for source in SOURCES:
        assert [(d.id, d.text) for d in read_documents(folder / source, source)] == [(d.id, d.text) for d in sample_documents(source, 25, seed=8)]
    assert json.loads((folder / "qa" / "pubmedqa.json").read_text()) == dict(sample_questions("pubmedqa", 10, seed=8))
    assert [(d.id, d.meta["question"], d.meta["answer"]) for d in read_pubmedqa(folder / "qa" / "pubmedqa.json")] == [(pmid, q["QUESTION"], q["final_decision"]) for pmid, q in sample_questions("pubmedqa", 10, seed=8)]
    assert [(d.id, d.meta["question"], d.meta["answer"]) for d in read_bioasq(folder / "qa" / "bioasq.json")] == [(id, q["body"], q["exact_answer"]) for id, q in sample_questions("bioasq", 10, seed=8)]
    assert [d.id for d in read_mimic(folder / "notes")] == [note["note_id"] for note in sample_notes(10, seed=8)]
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}
    write_sample(folder, documents=25, questions=10, notes=10, seed=8)
    assert before == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


def test_no_synthetic_question_has_the_number_of_a_real_abstract(tmp_path):
    folder = write_sample(tmp_path, documents=2, questions=200, notes=0)
    documents = [*read_pubmedqa(folder / "qa" / "pubmedqa.json"), *read_bioasq(folder / "qa" / "bioasq.json")]
    pmids = [name for d in documents for name in identities(d) if name.startswith("pmid:")]
    assert len(documents) == len(set(pmids)) == 400 and all(re.fullmatch(r"pmid:9\d{8}", name) for name in pmids)
    assert all(d.meta["synthetic"] is True for d in documents)


@pytest.mark.parametrize("call", [lambda: sample_documents("pubmd", 1), lambda: sample_documents("c4", -3), lambda: sample_documents("c4", 2.5), lambda: sample_documents("c4", 1, start=-1),
                                  lambda: sample_questions("medqa", 1), lambda: sample_questions("bioasq", -1), lambda: sample_notes(-1)])
def test_bad_input_is_refused_at_once(call):
    with pytest.raises(UserError):
        call()


def test_bad_counts_write_nothing(tmp_path):
    with pytest.raises(UserError, match="notes"):
        write_sample(tmp_path / "x", notes=-1)
    assert not (tmp_path / "x").exists()
