"The command: a run with its table, the same again at once, functions as verbs, and one sentence for a mistake."
import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biomamba.runs import UserError
from biomamba.sample import sample_documents

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 400, "max_tokens": 128, "sequences_per_step": 4,
         "evaluations": 2, "validation_documents": 4, "base_steps": 4, "micro_batch_tokens": 512}
MEDLINE = """<?xml version="1.0"?><PubmedArticleSet>{}</PubmedArticleSet>"""
RECORD = """<PubmedArticle><MedlineCitation><PMID Version="1">{}</PMID><Article><ArticleTitle>{}</ArticleTitle>
<Abstract><AbstractText>{}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"""


def biomamba(*arguments, cwd=ROOT):
    command = [sys.executable, "-c", "import sys; from biomamba.cli import main; sys.exit(main())", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    "A corpus of three formats: MEDLINE XML, Parquet, JSONL."
    import gzip
    from html import escape

    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = tmp_path_factory.mktemp("texts")
    for name in ("pubmed", "c4", "wikipedia"): (folder / name).mkdir()
    parts = [d.text.split("\n", 1) for d in sample_documents("pubmed", 120)]
    records = "".join(RECORD.format(1000 + i, escape(title), escape(abstract)) for i, (title, abstract) in enumerate(parts))
    (folder / "pubmed" / "pubmed24n0001.xml.gz").write_bytes(gzip.compress(MEDLINE.format(records).encode()))
    pages = list(sample_documents("c4", 60))
    pq.write_table(pa.table({"url": [f"https://example.org/{d.id}" for d in pages], "text": [d.text for d in pages]}), folder / "c4" / "pages.parquet")
    (folder / "wikipedia" / "articles.jsonl").write_text("".join(json.dumps({"title": d.id, "text": d.text}) + "\n" for d in sample_documents("wikipedia", 30)))
    return folder


def test_a_run_prints_its_table_and_a_second_one_finds_it(texts, tmp_path):
    arguments = ["cpt", "--corpus", texts, "--run-dir", tmp_path / "run", "--steps", 4, "--overrides", json.dumps(SMALL)]
    first = biomamba(*arguments)
    assert first.returncode == 0, first.stderr
    assert "PubMed (small source)" in first.stdout and "validation loss" in first.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["perplexity"]["base"]["pubmed"]["documents"] == 12 and results["perplexity"]["base"]["c4"]["documents"] == 6
    assert (tmp_path / "run" / "10_cpt.ipynb").exists()
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    again = biomamba(*arguments, cwd=ROOT / "nbs")
    assert again.returncode == 0 and again.stdout == first.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_a_mistake_is_one_sentence(texts, tmp_path):
    done = biomamba("cpt", "--corpus", tmp_path / "nowhere", "--run-dir", tmp_path / "run")
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("biomamba: corpus") and "nowhere" in lines[-1] and "Traceback" not in done.stderr


def test_a_plan_is_printed_for_every_scale():
    from biomamba.cli import parse
    from biomamba.paper import SCALES
    for scale in ("tiny", *SCALES):
        assert parse(["plan", "--scale", scale]) == ("plan", {"scale": scale})
    done = biomamba("cpt", "--scale", "2.7b", "--plan-only")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("optimizer steps", "7,953", "tokens", "FLOPs", "memory in all", " h"))


def test_a_plan_counts_unknown_sources_full_and_says_when_the_corpus_decides(capsys):
    from biomamba.cli import main
    assert main(["plan", "--mixture", '{"notes": 0.4, "pubmed": 0.6}']) == 0 and "optimizer steps" in capsys.readouterr().out
    assert main(["plan", "--scale", "780m", "--overrides", '{"sequences": null}']) == 0 and "As long as the corpus" in capsys.readouterr().out
    with pytest.raises(SystemExit): main(["plan", "--corpus", "my/texts"])


