"Corpora on real text, at size, and after meddling."
import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from biomamba.building import Report, build, tokenizer_at
from biomamba.checkpoints import load_tokenizer
from biomamba.collection import Collection, build_collection, open_collection
from biomamba.contamination import EvaluationSet, evaluation_sets
from biomamba.corpus import MIXTURES, Corpus, Mixture
from biomamba.duplicates import LEAST, shingles
from biomamba.records import Document
from biomamba.runs import UserError, recipe
from biomamba.sample import sample_documents
from biomamba.sources import Source, folder_source, hub_source, sample_source
from biomamba.stages import Work
from biomamba.steps import PARTS, Steps, place, train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ("validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer([d.text for d in sample_documents("pubmed", 50)], 600))


def listed(shard, scratch, report): return iter(shard)


def source(name: str, *shards: list[Document]) -> Source:
    "A source of documents that are at hand."
    from functools import partial
    content = [[(d.id, d.text) for d in shard] for shard in shards]
    return Source(name, {"content": hashlib.sha256(json.dumps(content).encode()).hexdigest()}, tuple(partial(listed, shard) for shard in shards))


def make(folder: Path, sources: dict[str, Source], tokenizer=None, steps=Steps(language=None), against=()) -> Collection:
    build_collection(Work(folder / "work", sources, steps, False), folder / "corpus", tokenizer, 600, against)
    return Collection(folder / "corpus")


# ---------------------------------------------------------------- what is held out is nowhere else

def leaks(collection: Collection, texts: dict[str, str]) -> list[tuple]:
    "Pairs of a held-out document and a training one that are the same by id, by text, or nearly: compared one by one, without signatures."
    sources = list(collection.manifest["sources"])
    rows = {part: [(s, i) for s in sources for i in collection.documents(part, s).ids] for part in ("train", *HELD_OUT)}
    sets = {row: set(shingles(texts[row]).tolist()) for part in rows for row in rows[part]}
    owners = {}
    for row in rows["train"]:
        for shingle in sets[row]: owners.setdefault(shingle, []).append(row)
    found = []
    for row in (*rows["validation"], *rows["test"]):
        for other in {other for shingle in sets[row] for other in owners.get(shingle, ())}:
            similarity = len(sets[row] & sets[other]) / len(sets[row] | sets[other])
            if row == other or texts[row] == texts[other] or similarity > LEAST + 0.1: found.append((row, other, round(similarity, 2)))
    return found


def test_held_out_documents_are_absent_from_training_on_real_text(data, tmp_path, tokenizer):
    from biomamba.documents import read_documents
    from biomamba.language import normalize
    real = {"pubmed": list(read_documents(data / "pubmed" / "abstracts.jsonl", "pubmed"))[:1_200], "c4": list(read_documents(data / "general" / "c4.jsonl", "c4"))[:300]}
    clean = make(tmp_path / "clean", {name: source(name, documents) for name, documents in real.items()}, tokenizer)
    texts = {(name, d.id): normalize(d.text) for name, documents in real.items() for d in documents}
    assert leaks(clean, texts) == []

    held = {(name, id) for name in real for part in HELD_OUT for id in clean.documents(part, name).ids}
    originals = [d for d in real["pubmed"] if ("pubmed", d.id) in held and len(d.text.split()) > 200][:60]
    copies = [Document(f"copy {d.id}", d.text, "c4") for d in originals[:20]]
    edited = [Document(f"edited {d.id}", d.text.replace(" the ", " a ", 1) + " More.", "c4") for d in originals[20:40]]
    again = [Document(d.id, d.text + " Again.", "pubmed") for d in originals[40:]]
    planted = {"pubmed": real["pubmed"] + again, "c4": real["c4"] + copies + edited}
    texts |= {("c4", d.id): normalize(d.text) for d in copies + edited}
    kept = make(tmp_path / "planted", {name: source(name, documents) for name, documents in planted.items()}, tokenizer)
    assert leaks(kept, texts) == []
    everything = {id for name in planted for part in ("train", *HELD_OUT) for id in kept.documents(part, name).ids}
    assert not everything & {d.id for d in copies + edited}, "a copy of a document stayed"

    without = make(tmp_path / "without", {name: source(name, documents) for name, documents in planted.items()}, tokenizer, Steps(language=None, jaccard=None))
    assert len(leaks(without, texts)) >= 10, "this check finds no leak even where near copies are left in"


def test_what_stays_of_copies_is_the_first_in_order(tmp_path, tokenizer):
    first, second = list(sample_documents("pubmed", 60)), list(sample_documents("c4", 60))
    copies = [dataclasses.replace(d, id=f"copy {d.id}", source="c4") for d in first[:20]]
    made = make(tmp_path, {"c4": source("c4", copies + second), "pubmed": source("pubmed", first)}, tokenizer)
    assert {id for part in PARTS[1:] for id in made.documents(part, "pubmed").ids} == {d.id for d in first}
    assert {row["id"]: row["like"] for row in made.removed("c4").to_pylist()} == {c.id: f"pubmed {d.id}" for c, d in zip(copies, first)}


def test_a_near_copy_goes_for_a_document_that_stays(tmp_path, tokenizer):
    "In a chain of edits half went for being like a document that was gone itself, some without a shingle in common with anything that stayed."
    stream = [f"word{i}" for i in np.random.default_rng(0).integers(0, 20_000, 1_000)]
    chain = [Document(f"chain {i}", " ".join(stream[16 * i : 16 * i + 300]), "c4") for i in range(40)]
    others = [Document(f"other {i}", " ".join(f"{i}x{k}" for k in range(60)), "c4") for i in range(30)]
    whole, cut = (make(tmp_path / name, {"c4": source("c4", *shards)}, tokenizer) for name, shards in (("whole", [chain + others]), ("cut", [chain[:7], chain[7:] + others])))
    gone = {row["id"]: row["like"].removeprefix("c4 ") for row in whole.removed("c4").to_pylist()}
    assert 10 < len(gone) < 30 and not set(gone.values()) & set(gone)
    sets = {d.id: set(shingles(d.text).tolist()) for d in chain}
    for id, like in gone.items(): assert len(sets[id] & sets[like]) / len(sets[id] | sets[like]) > 0.7
    assert whole.removed("c4").to_pylist() == cut.removed("c4").to_pylist()


def test_names_with_blanks_and_tabs_are_told_apart(tmp_path, tokenizer):
    pages = list(sample_documents("pubmed", 40))
    named = [Document(d.id, d.text, "my notes") for d in pages] + [Document("a copy", pages[3].text, "my notes")]
    exam = EvaluationSet("exam", [Document("q\t1\nx", pages[7].text, "exam")])
    made = make(tmp_path, {"my notes": source("my notes", named)}, tokenizer, against=[exam])
    removed = {row["id"]: (row["step"], row["like"]) for row in made.removed("my notes").to_pylist()}
    assert removed["a copy"] == ("exact duplicates", f"my notes {pages[3].id}") and removed[pages[7].id] == ("decontamination", "exam\tq 1 x\t13-gram")
    report = Report(Corpus(made, recipe("tiny", mixture={"my notes": 1.0})))
    assert ("exam", "q 1 x", "13-gram", f"my notes {pages[7].id}") in report.hits and f"| exam | 1 | {len(removed) - 1} | 0 |" in report.contamination_table


def test_documents_stand_in_the_order_in_which_they_were_read(tmp_path, tokenizer):
    "Ids, tokens and lengths, over several shards and batches; of the held-out parts in the order of their places."
    documents = list(sample_documents("pubmed", 1_300))
    made = make(tmp_path, {"pubmed": source("pubmed", documents[:1_100], documents[1_100:])}, tokenizer)
    tables = {part: made.documents(part, "pubmed") for part in ("train", *HELD_OUT)}
    read = {d.id: number for number, d in enumerate(documents)}
    order = [read[id] for id in tables["train"].ids]
    assert order == sorted(order) and len(order) == 1_040
    for part in HELD_OUT: assert [place("pubmed", id) for id in tables[part].ids] == sorted(place("pubmed", id) for id in tables[part].ids)
    for table in tables.values():
        for row in range(0, len(table), 97):
            assert table[row].tolist() == tokenizer.backend_tokenizer.encode(documents[read[table.ids[row]]].text, add_special_tokens=False).ids
            assert table.bytes[row] == len(documents[read[table.ids[row]]].text.encode())


def test_a_longer_reading_of_a_public_dataset_is_tested_on_the_same_documents(tmp_path, tokenizer, monkeypatch):
    "What is read more goes to training; without the rule, documents would move between training and the held-out sets."
    monkeypatch.setattr("biomamba.sources.LEAST_READ", 300)
    monkeypatch.setattr("biomamba.sources.HELD_OUT_AMONG", 250)
    monkeypatch.setattr("biomamba.steps.held_out_size", lambda documents: (20, False))
    monkeypatch.setattr("biomamba.sources.read_hub", lambda name, **options: sample_documents(name, 10**9))
    def held(n, folder, among):
        hub = dataclasses.replace(hub_source("pubmed", n, held_out=10), held_out_among=among)
        made = make(tmp_path / folder, {"pubmed": hub}, tokenizer)
        assert len(made.documents("train", "pubmed")) == (260 if n == 100 else 421)
        return [made.documents(part, "pubmed").ids for part in HELD_OUT]
    assert hub_source("pubmed", 100).held_out_among == 250
    assert held(100, "short", 250) == held(400, "long", 250) != held(400, "anywhere", None)


def test_a_script_without_blanks_has_words(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    pages = [Document(f"{name} {i}", "".join(map(chr, rng.integers(first, last, 240))), "c4") for name, first, last in (("Han", 0x4e00, 0x5e00), ("Thai", 0x0e01, 0x0e2f), ("Khmer", 0x1780, 0x17b3)) for i in range(10)]
    made = make(tmp_path, {"c4": source("c4", pages + [Document("short", "四十名患者", "c4"), Document("few", "only a few words", "c4")])}, tokenizer, Steps(language=None, jaccard=None))
    assert {row["id"] for row in made.removed("c4").to_pylist()} == {"short", "few"}


def test_what_a_tokenizers_file_cuts_or_pads_is_not_cut_or_padded(tmp_path, tokenizer):
    "A corpus of documents of 16 tokens was built without a word, and one in which padding stood as text."
    from tokenizers import Tokenizer
    documents, made = {"c4": source("c4", list(sample_documents("c4", 40)))}, {}
    tokenizer.backend_tokenizer.save(str(tmp_path / "plain.json"))
    for name in ("plain", "cut", "padded"):
        own = Tokenizer.from_file(str(tmp_path / "plain.json"))
        if name == "cut": own.enable_truncation(16)
        if name == "padded": own.enable_padding(pad_id=1, pad_token="<|padding|>")
        own.save(str(tmp_path / f"{name}.json"))
        stated = wrap_tokenizer(own)
        made[name] = [make(tmp_path / name / str(k), documents, t) for k, t in enumerate((stated, tokenizer_at(tmp_path / f"{name}.json"), load_tokenizer(tmp_path / f"{name}.json")))]
    assert len({collection.fingerprint for some in made.values() for collection in some}) == 1


@pytest.mark.parametrize("content, said", [
    ("{", "is not JSON"), ("[]", "has no model"), ("{}", "has no model"), ("late", r"at id 2 and <\|padding\|> at 3; they must be 0 and 1"), ("none", "at id None")])
def test_a_tokenizer_that_no_model_here_can_have_is_refused_before_the_build(content, said, tmp_path):
    from tokenizers import Tokenizer, models
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if content == "late": tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str() if content in ("late", "none") else content)
    with pytest.raises(UserError, match=said): build("sample", tmp_path / "corpus", tokenizer=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_title_is_no_document(tmp_path, tokenizer):
    "However long it is, in JSON lines and in XML; and the report counts it as what it is."
    title, abstract = "A title of more than twenty words " * 4, "An abstract of more than twenty words " * 4
    (tmp_path / "pubmed").mkdir()
    records = [{"pmid": str(i), "title": f"{title} {i}", "abstract": None if i < 10 else f"{abstract} {' '.join(str(i * k) for k in range(30))}"} for i in range(100)]
    (tmp_path / "pubmed" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    article = "<PubmedArticle><MedlineCitation><PMID>{0}</PMID><Article><ArticleTitle>{1} {0}</ArticleTitle>{2}</Article></MedlineCitation></PubmedArticle>"
    xml = "".join(article.format(1_000 + i, title, "" if i < 3 else f"<Abstract><AbstractText>{abstract} {' '.join(str(i * k) for k in range(3, 33))}</AbstractText></Abstract>") for i in range(6))
    (tmp_path / "pubmed" / "b.xml").write_text(f"<PubmedArticleSet>{xml}</PubmedArticleSet>")
    made = make(tmp_path, {"pubmed": folder_source(tmp_path, "pubmed")}, tokenizer, Steps(language=None, jaccard=None))
    read = made.manifest["sources"]["pubmed"]["steps"][0]
    assert (read["received"], read["passed"], read["reasons"]) == (106, 93, {"a title without abstract": 13})
    assert "titles" in made.manifest["sources"]["pubmed"]["origin"]


# ---------------------------------------------------------------- the name of a corpus

def test_everything_that_decides_a_corpus_is_in_its_name(tmp_path, tokenizer):
    small = recipe("tiny", vocabulary=600, mixture={"pubmed": 1.0})
    documents = list(sample_documents("pubmed", 60))
    changed = [dataclasses.replace(documents[0], text=documents[0].text + "x"), *documents[1:]]
    other = wrap_tokenizer(train_tokenizer([d.text for d in documents], 600))
    sets = [EvaluationSet("exam", [Document("1", " ".join(f"word{i}" for i in range(30)), "exam")])]
    variants = {
        "plain": {}, "byte": {"documents": changed}, "steps": {"steps": Steps(min_words=21)}, "near": {"steps": Steps(jaccard=0.9)}, "language": {"steps": Steps(language=None)},
        "against": {"against": sets}, "tokenizer": {"tokenizer": other}, "order": {"documents": documents[::-1]},
        "seed": {"recipe": dataclasses.replace(small, seed=1)}, "mixture": {"mixture": Mixture({"pubmed": 1.0}, "tokens")}, "cut": {"recipe": dataclasses.replace(small, max_tokens=64)}}

    def name(documents=documents, recipe=small, tokenizer=tokenizer, mixture=None, **options):
        return Corpus(open_collection({"pubmed": source("pubmed", documents)}, recipe, tokenizer, **options), recipe, mixture=mixture).fingerprint
    names = {variant: name(**options) for variant, options in variants.items()}
    assert len(set(names.values())) == len(variants), names
    assert name() == names["plain"]


@pytest.mark.parametrize("meddle, message", [
    (lambda folder: (folder / "train/pubmed/data-00000-of-00001.arrow").unlink(), "is missing"),
    (lambda folder: (folder / "train/pubmed/state.json").write_text("{}"), "bytes and not"),
    (lambda folder: (folder / "tokenizer/tokenizer.json").write_bytes((folder / "tokenizer/tokenizer.json").read_bytes().replace(b"a", b"b")), "has another content"),
    (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    (lambda folder: (folder / "manifest.json").write_text('{"format": 1}'), "format 1")])
def test_a_corpus_that_is_not_its_manifests_is_refused(meddle, message, tmp_path, tokenizer):
    made = make(tmp_path, {"pubmed": sample_source("pubmed", 30)}, tokenizer)
    meddle(made.folder)
    with pytest.raises(UserError, match=message):
        Collection(made.folder)


def test_a_bit_of_a_manifest_is_found(tmp_path, tokenizer):
    made = make(tmp_path, {"pubmed": sample_source("pubmed", 30)}, tokenizer)
    path, left = made.folder / "manifest.json", made.folder / "manifest.json.whole"
    content, said = path.read_bytes(), {key: value for key, value in made.manifest.items() if key not in ("key", "code")}
    path.rename(left)
    for at in range(0, len(content), 37):
        for bit in (1, 4, 7):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with contextlib.suppress(UserError):
                found = Collection(made.folder)
                found.verify()
                assert {key: value for key, value in found.manifest.items() if key not in ("key", "code")} == said


def test_a_change_that_hides_its_time_is_found_by_verify(tmp_path, tokenizer):
    made = make(tmp_path, {"pubmed": sample_source("pubmed", 30)}, tokenizer)
    file = made.folder / "test/pubmed/data-00000-of-00001.arrow"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Collection(made.folder)
    with pytest.raises(UserError, match="test/pubmed/data-00000-of-00001.arrow has another content"):
        Collection(made.folder).verify()


# ---------------------------------------------------------------- what stands beside a corpus, and what changes meanwhile

ask = dict(mixture={"c4": 1.0}, vocabulary=600)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts" / "c4"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in sample_documents("c4", 40)))
    return folder.parent


def killed(*_): raise KeyboardInterrupt


def test_a_build_leaves_its_neighbours_alone(texts, tmp_path):
    "Everything whose name went on after a dot was taken for a half-written folder: a backup, or another build that was running."
    neighbours = [tmp_path / name for name in (".q.backup", ".q.v2-0123456789abcdef", ".q.abcdefgh", ".q-notes", ".other-0123456789abcdef")]
    for folder in neighbours: folder.mkdir(); (folder / "kept").touch()
    build(texts, tmp_path / "q", **ask)
    assert all((folder / "kept").exists() for folder in neighbours)
    assert {p.name for p in tmp_path.iterdir()} - {".q.lock", "cache"} == {"texts", "q", *(folder.name for folder in neighbours)}


def test_the_texts_of_a_build_that_will_not_go_on_are_removed(texts, tmp_path, monkeypatch):
    "With other parameters its work folder has another name, and stood there for good."
    with monkeypatch.context() as patch:
        patch.setattr(Work, "tokenize", killed)
        with pytest.raises(KeyboardInterrupt): build(texts, tmp_path / "q", **ask, restricted={"c4": "our ward"}, tokenizer=None)
    assert list(tmp_path.glob(".q-*/texts/*.arrow"))
    build(texts, tmp_path / "q", **ask, language="any")
    assert not list(tmp_path.glob(".q-*"))


def test_what_was_half_put_together_goes_with_the_work(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("biomamba.collection.write_collection", killed)
        with pytest.raises(KeyboardInterrupt): build(texts, tmp_path / "q", **ask)
    [work] = tmp_path.glob(".q-*")
    (work / ".q.half").mkdir()
    build(texts, tmp_path / "q", **ask)
    assert not list(tmp_path.glob(".q-*"))


@pytest.mark.parametrize("kind", ["jsonl", "notes"])
def test_a_file_that_changes_while_it_is_read_is_refused(kind, texts, tmp_path, monkeypatch):
    "The corpus bore the name of the files as they had been."
    file = texts / "c4" / ("a.jsonl" if kind == "jsonl" else "discharge.csv")
    if kind == "notes":
        (texts / "c4" / "a.jsonl").unlink()
        file.write_text("note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n" + "".join(f"{i}-DS-1,{i},{i},DS,1,,,{'the and ' * 20}{i} {i + 1} {i * 7}\n" for i in range(40)))
    before, read = file.read_text(), Work.read
    def meanwhile(self):
        file.write_text(before + before.splitlines()[-1].replace("1", "2") + "\n")
        read(self)
    monkeypatch.setattr(Work, "read", meanwhile)
    with pytest.raises(UserError, match="changed while it was read"): build(texts, tmp_path / "q", **ask, tokenizer=None if kind == "jsonl" else saved(tmp_path))
    assert not (tmp_path / "q").exists() and not list(tmp_path.glob(".q-*"))


def saved(folder: Path) -> Path:
    train_tokenizer([d.text for d in sample_documents("c4", 20)], 400).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_notes_are_held_out_in_one_order_from_raw_files_and_from_a_corpus(tmp_path):
    "A patient's notes stand where the patient does; the built sets were ordered by the notes' own ids."
    from biomamba.heldout import test_texts as held_out_texts
    folder, rng = tmp_path / "texts" / "notes", np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = [f"{10_000 + p}-DS-{n},{10_000 + p},{p * 9 + n},DS,{n},,,the and {' '.join(f'w{w}' for w in rng.integers(0, 3_000, 40))}\n" for p in range(60) for n in range(1 + p % 4)]
    (folder / "discharge.csv").write_text("note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n" + "".join(rows))
    build(tmp_path / "texts", tmp_path / "q", mixture={"notes": 1.0}, tokenizer=saved(tmp_path))
    raw, built = (held_out_texts(str(place), ["notes"], documents=8)["notes"] for place in (tmp_path / "texts", tmp_path / "q"))
    assert raw == built and len(set(raw)) == 8


@pytest.mark.parametrize("asked, said", [
    ({"jaccard": float("nan")}, "jaccard=nan"), ({"jaccard": "0.9"}, "jaccard='0.9'"), ({"options": '{"nonsense": 1}'}, "options has 'nonsense'"), ({"options": {"workers": 2}}, "options has 'workers'"),
    ({"options": '{"tasks": 2}'}, "options has 'tasks'"), ({"destination": "texts/c4/a.jsonl/x"}, "would lie in the file"), ({"destination": "texts/c4/a.jsonl/x/y"}, "would lie in the file"),
    ({"mixture": {"../texts/c4": 1.0}}, "is no name of a source"), ({"mixture": {"..": 1.0}}, "is no name of a source"), ({"mixture": {"texts\\c4": 1.0}}, "is no name of a source")])
def test_what_cannot_be_built_is_one_sentence_before_anything_is_made(asked, said, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said): build(**dict(source=texts, destination="q") | ask | asked)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- mixtures

def test_the_named_mixtures_on_a_corpus(tmp_path, tokenizer):
    made = make(tmp_path, {name: sample_source(name, n) for name, n in (("pubmed", 600), ("c4", 300), ("wikipedia", 200))}, tokenizer)
    chosen = recipe("tiny", long_documents="truncate", max_tokens=1024)
    shares = {name: {s: about["share_of_documents" if mixture.by == "documents" else "share_of_tokens"] for s, about in Corpus(made, chosen, mixture=mixture).manifest["mixture"].items()}
              for name, mixture in MIXTURES.items()}
    for name, mixture in MIXTURES.items():
        assert shares[name] == pytest.approx(mixture.shares, abs=0.01)
    fewer = Mixture({"pubmed": 0.2, "c4": 0.2, "wikipedia": 0.6}, "documents", 500)
    with pytest.raises(ValueError, match=r"needs 300 documents of 'wikipedia' \(60.0% of 500\) and there are 160; at most 266 documents in all"):
        Corpus(made, chosen, mixture=fewer)
    twice = Corpus(made, chosen, mixture=dataclasses.replace(fewer, repeats={"wikipedia": 2}))
    rows = twice.index["row"][twice.index["source"] == twice.names.index("wikipedia")]
    assert len(rows) == 300 and np.bincount(rows).max() == 2 and set(rows) == set(range(160))
    again = Corpus(made, chosen, mixture=dataclasses.replace(fewer, repeats={"wikipedia": 2}))
    assert np.array_equal(twice.index, again.index) and np.array_equal(twice[7], again[7])


def test_documents_that_are_carried_count_whole(tmp_path, tokenizer):
    "Cut to max_tokens they filled another share of the tokens than was asked for."
    made = make(tmp_path, {name: sample_source(name, n) for name, n in (("pubmed", 300), ("wikipedia", 200))}, tokenizer)
    chosen = recipe("tiny", long_documents="carry", max_tokens=64, mixture={"pubmed": 0.5, "wikipedia": 0.5}, mixture_by="tokens")
    corpus = Corpus(made, chosen)
    trained = {s: sum(len(made.documents("train", s)[int(row)]) + 1 for row in corpus.index["row"][corpus.index["source"] == k]) for k, s in enumerate(corpus.names)}
    assert {s: int(n.sum()) for s, n in corpus.lengths.items()} == trained
    assert max(corpus.lengths["wikipedia"]) > 64 and trained["pubmed"] / sum(trained.values()) == pytest.approx(0.5, abs=0.02)


def test_similarities_that_the_bands_do_not_find_are_refused():
    for jaccard in (0.5, 0.79, 1.01):
        with pytest.raises(UserError, match="from 0.8"): Steps(jaccard=jaccard)


def test_the_order_in_which_a_mixture_is_written_means_nothing(tmp_path, tokenizer):
    made = make(tmp_path, {s: sample_source(s, 40) for s in ("pubmed", "c4", "wikipedia")}, tokenizer)
    written = ({"pubmed": 0.5, "c4": 0.3, "wikipedia": 0.2}, {"wikipedia": 0.2, "c4": 0.3, "pubmed": 0.5})
    one, other = (Corpus(made, recipe("tiny", mixture=mixture)) for mixture in written)
    assert one.fingerprint == other.fingerprint and len(one) == len(other) and one.counts == other.counts
    assert all(np.array_equal(one[i], other[i]) and one.label(i) == other.label(i) for i in range(len(one)))
    assert other.manifest["mixture"] == one.manifest["mixture"]


def test_repeats_are_numbers():
    for times in (float("nan"), float("inf"), "2", [2]):
        with pytest.raises(UserError, match="a number from 1"): Mixture({"pubmed": 1.0}, repeats={"pubmed": times})


def test_a_spoiled_choice_is_refused(tmp_path, tokenizer):
    made, chosen = make(tmp_path, {"pubmed": sample_source("pubmed", 30)}, tokenizer), recipe("tiny", mixture={"pubmed": 1.0})
    Corpus(made, chosen)
    [file] = (tmp_path / "cache" / "mixtures").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="another content"):
        Corpus(made, chosen)


# ---------------------------------------------------------------- size

OPEN = """
import re, sys
from biomamba.corpus import Collection, Corpus
from biomamba.runs import recipe
corpus = Corpus(Collection(sys.argv[1]), recipe("tiny", mixture={"pubmed": 1.0}, long_documents="truncate"))
tokens = sum(int(n.sum()) for n in corpus.lengths.values())
first, last = corpus[0], corpus[len(corpus) - 1]
print(len(corpus), tokens, int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process that was started by a larger one is read from /proc")
def test_a_million_documents_open_in_200_megabytes(tmp_path):
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    from benchmarks.corpora import bare_collection
    folder = bare_collection(tmp_path / "million")
    run = lambda: subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).stdout.split()
    run()                                                    # the choice of the sequences is made once
    documents, tokens, megabytes = map(float, run())
    assert (documents, tokens) == (1_000_000, 201_000_000)
    assert megabytes < 200, f"the process grew to {megabytes:.0f} MB"


def test_no_bar_and_no_word(tmp_path, tokenizer, capfd):
    make(tmp_path, {"pubmed": sample_source("pubmed", 30)}, tokenizer)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["duplicates", "pipeline", "sources", "steps", "storage", "stages", "collection", "corpus", "building"])
def test_the_rooms_import_nothing_heavy(module):
    code = f"import sys, biomamba.{module}; print(sorted({{'torch', 'transformers', 'datasets', 'datatrove', 'tokenizers', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).stdout.strip() == "[]"


# ---------------------------------------------------------------- the command's function, on real text

def test_build_on_real_text(data, tmp_path):
    made = build(data, tmp_path / "corpus", tokenizer=data / "tokenizer", against=data / "qa", mixture='{"pubmed": 0.8, "c4": 0.2}')
    manifest = made.manifest
    assert set(manifest["decontaminated_against"]) >= {"ori_pqal", "12B1_golden", "12B2_golden"}
    hits = Report(made).hits
    assert hits and {hit[0] for hit in hits} <= set(manifest["decontaminated_against"])
    pmids = {d.id for d in evaluation_sets(data / "qa" / "ori_pqal.json")[0].documents}
    tables = [made.collection.documents(part, "pubmed") for part in ("train", *HELD_OUT)]
    assert not pmids & {id for table in tables for id in table.ids}
    assert tables[0].table.schema.field("tokens").type.value_type == "uint16"
    for about in manifest["sources"].values():
        for before, after in zip(about["steps"][:-2], about["steps"][1:]): assert after["received"] == before["passed"]
        for count in about["steps"]: assert count["received"] - count["passed"] == sum(count["reasons"].values())
    page = (tmp_path / "corpus" / "README.md").read_text()
    assert "ori_pqal" in page and manifest["fingerprint"] in page
