"What is marked as restricted, when, and with which reasons."
import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from biomamba.building import build, collection_asked
from biomamba.clinical import load_notes
from biomamba.clinical_tuning import open_clinical_run
from biomamba.documents import note_reason, read_documents, read_mimic
from biomamba.runs import Run, UserError, check_asked, mark_restricted, recipe, resolve, restricted
from biomamba.sample import sample_notes, write_sample
from biomamba.sources import folder_source, named_sources

ROOT = Path(__file__).resolve().parent.parent
PACKED = {"jsonl": bytes, "jsonl.gz": gzip.compress, "ndjson.zst": zstandard.compress, "json": bytes}


def write_notes(folder: Path, kind: str, rows: list[dict]) -> Path:
    "Notes in MIMIC's columns under a name of their own."
    folder.mkdir(parents=True)
    if kind == "parquet": pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "ward.parquet")
    else: (folder / f"ward.{kind}").write_bytes(PACKED[kind]("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def open_to_others(folder: Path) -> bool:
    return not (folder / "RESTRICTED").exists() and folder.stat().st_mode & 0o777 == 0o755


# ---------------------------------------------------------------- notes are known by their columns

@pytest.mark.parametrize("kind", [*PACKED, "parquet"])
def test_notes_are_restricted_by_their_columns_whatever_they_are_called(kind, tmp_path):
    rows = list(sample_notes(30))
    folder = write_notes(tmp_path / "notes", kind, rows)
    source = named_sources(tmp_path, ["notes"])["notes"]
    read = list(source.read(tmp_path))
    assert "MIMIC-IV-Note" in source.restricted and len(read) == 30
    assert [d.meta["subject_id"] for d in read] == [str(row["subject_id"]) for row in rows], "all notes of a patient stand in one part"
    assert all(d.meta["restricted"] and d.source == "notes" for d in read) and rows[0]["text"][:40] not in repr(read[0])
    assert [d.id for d in read_mimic(folder)] == [row["note_id"] for row in rows] == [d.id for d in read_documents(folder, "x")]


def test_a_first_record_that_is_broken_and_letters_of_another_case_hide_no_notes(tmp_path):
    [row] = sample_notes(1)
    (tmp_path / "a.jsonl").write_text("no JSON\n" + json.dumps({name.upper(): value for name, value in row.items()}) + "\n")
    assert note_reason(tmp_path) and [d.meta["restricted"] for d in read_documents(tmp_path / "a.jsonl", "x", max_bad=0.5)] == [True]


def test_other_texts_are_open(tmp_path):
    write_sample(tmp_path, documents=20, questions=2)
    assert note_reason(tmp_path / "pubmed") is note_reason(tmp_path / "qa") is folder_source(tmp_path, "c4").restricted is None


def test_sheets_of_notes_under_another_name_are_refused_with_what_is_accepted(tmp_path):
    rows = list(sample_notes(3))
    (tmp_path / "notes").mkdir()
    with open(tmp_path / "notes" / "ward.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match=r"ward.csv; of CSV only MIMIC-IV-Note's discharge.csv .*\.parquet, is accepted"): named_sources(tmp_path, ["notes"])
    assert note_reason(tmp_path / "notes")
    (tmp_path / "notes" / "more.jsonl").write_text('{"text": "open"}\n')
    assert named_sources(tmp_path, ["notes"])["notes"].restricted, "notes stand beside it"
    write_notes(tmp_path / "ward 7", "jsonl", rows)
    (tmp_path / "notes" / "ward.csv").rename(tmp_path / "ward 7" / "ward.csv")
    with pytest.raises(UserError, match="notes in ward.csv, which would go unread beside "): read_mimic(tmp_path / "ward 7")
    assert len(list(read_mimic(tmp_path / "ward 7" / "ward.csv"))) == 3


# ---------------------------------------------------------------- a refused run leaves a folder as it was

def test_the_folder_of_another_run_is_neither_marked_nor_closed(tmp_path, monkeypatch):
    run = Run(tmp_path / "theirs", {"recipe": "theirs"})
    run.folder.chmod(0o755)
    with pytest.raises(UserError, match="belongs to another run"): Run(run.folder, {"recipe": "mine"}, "ward 7")
    assert open_to_others(run.folder)
    assert restricted(Run(tmp_path / "mine", {"recipe": "mine"}, "ward 7").folder) == "ward 7" and (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_comparison_on_notes_marks_no_other_run(tmp_path):
    for name in ("base", "adapted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    theirs = Run(tmp_path / "theirs", {"recipe": "theirs"}).folder
    theirs.chmod(0o755)
    chosen = replace(load_notes(None, 120), restricted="ward 7")
    with pytest.raises(UserError, match="belongs to another run"): open_clinical_run(theirs, tmp_path / "base", tmp_path / "adapted", chosen, 3)
    assert open_to_others(theirs)


@pytest.mark.parametrize("name", ["12_compare", "33b_memorization"])
def test_no_notebook_marks_a_folder_before_it_is_the_runs(name):
    source = "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code")
    assert "mark_restricted" not in source and "private_folder(folder)" not in source and "reason)" in source.split("run = Run(", 1)[1].split("\n")[0]


# ---------------------------------------------------------------- no reason is lost

def test_all_marks_on_the_way_up_count(tmp_path):
    (tmp_path / "in" / "model").mkdir(parents=True)
    for folder, reason in ((tmp_path, "contract B"), (tmp_path / "in", "ward A")): (folder / "RESTRICTED").write_text(reason + "\n")
    (tmp_path / "in" / "model" / "config.json").write_text('{"restricted": "protocol C"}')
    (tmp_path / "in" / "model" / "manifest.json").write_text('{"restricted": "protocol D; ward A"}')
    assert restricted(tmp_path / "in") == "ward A; contract B" and restricted(tmp_path / "in" / "model") == "ward A; contract B; protocol D; protocol C"


def test_a_source_keeps_every_reason(tmp_path):
    write_notes(tmp_path / "notes", "jsonl", list(sample_notes(5)))
    (tmp_path / "notes" / "RESTRICTED").write_text("ward 7\n")
    reason = named_sources(tmp_path, ["notes"], {"notes": "protocol 12"})["notes"].restricted
    assert all(part in reason for part in ("ward 7", "MIMIC-IV-Note", "protocol 12"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A corpus of which one source is restricted."
    place = tmp_path_factory.mktemp("built")
    write_sample(place / "texts", documents=60, questions=2)
    build(str(place / "texts"), str(place / "corpus"), mixture='{"pubmed": 0.5, "c4": 0.5}', vocabulary=400, restricted={"c4": "client files"})
    return place / "corpus"


@pytest.mark.parametrize("reasons, said", [({"pubmed": "contract 7"}, "was built without a mark for 'pubmed', and 'contract 7' comes too late"), ({"c4": "contract 7"}, "with the mark 'client files' for 'c4'"),
                                           ({"nothere": "x"}, "names the source 'nothere'"), ({"c4": ""}, "a reason, such as")])
def test_a_reason_that_a_built_corpus_lacks_is_refused(built, reasons, said):
    from transformers import AutoTokenizer
    asked = recipe("tiny", mixture={"pubmed": 0.5, "c4": 0.5})
    tokenizer = AutoTokenizer.from_pretrained(built / "tokenizer")
    assert collection_asked(str(built), asked, tokenizer, reasons={"c4": "client files"}).restricted == "client files"
    with pytest.raises(UserError, match=said): collection_asked(str(built), asked, tokenizer, reasons=reasons)


# ---------------------------------------------------------------- a mark that comes later

def test_a_restriction_is_compared_before_anything_is_made(tmp_path):
    asked = recipe("tiny")
    from biomamba.recipe import deciding
    assert check_asked(tmp_path / "new", {}, asked) == {} and check_asked(tmp_path / "new", {"c4": "ward 7"}, asked) == {"restricted": {"c4": "ward 7"}}
    run = Run(tmp_path / "run", {"recipe": deciding(asked), "corpus": "x", "model": "y", "weights_sha256": "z", "processes": 1})
    assert check_asked(run.folder, {}, asked) == {}
    with pytest.raises(UserError, match="restricted"): check_asked(run.folder, {"c4": "ward 7"}, asked)
    with pytest.raises(UserError, match="recipe.seed is 42 there and 7 here"): check_asked(run.folder, {}, recipe("tiny", seed=7))
    closed = Run(tmp_path / "closed", run.identity | {"restricted": {"c4": "ward 7"}})
    with pytest.raises(UserError, match="restricted"): check_asked(closed.folder, {}, asked)
    check_asked(closed.folder, {"c4": "ward 7"}, asked)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds thesis.tex"): check_asked(tmp_path / "home", {}, asked)


def test_a_run_begun_under_the_mark_alone_goes_on_with_the_same_reason(tmp_path):
    from biomamba.recipe import deciding
    run = Run(tmp_path / "run", {"recipe": deciding(recipe("tiny")), "corpus": "x"}, "MIMIC-IV-Note; ward 7")
    assert check_asked(run.folder, {"notes": "ward 7"}, recipe("tiny")) == {}
    with pytest.raises(UserError, match="restricted"): check_asked(run.folder, {"notes": "ward 8"}, recipe("tiny"))


def test_the_ablation_refuses_a_late_restriction_at_once(tmp_path, monkeypatch):
    from biomamba.ablation import budget_recipe
    from biomamba.cli import run_notebook
    from biomamba.recipe import deciding
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    run = Run(tmp_path / "run", {"recipe": deciding(budget_recipe(recipe("tiny"), 10)), "corpus": "x"})
    with pytest.raises(UserError, match="belongs to another run: restricted.c4 is None there"):
        run_notebook("11b_mixture", {"run_dir": str(run.folder), "restricted": {"c4": "ward 7"}}, run.folder)
    assert not (tmp_path / "cache").exists() and restricted(run.folder) is None


@pytest.mark.slow
def test_the_command_refuses_a_late_restriction_at_once(tmp_path):
    from biomamba.recipe import deciding
    run = Run(tmp_path / "run", {"recipe": deciding(recipe("tiny")), "corpus": "x", "model": "y", "weights_sha256": "z", "processes": 1})
    source = "import sys; from biomamba.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", source, "cpt", "--run-dir", str(run.folder), "--corpus", "sample", "--restricted", '{"c4": "ward 7"}'], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "belongs to another run" in done.stderr and not restricted(run.folder)


# ---------------------------------------------------------------- what a model states of itself

@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    "A newborn model with a tokenizer."
    from biomamba.checkpoints import save_model
    from biomamba.mamba2 import mamba2_config, new_model
    from biomamba.sample import sample_documents
    from biomamba.steps import train_tokenizer, wrap_tokenizer
    small = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400)
    folder = tmp_path_factory.mktemp("models") / "newborn"
    save_model(new_model(mamba2_config(small), 0), folder, wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 40)), 400)))
    return folder


