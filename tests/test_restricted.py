"What is made from restricted notes is marked, closed, and holds no word of them."
import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import zstandard

from biomamba import documents
from biomamba.corpus import open_collection
from biomamba.guards import Hidden
from biomamba.recipe import recipe
from biomamba.records import ReadReport
from biomamba.runs import UserError, restricted
from biomamba.sample import sample_documents, sample_notes
from biomamba.sources import named_sources
from biomamba.steps import train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MARKER = "Zyxquarvel"  # planted in every note; no tokenizer, template or sample has it
SMALL = {"d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 400, "max_tokens": 128, "sequences_per_step": 4,
         "evaluations": 2, "validation_documents": 4, "base_steps": 4, "micro_batch_tokens": 512, "learning_rate": 1e-2}
MIXTURE = {"pubmed": 0.5, "c4": 0.1, "wikipedia": 0.1, "notes": 0.3}
COLUMNS = documents.NOTE_COLUMNS


def marked(row: dict) -> dict:
    "A note with the marker in its middle and in a sentence of its own at both ends."
    half = len(row["text"]) // 2
    return row | {"text": f"{MARKER} was seen.\n{row['text'][:half]} {MARKER} {row['text'][half:]}\n{MARKER} went home."}


def as_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def found_in(folder: Path, word: str = MARKER) -> list[str]:
    "The files of a folder whose bytes hold a word, in any of the spellings that a program would write."
    spelled = [word.encode(), word.encode("utf-16-le"), word.encode("utf-32-le"), word.lower().encode(), word[::-1].encode()]
    def content(path):
        data = path.read_bytes()
        return data + gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and any(s in content(p) for s in spelled)]


def mode(path: Path) -> str:
    return oct(path.stat().st_mode)[-3:]


def command(*words: str, cache: Path) -> subprocess.CompletedProcess:
    "The `biomamba` command in a process of its own."
    source = "import sys; from biomamba.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", source, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"BIOMAMBA_CACHE": str(cache)})


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    "A corpus folder: three open sources, and notes that hold the marker; copies and scraps among them, so that there is something to remove."
    folder = tmp_path_factory.mktemp("texts")
    for name, n in {"pubmed": 100, "c4": 40, "wikipedia": 30}.items():
        (folder / name).mkdir()
        (folder / name / "texts.jsonl").write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in sample_documents(name, n)))
    rows = [marked(row) for row in sample_notes(40)]
    rows += [rows[0] | {"note_id": "77770001-DS-1"}, rows[1] | {"note_id": "77770002-DS-1", "text": rows[1]["text"] + " Again."},
             rows[2] | {"note_id": "77770003-DS-1", "text": f"{MARKER} only."}]
    (folder / "notes").mkdir()
    (folder / "notes" / "discharge.csv.gz").write_bytes(gzip.compress(as_csv(rows).encode()))
    return folder


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "A folder with a finished run and its cache, and what the command said."
    place = tmp_path_factory.mktemp("made")
    done = command("cpt", "--corpus", str(texts), "--run-dir", str(place / "run"), "--steps", "4", "--mixture", json.dumps(MIXTURE),
                   "--overrides", json.dumps(SMALL), cache=place / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done


@pytest.mark.parametrize("columns", ["MIMIC's", "their own"])
def test_a_corpus_keeps_the_notes_of_a_patient_in_one_part(columns, tmp_path, monkeypatch):
    "By the hash of each note two thirds of the test notes were of patients who were trained on."
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes").mkdir()
    rows = list(sample_notes(300))
    if columns == "MIMIC's": (tmp_path / "notes" / "discharge.csv.gz").write_bytes(gzip.compress(as_csv(rows).encode()))
    else: (tmp_path / "notes" / "ward.jsonl").write_text("".join(json.dumps({"id": row["note_id"], "subject_id": row["subject_id"], "text": row["text"]}) + "\n" for row in rows))
    notes = named_sources(tmp_path, ["notes"])
    patient = {row["note_id"]: row["subject_id"] for row in rows}
    tokenizer = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("c4", 50)), 400))
    built = open_collection(notes, recipe("tiny", mixture={"notes": 1.0}), tokenizer=tokenizer)
    apart = {part: [patient[id] for id in built.documents(part, "notes").ids] for part in ("train", "validation", "test")}
    assert not set(apart["train"]) & set(apart["test"]) and not set(apart["train"]) & set(apart["validation"]) and not set(apart["test"]) & set(apart["validation"])
    assert all(len(apart[part]) >= 25 for part in ("validation", "test")) and len(set(apart["train"])) < len(apart["train"])


