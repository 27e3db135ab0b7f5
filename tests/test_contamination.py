"""Contamination: what is in an evaluation set is found, by id and by words, and nothing else is; real files give real counts."""
import dataclasses, gzip, json, os, pickle, random, sys, time, unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from biomamba import contamination
from biomamba.contamination import BIOASQ_TYPES, ContaminationIndex, EvaluationSet, Hit, evaluation_sets, identities, whole_text, words_of
from biomamba.documents import read_bioasq, read_documents, read_pubmedqa
from biomamba.duplicates import shingles
from biomamba.language import comparable, normalize
from biomamba.records import Document
from biomamba.runs import UserError

DATA = Path(os.environ.get("BIOMAMBA_DATA", ""))
real = pytest.mark.skipif("BIOMAMBA_DATA" not in os.environ, reason="BIOMAMBA_DATA does not name a folder of real files")


def oracle(evaluation, document, n):
    "evaluation id → different n-grams shared, by sets of tuples."
    def grams(words): return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
    shared = {e.id: len(grams(words_of(whole_text(e))) & grams(words_of(document.text))) for e in evaluation}
    return {id: count for id, count in shared.items() if count}


few_words = st.lists(st.sampled_from("a b c D".split()), min_size=1, max_size=12).map(" ".join)


@pytest.mark.parametrize("base", [contamination.BASE, np.uint64(1), np.uint64(0)], ids=["hash", "sums for hashes", "last words for hashes"])
def test_n_grams_are_those_of_the_oracle_whatever_collides(monkeypatch, base):
    monkeypatch.setattr(contamination, "BASE", base)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.lists(few_words, min_size=1, max_size=4), few_words, st.integers(1, 4))
    @example(["a b c"], "c b a", 3)
    @example(["a b c a b c a b c"], "a b c a b c", 3)
    @example(["a b c"], "a x c", 3)
    def check(texts, text, n):
        evaluation = [Document(f"e{i}", t, "qa") for i, t in enumerate(texts)]
        hits = ContaminationIndex([EvaluationSet("s", evaluation)], n).find(Document("d", text, "c4"))
        assert {hit.evaluation_id: hit.shared for hit in hits if hit.how == f"{n}-gram"} == oracle(evaluation, Document("d", text, "c4"), n)
        short = {e.id for e in evaluation if len(words_of(e.text)) < n and words_of(e.text) == words_of(text)}
        assert {hit.evaluation_id for hit in hits if hit.how == "whole text"} == short
        assert len(hits) == len(set(hits)) and not [hit for hit in hits if hit.how == "id"]
    check()


def test_a_word_without_end_costs_no_more_than_others():
    index = ContaminationIndex([EvaluationSet("s", [Document("e", "no " * 20_000, "qa")])])
    began = time.process_time()
    assert [hit.shared for hit in index.find(Document("d", "no " * 20_000, "c4"))] == [1]
    assert time.process_time() - began < 10      # each place beside each other one would take an hour


def test_the_order_of_hits_is_that_of_the_sets():
    text = "one two three four"
    sets = [EvaluationSet(name, [Document(id, text, "pubmedqa") for id in ids]) for name, ids in (("z", "21"), ("a", "13"))]
    hits = ContaminationIndex(sets, 3).find(Document("1", text, "pubmed"))
    assert hits == [Hit("z", "2", "1", "3-gram", 2), Hit("z", "1", "1", "id", 0), Hit("z", "1", "1", "3-gram", 2), Hit("a", "1", "1", "id", 0), Hit("a", "1", "1", "3-gram", 2), Hit("a", "3", "1", "3-gram", 2)]


def test_a_planted_text_is_found_in_any_dress():
    rng = random.Random(0)
    word = lambda: "".join(rng.choices("abcdefghij", k=7))
    passage, clean = [word() for _ in range(13)], [word() for _ in range(300)]
    index = ContaminationIndex([EvaluationSet("qa", [Document("q", " ".join(passage), "notes", {"question": "Is it?"})])])
    dresses = [" ".join(passage), "-".join(passage), "\n".join(passage).upper(), "METHODS: " + "; ".join(passage) + ".", "“" + "” “".join(passage) + "”"]
    for dress in dresses:
        for at in (0, 150, 300):
            found = index.find(Document("d", " ".join(clean[:at]) + " " + dress + " " + " ".join(clean[at:]), "c4"))
            assert found == [Hit("qa", "q", "d", "13-gram", 1)]
    assert index.find(Document("d", " ".join(clean), "c4")) == []
    assert index.find(Document("d", " ".join(passage[:12] + clean + passage[1:]), "c4")) == [], "12 words in a row are not 13"