@pytest.mark.parametrize("raised, code, words", [(KeyboardInterrupt(), 130, "interrupted"), (FileExistsError(17, "File exists", "out/x"), 1, "out/x: File exists")])
def test_what_stops_a_command_is_one_line(raised, code, words, monkeypatch, capsys):
    from biomamba import cli
    def stopped(parameters): raise raised
    monkeypatch.setitem(cli.VERBS, "plan", stopped)
    assert cli.main(["plan"]) == code and capsys.readouterr().err.rstrip() == f"biomamba: {words}"


def test_a_reader_that_goes_away_is_no_error():
    first, second = os.pipe()
    os.close(first)
    done = subprocess.run([sys.executable, "-c", "import sys; from biomamba.cli import main; sys.exit(main())", "plan"], stdout=second, stderr=subprocess.PIPE, text=True)
    os.close(second)
    assert done.returncode == 141 and done.stderr == ""


def test_a_refused_run_leaves_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    from biomamba.cli import run_notebook
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError): run_notebook("10_cpt", {"scale": "8b"}, tmp_path)
    assert not [p for p in tmp_path.rglob("*.ipynb")]


def test_an_unknown_option_is_refused():
    done = biomamba("cpt", "--lerning-rate", "1")
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr


# ---------------------------------------------------------------- verbs that are functions

@pytest.fixture(scope="module")
def state_spaces(tmp_path_factory) -> Path:
    "A small checkpoint in mamba-ssm's format."
    import torch

    from biomamba.checkpoints import config_to_state_spaces, to_state_spaces
    from biomamba.mamba2 import mamba2_config, new_model
    from biomamba.runs import recipe
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    folder.mkdir()
    model = new_model(mamba2_config(recipe("tiny", d_model=64, layers=2, vocabulary=304)), 0)
    (folder / "config.json").write_text(json.dumps(config_to_state_spaces(model.config)))
    torch.save(to_state_spaces(model.state_dict()), folder / "pytorch_model.bin")
    return folder


def test_a_round_trip_keeps_the_bytes_of_every_tensor(state_spaces, tmp_path):
    import torch
    there = biomamba("convert", state_spaces, tmp_path / "hf", "--to", "hf", "--probe")
    assert there.returncode == 0 and there.stdout == f"{tmp_path / 'hf'}\n", there.stderr
    assert "biomamba: probe: source and copy differ by" in there.stderr and "not installed" not in there.stderr
    back = biomamba("convert", tmp_path / "hf", tmp_path / "back", "--to", "state-spaces")
    assert back.returncode == 0 and back.stderr == "", back.stderr
    one, other = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (state_spaces, tmp_path / "back"))
    raw = lambda tensors: {k: (v.shape, v.dtype, v.numpy().tobytes()) for k, v in tensors.items()}
    assert raw(one) == raw(other) and len(one) == 2 * 9 + 3
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((state_spaces / "config.json").read_text())


@pytest.mark.parametrize("arguments,part", [(["{}/none", "{}/new"], "there is no folder"), (["{}", "{}/new"], "no config.json"), (["{0}/small", "{0}/small"], "exists already"),
                                            (["{}/small", "{}/new", "--to", "gguf"], "it must be hf or state-spaces")])