def test_the_notes_were_read_and_trained_on(made):
    manifest = json.loads((made[0] / "run" / "manifest.json").read_text())
    steps = {step["step"]: step for step in manifest["sources"]["notes"]["steps"]}
    assert steps["read"]["passed"] == 43 and steps["exact duplicates"]["reasons"] and steps["near duplicates"]["reasons"] and steps["long enough"]["reasons"]
    assert manifest["mixture"]["notes"]["tokens"] > 1000


def test_no_byte_of_a_run_and_its_cache_holds_the_marker(made):
    place, done = made
    assert found_in(place) == []
    assert MARKER not in done.stdout + done.stderr
    assert (place / "run" / "10_cpt.ipynb").stat().st_size > 10_000, "the executed notebook was searched"


def test_the_mark_goes_from_the_source_to_the_model(made):
    place, _ = made
    [collection] = (place / "cache" / "collections").glob("[!.]*/")
    [base] = (place / "cache" / "base").glob("[!.]*/")
    for folder in (collection, base, base / "model", place / "run", place / "run" / "model"):
        assert "MIMIC-IV-Note" in restricted(folder) and (folder / "RESTRICTED").is_file(), folder
        assert mode(folder) == "700", folder
    for file in ("run/manifest.json", "run/results.json", "run/model/config.json"):
        assert "Data Use Agreement" in json.loads((place / file).read_text())["restricted"]
    for card in (place / "run" / "model" / "README.md", base / "model" / "README.md"):
        assert "Data Use Agreement" in card.read_text() and "sensitive data" in card.read_text()


def test_the_mark_is_part_of_the_collection(made, tmp_path):
    import shutil

    from biomamba.collection import Collection
    [collection] = (made[0] / "cache" / "collections").glob("[!.]*/")
    shutil.copytree(collection, tmp_path / "copy")
    assert Collection(tmp_path / "copy").restricted
    (tmp_path / "copy" / "RESTRICTED").unlink()
    assert "MIMIC" in restricted(tmp_path / "copy"), "the manifest states it too"
    with pytest.raises(UserError, match="RESTRICTED is missing"):
        Collection(tmp_path / "copy")


def test_a_model_is_not_pushed_and_keeps_its_mark(made, tmp_path):
    from transformers import Mamba2ForCausalLM

    from biomamba.checkpoints import load_model, load_tokenizer, save_model
    from biomamba.conversion import convert
    folder = made[0] / "run" / "model"
    model, stock = load_model(folder), Mamba2ForCausalLM.from_pretrained(folder)
    for push in (lambda: model.push_to_hub("me/notes"), lambda: model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="me/notes")):
        with pytest.raises(UserError, match="not pushed to a hub"):
            push()
    assert not (tmp_path / "pushed").exists()
    with pytest.raises(UserError, match="writes nothing to a hub"):
        stock.push_to_hub("me/notes")
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "plain")
    save_model(model, tmp_path / "saved", load_tokenizer(folder))
    convert(tmp_path / "saved", tmp_path / "ssm", to="state-spaces")
    convert(tmp_path / "ssm", tmp_path / "back")
    for name in ("stock", "plain", "saved", "ssm", "back"):
        assert "MIMIC" in restricted(tmp_path / name), name
    for name in ("plain", "saved", "ssm", "back"):
        assert mode(tmp_path / name) == "700", name
    assert all("Data Use Agreement" in (tmp_path / name / "README.md").read_text() for name in ("saved", "ssm", "back"))


@pytest.mark.slow
def test_a_run_from_a_restricted_model_is_restricted_and_its_trackers_are_local(made, texts, tmp_path):
    place = made[0]
    words = ["cpt", "--model", str(place / "run" / "model"), "--corpus", str(texts), "--run-dir", str(tmp_path / "next"), "--steps", "2",
             "--mixture", json.dumps({"pubmed": 1.0})]
    refused = command(*words, "--overrides", json.dumps(SMALL | {"trackers": ["trackio"]}), cache=tmp_path / "cache")
    assert refused.returncode == 1 and "trackio can upload" in refused.stderr.splitlines()[-1]
    done = command(*words, "--overrides", json.dumps(SMALL), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    [collection] = (tmp_path / "cache" / "collections").glob("[!.]*/")
    assert restricted(collection) is None and mode(collection) != "700", "its corpus is open"
    for folder in (tmp_path / "next", tmp_path / "next" / "model"):
        assert "MIMIC" in restricted(folder) and mode(folder) == "700"


# ---------------------------------------------------------------- what is open stays as it was

def test_open_runs_know_nothing_of_the_mark(texts, tmp_path, monkeypatch):
    from biomamba.corpus import Corpus, open_collection
    from biomamba.runs import recipe
    from biomamba.sources import named_sources
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path))
    chosen = recipe("tiny", mixture={"pubmed": 0.8, "c4": 0.2}, **SMALL)
    sources = named_sources(texts, ["pubmed", "c4"])
    corpus = Corpus(open_collection(sources, chosen), chosen)
    assert all(set(source.origin) == {"files"} for source in sources.values())
    assert "restricted" not in json.dumps(corpus.manifest) and not list(tmp_path.rglob("RESTRICTED"))
    closed = Corpus(open_collection(named_sources(texts, ["pubmed", "c4"], {"c4": "ward 7"}), chosen), chosen)
    assert closed.fingerprint != corpus.fingerprint and closed.manifest["restricted"] == "ward 7"
    assert "restricted: ward 7" in str(closed) and "restricted" not in str(corpus)