@pytest.mark.parametrize("character", list("\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u202a\u2060\u2062\u2066\ufe0f\ufeff\U000e0020"), ids=lambda c: f"U+{ord(c):04X}")
def test_what_nobody_sees_hides_nothing(character):
    passage = "Patients with metastatic carcinoma receiving bevacizumab and oxaliplatin survived considerably longer than historical controls treated conventionally"
    index = ContaminationIndex([EvaluationSet("qa", [Document("q", passage, "notes")])])
    hidden = " ".join(word[:3] + character + word[3:] for word in passage.split())
    for text in (hidden, normalize(hidden), hidden.upper()):
        assert index.find(Document("d", text, "c4")) == index.find(Document("d", passage, "c4")) != []
        assert np.array_equal(shingles(text), shingles(passage))


def test_every_format_character_is_invisible():
    assert not [hex(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Cf" and comparable(f"a{chr(i)}b") != "ab"]


def test_case_is_folded():
    index = ContaminationIndex([EvaluationSet("qa", [Document("q", "straße Ménière word " * 6, "notes")])])
    assert index.find(Document("d", ("straße Ménière word " * 6).upper(), "c4"))


def test_a_pmid_is_the_number_in_it():
    qa = Document("0012", "text", "pubmedqa")
    for id in ("12", "PMID:12", "pmid12", "PMID 12", "12.0", " 12\n"): assert identities(Document(id, "x", "pubmed")) == identities(qa), id
    for id in ("12.5", "12v1", "PMC12", "12 13"): assert identities(Document(id, "x", "pubmed")) != identities(qa), id


def test_the_question_and_the_conclusion_count_as_text():
    long = [" ".join(f"{name}{i}" for i in range(14)) for name in "qtci"]
    asked = Document("5", long[1], "bioasq", {"question": long[0], "conclusion": long[2], "ideal_answers": [long[3], None]})
    index = ContaminationIndex([EvaluationSet("s", [asked])])
    assert all(index.find(Document("d", text, "c4")) for text in long) and not index.find(Document("d", "other " * 20, "c4"))


def test_an_id_counts_only_with_its_source():
    qa = Document("0012", "text", "pubmedqa")
    assert identities(qa) == identities(Document("12", "x", "PubMed")) == identities(Document("12", "x", "my-medline")) == {"pmid:12"}
    index = ContaminationIndex([EvaluationSet("s", [qa, Document("w", "text", "wikipedia", {"pmids": ["7"]})])])
    named = [("12", "pubmed", True), ("12", "wikipedia", False), ("w", "wikipedia", True), ("w", "c4", False), ("7", "pubmed", True), ("7", "c4", False)]
    for id, source, found in named: assert bool(index.find(Document(id, "unrelated", source))) is found, (id, source)


def test_the_hash_names_what_is_compared():
    documents = [Document(str(i), f"text {i}", "pubmedqa", {"question": "Why?"}) for i in range(5)]
    first = EvaluationSet("a", documents).sha256
    assert EvaluationSet("b", documents[::-1]).sha256 == first == EvaluationSet("a", list(documents)).sha256
    changes = [{"text": "text 0."}, {"id": "9"}, {"meta": {"question": "How?"}}, {"source": "bioasq"}, {"meta": {"question": "Why?", "pmids": ["3"]}}]
    others = {EvaluationSet("a", [dataclasses.replace(documents[0], **change), *documents[1:]]).sha256 for change in changes}
    assert len(others | {first}) == len(changes) + 1
    assert dataclasses.replace(documents[0], meta={"question": "Why?", "year": 1999}) != documents[0]
    assert EvaluationSet("a", [dataclasses.replace(documents[0], meta={"question": "Why?", "year": 1999}), *documents[1:]]).sha256 == first


def test_an_index_survives_a_process_and_describes_its_sets():
    index = ContaminationIndex([EvaluationSet("s", [Document("1", "a b c d", "qa")])], n=3)
    again, document = pickle.loads(pickle.dumps(index)), Document("d", "b c d", "c4")
    assert again.find(document) == index.find(document) == [Hit("s", "1", "d", "3-gram", 1)]
    assert again.description() == {"s": {"sha256": index.sets["s"].sha256, "documents": 1}}
    assert ContaminationIndex([]).find(document) == [] and ContaminationIndex([]).description() == {}


@pytest.mark.parametrize("make, said", [
    (lambda: EvaluationSet("empty", []), "'empty' has no document"),
    (lambda: ContaminationIndex([], n=0), "n=0"),
    (lambda: ContaminationIndex([EvaluationSet("s", [Document("1", "a", "x")])] * 2), "of one name: s, s"),
])
def test_mistakes_are_one_sentence(make, said):
    with pytest.raises(UserError, match=said): make()


# Files

def test_folders_and_files_are_recognised_by_what_they_hold(tmp_path):
    qa = {"21": {"QUESTION": "Is it?", "CONTEXTS": ["One."], "final_decision": "yes"}}
    asked = [{"id": f"q{kind}", "type": kind, "body": "Is it?", "exact_answer": "yes", "snippets": [{"text": "S."}], "documents": ["http://e.org/pubmed/99"]} for kind in BIOASQ_TYPES]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(qa).encode()))
    (tmp_path / "b.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "answers.json").write_text('{"21": "yes"}')
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text('{"text": "x"}')
    (tmp_path / "c").mkdir(); (tmp_path / "c/test.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n')
    (tmp_path / "d.v2.jsonl").write_text('{"id": 1, "text": "one"}\n')
    sets = {s.name: s for s in evaluation_sets(tmp_path)}
    assert {name: len(s.documents) for name, s in sets.items()} == {"a": 1, "b": 4, "c": 2, "d.v2": 1}
    assert sets["c"].documents[0].source == "c" and sets["d.v2"].documents[0].source == tmp_path.name
    assert {d.meta["type"] for d in sets["b"].documents} == set(BIOASQ_TYPES)
    [alone] = evaluation_sets(tmp_path / "a.json.gz")
    assert alone.sha256 == sets["a"].sha256 == EvaluationSet("x", list(read_pubmedqa(tmp_path / "a.json.gz"))).sha256


@pytest.mark.parametrize("name, content, said", [
    (None, None, "does not exist"), ("README.md", "x", "holds no evaluation set"), ("answers.json", '{"1": "yes"}', "holds no evaluation set"),
    ("a.json", '{"questions": [', "a.json is of another format"), ("a.json", '{"1": {"QUESTION": "Is', "a.json is of another format"), ("a.json", '{"1": {}}', "none of its 1 records"),
])
def test_what_is_no_evaluation_set_is_one_sentence(tmp_path, name, content, said):
    folder = tmp_path / "sets"
    if name: folder.mkdir(); (folder / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught: evaluation_sets(folder)
    assert "\n" not in str(caught.value)


# Real files: counts alone

@pytest.fixture(scope="module")
def index():
    return ContaminationIndex(evaluation_sets(DATA / "qa"))


@real
def test_real_sets(index):
    assert {name: about["documents"] for name, about in index.description().items()} == {"12B1_golden": 85, "12B2_golden": 85, "ori_pqal": 1000}
    assert len(index.text) == 517_826 and len(set(index.hashes.tolist())) == 480_290
    grams = Counter((gram, owner) for gram, owner in zip(index.hashes.tolist(), index.owners.tolist()))
    assert max(Counter(gram for gram, _ in grams).values()) == 2, "the room says that no 13-gram stands in more than two evaluation documents"
    assert sum(name.startswith("pmid:") for name in index.by_identity) == 4_180 and not index.by_whole


@real
@pytest.mark.parametrize("path, source, count, found", [
    ("pubmed/abstracts.jsonl", "pubmed", 3000, {("12B1_golden", "id"): 1}), ("pubmed/abstracts.jsonl", "other", 3000, {}),
    ("general/c4.jsonl", "c4", 800, {}), ("general/wikipedia.jsonl", "wikipedia", 50, {}),
])
def test_real_contamination(index, path, source, count, found):
    documents = list(read_documents(DATA / path, source))
    hits = [hit for d in documents for hit in index.find(d)]
    assert len(documents) == count and Counter((hit.set_name, hit.how) for hit in hits) == found
    if found: assert [(hit.document_id, hit.evaluation_id) for hit in hits] == [("10732816", "64467f8657b1c7a31500006d")]


@real
def test_real_questions_are_found_when_they_are_planted(index):
    abstracts = list(read_documents(DATA / "pubmed/abstracts.jsonl", "pubmed"))[:200]
    planted = list(read_pubmedqa(DATA / "qa/ori_pqal.json"))[::5]
    for document, asked in zip(abstracts, planted):
        context = asked.text.split("\n")[0]
        hidden = dataclasses.replace(document, text=f"{document.text}\n{context.upper()}")
        hits = index.find(hidden)
        assert ("ori_pqal", asked.id, "13-gram") in {(hit.set_name, hit.evaluation_id, hit.how) for hit in hits} or len(words_of(context)) < 13
    for asked in read_bioasq(DATA / "qa/12B1_golden.json"):
        for pmid in asked.meta["pmids"]: assert asked.id in {hit.evaluation_id for hit in index.find(Document(pmid, "x", "pubmed"))}


@real
def test_batches_of_bioasq_share_articles(index):
    pairs = {(hit.evaluation_id, d.id) for d in index.sets["12B1_golden"].documents for hit in index.find(d) if hit.set_name == "12B2_golden"}
    assert len(pairs) == 2


@real
def test_the_index_is_24_bytes_a_word(index):
    assert sum(a.nbytes for a in (index.text, index.hashes, index.places, index.owners)) <= 24 * len(index.text)