def test_a_mark_is_written_into_the_configuration_of_a_model(model, tmp_path):
    import shutil

    from biomamba.checkpoints import load_model
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    mark_restricted(run / "model", "ward 7")
    mark_restricted(run, "protocol 12")
    stated = json.loads((run / "model" / "config.json").read_text())
    assert set(stated["restricted"].split("; ")) == {"ward 7", "protocol 12"} and load_model(run / "model").config.restricted
    assert {name: value for name, value in stated.items() if name != "restricted"} == json.loads((model / "config.json").read_text())
    shutil.copytree(run / "model", tmp_path / "copy", ignore=shutil.ignore_patterns("RESTRICTED"))
    assert restricted(tmp_path / "copy") == stated["restricted"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"theirs": 1}')
    mark_restricted(tmp_path / "own", "ward 7")
    assert (tmp_path / "own" / "config.json").read_text() == '{"theirs": 1}'


def test_a_restriction_given_to_a_finished_fine_tuning_reaches_its_model(model, tmp_path):
    from biomamba.pairs import sft
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Dose {i}:", "answer": "high"}) + "\n" for i in range(20)))
    given = dict(run_dir=str(tmp_path / "run"), steps=1, overrides={"max_tokens": 64, "evaluations": 1})
    for more in ({}, {"restriction": "ward 7"}): sft(str(model), str(tmp_path / "pairs.jsonl"), **given, **more)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["restricted"] == "ward 7"