def test_a_tokenizer_is_not_trained_on_restricted_texts_alone(texts, tmp_path):
    done = command("corpus", str(texts), str(tmp_path / "corpus"), "--mixture", '{"notes": 1.0}', cache=tmp_path / "cache")
    assert done.returncode == 1 and "would spell out their words" in done.stderr.splitlines()[-1]
    assert found_in(tmp_path) == [], "a build that ended leaves no text"


# ---------------------------------------------------------------- reports and lists

def test_a_built_corpus_shows_ids_and_no_words(texts, tmp_path):
    (tmp_path / "raw" / "ward").mkdir(parents=True)
    (tmp_path / "raw" / "pubmed").symlink_to(texts / "pubmed")
    titled = [{"title": f"{MARKER} of ward {i}", "text": row["text"]} for i, row in enumerate(map(marked, sample_notes(30)))]
    unique = " ".join(f"{MARKER}{i}" for i in range(30))
    titled[3]["text"] += f"\n{unique}"
    titled += [titled[0] | {"title": f"{MARKER} copied"}, {"title": f"{MARKER} short", "text": f"{MARKER} short"}]
    (tmp_path / "raw" / "ward" / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in titled))
    (tmp_path / "qa.json").write_text(json.dumps({"questions": [{"body": "Was she seen?", "id": "q1", "type": "yesno", "exact_answer": "yes", "snippets": [{"text": unique}]}]}))
    done = command("corpus", str(tmp_path / "raw"), str(tmp_path / "corpus"), "--mixture", '{"pubmed": 0.7, "ward": 0.3}', "--against", str(tmp_path / "qa.json"),
                   "--restricted", '{"ward": "notes of ward 7"}', "--vocabulary", "400", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "restricted: notes of ward 7" in done.stdout and MARKER not in done.stdout + done.stderr
    assert found_in(tmp_path / "corpus") == [] and found_in(tmp_path / "cache") == []
    report = (tmp_path / "corpus" / "README.md").read_text()
    assert "decontamination" in report and "exact duplicates" in report, "there were examples to show"
    assert mode(tmp_path / "corpus") == "700"


# ---------------------------------------------------------------- errors in the middle of a note

GOOD = as_csv([marked(row) for row in sample_notes(3)])
BROKEN = {
    "a row without its last cells": GOOD + f"1-DS-1,1,{MARKER}\n",
    "a quote that never ends": GOOD + f'1-DS-1,1,1,DS,1,t,t,"{MARKER} and no end\n' + "more of it\n" * 20,
    "a quote in the wrong place": GOOD + f'1-DS-1,1,1,DS,1,t,t,"{MARKER}" and more\n',
    "a note without its patient": GOOD + f"1-DS-1,,1,DS,1,t,t,{MARKER}\n",
    "a header that is a note": f"{MARKER},note\n" + GOOD,
    "another file": f'{{"note": "{MARKER}"}}\n',
    "nothing but a note": f"{MARKER}\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("max_bad", [0, 1])
def test_a_broken_file_of_notes_is_refused_or_counted_without_its_words(content, max_bad, tmp_path):
    (tmp_path / "discharge.csv").write_text(content)
    report, said = ReadReport(), ""
    try:
        read = list(documents.read_mimic(tmp_path, report=report, max_bad=max_bad))
        assert max_bad == 1 and len(read) == 3
        said += repr(read)
    except (UserError, Hidden) as error:
        said += "".join(traceback.format_exception(error))
    assert MARKER not in said + repr(report) + report._repr_markdown_()
    assert report.problems or "UserError" in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_other_encodings(encoding, tmp_path):
    (tmp_path / "discharge.csv").write_bytes(GOOD.replace("was seen", "wäs sëen").encode(encoding))
    with pytest.raises(UserError) as caught:
        list(documents.read_mimic(tmp_path))
    assert MARKER not in str(caught.value) and MARKER.encode("utf-16-le").decode("latin-1") not in str(caught.value)


def fails_with_text(row: dict, *_):
    raise KeyError(row["text"])


def test_an_error_in_the_reader_loses_its_words(tmp_path, monkeypatch):
    (tmp_path / "discharge.csv").write_text(GOOD)
    monkeypatch.setattr(documents, "note_document", fails_with_text)
    with pytest.raises(KeyError, match=MARKER):
        list(documents.read_mimic(tmp_path, restricted=None))
    with pytest.raises(Hidden, match="KeyError at test_restricted.py") as caught:
        list(documents.read_mimic(tmp_path))
    assert MARKER not in "".join(traceback.format_exception(caught.value))


def fails_on_note(document):
    raise ValueError(f"cannot handle {document.text}") if MARKER in document.text else AssertionError("an open document")


def test_an_error_in_a_step_loses_its_words(texts, tmp_path, monkeypatch, capfd):
    from biomamba import stages
    from biomamba.sources import named_sources
    from biomamba.steps import Steps
    monkeypatch.setattr(stages, "normalized", fails_on_note)
    work = stages.Work(tmp_path / "work", named_sources(texts, ["notes"]), Steps(), False)
    from biomamba.collection import build_collection
    with pytest.raises(RuntimeError) as caught:
        build_collection(work, tmp_path / "made", None, 400)
    said = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert "ValueError at test_restricted.py" in said and MARKER not in said
    assert mode(tmp_path / "work") == "700" and [name for name in found_in(tmp_path) if "/texts/" not in name] == []


def test_a_document_shows_no_text():
    read = documents.note_document(dict.fromkeys(COLUMNS, "1") | {"text": MARKER})
    assert MARKER not in repr(read) and MARKER not in f"{[read]}" and read.text == MARKER
    assert MARKER in repr(documents.note_document(dict.fromkeys(COLUMNS, "1") | {"text": MARKER}, restricted=False))


def test_a_search_finds_what_stands_anywhere(tmp_path, monkeypatch):
    from biomamba import guards
    monkeypatch.setattr(guards, "BLOCK", 64)
    for at in range(200):
        (tmp_path / "file").write_bytes(b"\0" * at + MARKER.encode() + b"\0" * (200 - at))
        assert guards.files_with(tmp_path, [MARKER, "nowhere"]) == ["file"], at
    (tmp_path / "file").write_text(MARKER[:-1])
    assert guards.files_with(tmp_path, [MARKER, "nowhere"]) == []


LINE = "The patient's daughter reports that he fell at home & hit his head on \"tiles\" <hard> – twice"


def written(spelled) -> dict:
    "Ways in which a program may write a line, each around another."
    import html
    page = f"<td>{html.escape(spelled)}</td>"
    return {"html": page, "html in json": json.dumps({"text/html": [page]}), "html without quotes": html.escape(spelled, quote=False), "json": json.dumps(spelled),
            "template": page.replace("&quot;", "&#34;").replace("&#x27;", "&#39;"), "json in json": json.dumps({"p": json.dumps({"t": spelled})}),
            "json as it is": json.dumps(spelled, ensure_ascii=False), "json in html": html.escape(json.dumps(spelled))}


@pytest.mark.parametrize("way", written(""))
def test_a_search_finds_what_is_escaped(way, tmp_path):
    from biomamba.guards import check_no_text
    notes = [f"Service: MEDICINE\n{LINE}\nshort", "Service: MEDICINE\nAnother note, whose only long line is this one."]
    (tmp_path / "file").write_text(written("nothing of them")[way])
    assert check_no_text(tmp_path, notes) == 2
    (tmp_path / "file").write_text(written(LINE)[way])
    with pytest.raises(Hidden, match="in file:"):
        check_no_text(tmp_path, notes)


@pytest.mark.parametrize("ending", ["", "\nAddendum.", "\nAddendum: seen again by the attending, who agrees with all of the above."])
def test_a_search_finds_a_note_that_came_twice(ending, tmp_path):
    from biomamba.guards import check_no_text
    shared = "Please keep your appointment with your doctor, and bring all your medicines to it."
    note = f"Service: MEDICINE\n{LINE}\nHe was well\nHis wound was dressed\n{shared}"
    others = [f"Service: SURGERY\nNote {i} has this line, which stands in no other note.\n{shared}" for i in range(12)]
    (tmp_path / "file").write_text(LINE)
    with pytest.raises(Hidden, match="in file:"):
        check_no_text(tmp_path, [note, note + ending, *others])
    (tmp_path / "file").write_text(shared)
    assert check_no_text(tmp_path, [note, note + ending, *others]) >= 13, "what all share is template"


def test_evaluation_notes_stand_in_a_closed_folder(texts, tmp_path, monkeypatch):
    from biomamba import building, stages
    from biomamba.runs import mark_restricted
    mark_restricted(tmp_path / "evals", "ward 7")
    (tmp_path / "evals" / "notes.jsonl").write_text(json.dumps({"id": "1", "text": f"{MARKER} was admitted with a ruptured spleen after a fall from a red ladder."}) + "\n")
    def fails(work):
        raise KeyboardInterrupt
    monkeypatch.setattr(stages.Work, "hold_out", fails)
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        building.build(str(texts), str(tmp_path / "corpus"), mixture='{"pubmed": 1}', against=str(tmp_path / "evals"))
    [path] = tmp_path.rglob("evaluation.json")
    assert MARKER in path.read_text() and mode(path) == "600" and mode(path.parent) == "700"


def test_surprisal_under_a_restricted_model_shows_means(made):
    from biomamba.surprisal import surprisal
    place = made[0]
    seen = surprisal(f"Chief Complaint:\n{MARKER} was seen.\n", place / "run" / "model", place / "run" / "model")
    assert MARKER not in repr(seen) + seen._repr_html_() and "Chief" not in repr(seen) and "characters left out: MIMIC-IV-Note" in seen._repr_html_()


def test_the_hub_is_read_and_not_written():
    import huggingface_hub

    from biomamba.runs import reads_only
    request = huggingface_hub.get_session().build_request
    for method, url in (("GET", "api/models/a/b/tree/main"), ("HEAD", "a/b/resolve/main/config.json"), ("POST", "api/models/a/b/paths-info/main")):
        reads_only(request(method, f"https://hub.example/{url}"))
    for method, url in (("POST", "api/repos/create"), ("POST", "api/models/a/b/preupload/main"), ("POST", "api/models/a/b/commit/main"), ("PUT", "upload"), ("DELETE", "api/repos/delete")):
        with pytest.raises(UserError, match="writes nothing to a hub"):
            reads_only(request(method, f"https://hub.example/{url}"))


def test_a_restricted_process_reports_nothing(made):
    source = ("import huggingface_hub, sys, os; from biomamba.checkpoints import load_model; before = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY; "
              "load_model(sys.argv[1]); print(before, huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, os.environ['DO_NOT_TRACK'])")
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    done = subprocess.run([sys.executable, "-c", source, str(made[0] / "run")], capture_output=True, text=True, env=clean)
    assert done.stdout.split() == ["False", "True", "1"], done.stderr


def zipped(data: bytes) -> bytes:
    import zipfile
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first.txt", "nothing")
        archive.writestr("second", data)
    return out.getvalue()


def in_a_page(data: bytes) -> bytes:
    return b'<html><a href="data:application/octet-stream;base64,' + base64.b64encode(data) + b'">notes</a></html>'


PACKED = {"gzip": gzip.compress, "two members": lambda data: gzip.compress(b"") + gzip.compress(data), "a gzip without its end": lambda data: gzip.compress(data)[:-4],
          "zstd": zstandard.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zip": zipped, "a page": in_a_page, "wrapped base64": base64.encodebytes, "urls": base64.urlsafe_b64encode,
          "a notebook": lambda data: json.dumps({"image/png": base64.encodebytes(data).decode()}).encode()}


@pytest.mark.parametrize("outer", PACKED)
@pytest.mark.parametrize("inner", ["", *PACKED])
def test_a_search_opens_what_is_packed_and_what_is_packed_in_it(inner, outer, tmp_path):
    from biomamba.guards import files_with
    text = b"\xfa" * 100 + f"\n{MARKER} was seen on the ward and went home again.\n".encode() + bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(PACKED[outer](PACKED[inner](text) if inner else text))
    assert files_with(tmp_path, [MARKER]) == ["file"] and files_with(tmp_path, ["nowhere"]) == []


def test_a_search_goes_on_behind_what_only_looks_packed(tmp_path):
    from biomamba.guards import files_with
    for name, data in {"a": b"\x1f\x8bno gzip", "b": b"\x28\xb5\x2f\xfdno zstd", "c": b"BZhno", "d": b"PK\x05\x06no zip", "e": zipped(b"x" * 99)[:-30] + b"PK\x05\x06"}.items():
        (tmp_path / name).write_bytes(data + MARKER.encode())
    assert files_with(tmp_path, [MARKER]) == ["a", "b", "c", "d", "e"]