def test_a_conversion_that_cannot_be_is_one_sentence(state_spaces, arguments, part, capsys):
    from biomamba.cli import main
    assert main(["convert", *(a.format(state_spaces.parent) for a in arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("biomamba: ") and part in shown.err
    assert sorted(p.name for p in state_spaces.parent.iterdir()) == ["small"]


def test_a_refused_conversion_exits_with_1(state_spaces):
    done = biomamba("convert", state_spaces, state_spaces)
    assert done.returncode == 1 and done.stdout == "" and "exists already" in done.stderr and "Traceback" not in done.stderr


def test_help_is_read_from_the_function_and_imports_nothing():
    done = biomamba("convert", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("SOURCE DESTINATION", "--to TO", "--revision", "--probe", "--shard", "a new folder", "(default hf)", "bit for bit"))
    source = "import sys; from biomamba.cli import parse; parse(['convert', 'a', 'b', '--shard', '9']); print({'torch', 'transformers', 'fastcore', 'papermill'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_a_corpus_is_built_with_the_mixture_that_was_named(texts, tmp_path):
    shares = {"pubmed": 0.5, "c4": 0.25, "wikipedia": 0.25}
    done = biomamba("corpus", texts, tmp_path / "corpus", "--mixture", json.dumps(shares), "--vocabulary", 300)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert made["fingerprint"] in done.stdout
    total = sum(made["mixture"][name]["sequences"] for name in shares)
    assert {name: made["mixture"][name]["sequences"] / total for name in shares} == pytest.approx(shares, abs=1 / total)
    refused = biomamba("corpus", texts, tmp_path / "other", "--mixture", "half")
    assert refused.returncode == 1 and refused.stderr.count("\n") <= 2 and "half" in refused.stderr


def test_the_wrong_number_of_folders_is_refused():
    for arguments in (["convert"], ["convert", "a"], ["convert", "a", "b", "c"], ["convert", "a", "b", "--shard", "many"]):
        done = biomamba(*arguments)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("biomamba")


SOURCE = '''
def verb(
    first: str | os.PathLike,   # 100 % of it
    many: list[str],  # some words
    number: int = 3,      # a # inside
    share: float | None = None,
    sure: bool = True,    # be sure
    model: "torch.nn.Module" = None,
    *,
    key: str,             # needed, by name
    label_name: str = "it's",
) -> None:
    "Do it."
'''


def test_docments_become_options():
    import argparse

    from biomamba.cli import add_options, signature_of
    about, options = signature_of(SOURCE, "verb")
    assert about == "Do it." and [o.name for o in options] == ["first", "many", "number", "share", "sure", "key", "label_name"]
    assert [o.about for o in options] == ["100 % of it", "some words", "a # inside", "", "be sure", "needed, by name", ""]
    parser = argparse.ArgumentParser()
    add_options(parser, options)
    read = lambda *arguments: {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    assert read("x", "y", "z", "--key", "k") == {"first": "x", "many": ["y", "z"], "key": "k"}
    assert read("x", "y", "--key", "k", "--no-sure", "--number", "4", "--share", "0.5", "--label-name", "n") == {
        "first": "x", "many": ["y"], "key": "k", "sure": False, "number": 4, "share": 0.5, "label_name": "n"}
    assert "100 % of it" in parser.format_help() and "(default 3)" in parser.format_help()
    with pytest.raises(SystemExit): read("x", "y")


def test_a_parameter_that_no_text_can_be_needs_a_default():
    from biomamba.cli import signature_of
    with pytest.raises(AssertionError, match="verb needs model"): signature_of("def verb(model: Model): 'Do.'", "verb")


def test_every_verb_names_a_function_with_a_word_on_each_parameter():
    from biomamba.cli import FUNCTIONS, VERBS, options_of
    assert "convert" in FUNCTIONS and not set(FUNCTIONS) & set(VERBS)
    for function in FUNCTIONS.values():
        about, options = options_of(function)
        assert about and options and all(len(o.about) > 3 for o in options), function
        assert all(o.default is None or ast.parse(o.default) for o in options)


def test_what_a_function_returns_is_printed(capsys, monkeypatch):
    import types

    from biomamba.cli import run_function
    room = types.ModuleType("biomamba.room")
    room.text, room.nothing, room.pieces, room.bad = lambda: 3, lambda: None, lambda: iter("abc"), lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "biomamba.room", room)
    for name, printed in {"text": "3\n", "nothing": "", "pieces": "abc"}.items():
        run_function(f"biomamba.room.{name}", {})
        assert capsys.readouterr().out == printed
    with pytest.raises(ZeroDivisionError): run_function("biomamba.room.bad", {})


# ---------------------------------------------------------------- every verb

ALL = ["cpt", "plan", "convert", "corpus", "eval", "ask", "sft", "results", "lm-eval-tasks"]
HELP = {"cpt": ["--scale", "--corpus", "--plan-only"], "plan": ["--scale", "--steps"], "convert": ["SOURCE DESTINATION", "--to"], "corpus": ["--mixture", "--options", "--restricted", "--against"],
        "eval": ["MODEL", "--adapted", "--window", "--out"], "ask": ["--question", "--context", "--maybe"], "sft": ["MODEL DATA", "--task", "--overrides", "--restriction"],
        "results": ["--table", "--format", "--out"], "lm-eval-tasks": ["FOLDER", "--characters"]}
MISTAKES = {  # verb → words, and what the one sentence says
    "cpt": (["--scale", "8b"], "scale '8b' is unknown"), "plan": (["--mixture", "half"], "half"), "convert": (["./none", "new"], "there is no folder ./none"),
    "corpus": (["./none", "new"], "none"), "eval": (["./none"], "there is no folder ./none"), "ask": (["./none", "--question", "Why?", "--context", "none.txt"], "none.txt does not exist"),
    "sft": (["./none", "none.jsonl"], "none.jsonl does not exist"), "results": (["--runs", "no/runs/*"], "no finished run matches 'no/runs/*'"), "lm-eval-tasks": (["new", "--characters", "0"], "characters=0")}


def test_help_names_every_verb(capsys):
    from biomamba.cli import FUNCTIONS, VERBS, main
    assert set(ALL) <= {*VERBS, *FUNCTIONS}
    with pytest.raises(SystemExit) as ended: main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"    {verb} " in shown or f"    {verb}\n" in shown for verb in (*VERBS, *FUNCTIONS))


@pytest.mark.parametrize("verb", ALL)
def test_help_of_a_verb_has_its_options_and_a_word_on_each(verb, capsys):
    from biomamba.cli import main
    with pytest.raises(SystemExit) as ended: main([verb, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in shown for word in HELP[verb])
    options = [line for line in shown.splitlines() if line.startswith("  --")]
    assert len(options) >= 3 and not shown.rstrip().endswith("--")


@pytest.mark.parametrize("verb", ALL)
def test_a_mistake_in_any_verb_is_one_sentence_and_leaves_nothing(verb, capsys, monkeypatch, tmp_path):
    from biomamba.cli import main
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES[verb]
    assert main([verb, *words]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1].startswith("biomamba: ") and says in shown.err and "Traceback" not in shown.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_pairs_are_learned_and_results_are_printed(tmp_path):
    from biomamba.checkpoints import save_model
    from biomamba.mamba2 import mamba2_config, new_model
    from biomamba.runs import recipe
    from biomamba.steps import train_tokenizer, wrap_tokenizer
    tokenizer = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 40)), 400))
    save_model(new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400)), 0), tmp_path / "base", tokenizer)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"Dose {i}:", "answer": "high"}) + "\n" for i in range(20)))
    done = biomamba("sft", tmp_path / "base", tmp_path / "pairs.jsonl", "--run-dir", tmp_path / "run", "--steps", 2, "--overrides", json.dumps({"max_tokens": 48, "evaluations": 1}))
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "Validation loss" in done.stdout and (tmp_path / "run" / "model" / "README.md").is_file()
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "results.json").write_text(json.dumps({"loss": 1}))
    shown = biomamba("results", "--runs", tmp_path / "found", "--table", "12", "--format", "markdown", "--out", tmp_path / "out")
    assert shown.returncode == 0 and "| 780M | best validation loss | 1.7991 |" in shown.stdout, shown.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tables.md", "tables.html", "tables.tex"}


# ---------------------------------------------------------------- stopped

STOPPED = """
import sys, time
from pathlib import Path
folder = Path({folder!r})
(folder / "began").touch()
try: time.sleep(60)
except KeyboardInterrupt:
    time.sleep(6)      # a step that takes longer than Jupyter waits
    (folder / "saved").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_kernel_save(tmp_path, number):
    import nbformat
    book = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(STOPPED.format(folder=str(tmp_path)))]), book)
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path; from biomamba import cli; "
            f"cli.notebook = lambda name: Path({str(book)!r}); cli.VERBS['cpt'] = lambda parameters: cli.run_notebook('book', {{}}, Path({str(tmp_path)!r})); sys.exit(cli.main(['cpt']))")
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "began").exists() and time.monotonic() < deadline: time.sleep(0.05)
    running.send_signal(number)
    said = running.communicate(timeout=90)[1]
    assert running.returncode == 130 and "biomamba: interrupted" in said and (tmp_path / "saved").exists()