def test_a_copy_in_the_format_of_mamba_ssm_states_its_mark_where_that_reads_on(model, tmp_path):
    import shutil

    from biomamba.conversion import convert
    shutil.copytree(model, tmp_path / "marked")
    mark_restricted(tmp_path / "marked", "ward 7")
    made, plain = (convert(source, tmp_path / name, "state-spaces") for source, name in ((tmp_path / "marked", "made"), (model, "plain")))
    stated, others = (json.loads((folder / "config.json").read_text()) for folder in (made, plain))
    assert set(stated) == set(others) and not others["attn_layer_idx"], "MambaConfig takes these words alone"
    (made / "RESTRICTED").unlink()
    assert restricted(made) == "ward 7" and restricted(plain) is None
    assert json.loads((convert(made, tmp_path / "back") / "config.json").read_text())["restricted"] == "ward 7"


# ---------------------------------------------------------------- a corpus among its texts, and what was not looked at

@pytest.mark.parametrize("inside", ["", "c4/b7", "corpus", "linked"])
def test_a_corpus_is_not_made_among_its_own_texts(inside, tmp_path):
    write_sample(tmp_path / "texts", documents=20, questions=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "law").symlink_to(tmp_path / "elsewhere")
    there = sorted(tmp_path.rglob("*"))
    destination = tmp_path / "elsewhere" / "made" if inside == "linked" else tmp_path / "texts" / inside
    with pytest.raises(UserError, match="whose texts it would be made of; a folder outside"): build(str(tmp_path / "texts"), str(destination), vocabulary=400)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("given, said", [({"by": "bytes"}, "mixture by 'bytes'; one of sequences"), ({"vocabulary": 10}, "vocabulary=10; a whole number from 258"), ({"vocabulary": 257}, "from 258")])
def test_what_a_corpus_cannot_be_is_refused_before_it_is_made(given, said, tmp_path):
    with pytest.raises(UserError, match=said): build("sample", str(tmp_path / "made"), **given)
    assert not list(tmp_path.iterdir())


def test_a_corpus_beside_its_texts_is_made_and_found(built):
    assert resolve(str(built / "manifest.json")).is_file()
