"Every run notebook runs, takes its parameters, refuses others, and stores the outputs of its own cells."
import ast
import csv
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from biomamba.sample import sample_documents, sample_questions, write_sample

ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = {
    "d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 512, "max_tokens": 128, "base_steps": 4,
    "sequences_per_step": 4, "evaluations": 2, "validation_documents": 5,
}
# The smallest parameters of each run notebook; RUN is a temporary run folder, TEXTS a small corpus, FINISHED a finished run, ASKED small question sets.
SMALLEST = {
    "10_cpt": {"scale": "tiny", "steps": 4, "run_dir": "RUN", "corpus": "TEXTS", "overrides": SMALL_MODEL},
    "11b_mixture": {"corpus": "TEXTS", "run_dir": "RUN", "seeds": 1, "steps": 2, "documents": 3, "dial": "0.5", "dials": "PubMed only", "processes": 1, "overrides": SMALL_MODEL | {"sequences_per_step": 10},
                    "configurations": "PubMed only; C4 only, 10%; C4 only, 30%; Wikipedia only, 10%; Wikipedia only, 30%; 20% C4 + 20% Wikipedia"},
    "12_compare": {"corpus": "TEXTS", "documents": 3, "run_dir": "RUN"},
    "13_learning_curves": {"runs": "FINISHED", "run_dir": "RUN"},
    "41_results": {"runs": "FINISHED", "run_dir": "RUN"},
    "33b_memorization": {"run_dir": "RUN", "most_notes": 60, "repetitions": "0 4", "each": 2, "references": 31, "steps": 4, "overrides": SMALL_MODEL},
    "22_qa_runs": {"adapted": "FINISHED", "pubmedqa": "ASKED", "bioasq": "ASKED", "run_dir": "RUN", "seeds": 2, "steps": 2, "overrides": {"max_tokens": 96, "evaluations": 1}},
    "31_clinical_runs": {"adapted": "FINISHED", "run_dir": "RUN", "sample": 120, "seeds": 1, "steps": 1, "answer": 60, "test_notes": 3, "settings": 0,
                         "overrides": {"max_tokens": 128, "sequences_per_step": 2, "evaluations": 1}},
    "32_case_studies": {"adapted": "FINISHED", "run_dir": "RUN", "sample": 120, "test_notes": 3, "cases": 1},
}
SIZES = {"pubmed": 120, "c4": 60, "wikipedia": 30}
RUNS = [path for path in sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))
        if path.stem != "index" and "#| default_exp" not in path.read_text(encoding="utf-8")]
IDS = {"ids": lambda path: path.stem}


def parameter_cells(nb) -> list[str]:
    return [cell.source for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]


def parameters(path: Path) -> dict[str, object]:
    "The parameters of a notebook with their defaults."
    [source] = parameter_cells(nbformat.read(path, as_version=4))
    body = ast.parse(source).body
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in body), f"more than assignments:\n{source}"
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body}


def run(path: Path, out: Path, cwd: Path = ROOT, **given):
    "Execute a notebook with papermill as a user would, from the root."
    return papermill.execute_notebook(
        path, out, parameters=given, cwd=cwd, kernel_name="python3", progress_bar=False, extra_arguments=["--log-level=ERROR"]
    )


# ---------------------------------------------------------------- parameters

@pytest.mark.parametrize("path", RUNS, **IDS)
def test_one_tagged_cell_with_a_comment_for_each_parameter(path):
    cells = parameter_cells(nbformat.read(path, as_version=4))
    assert len(cells) == 1, f"{path.name} has {len(cells)} cells tagged parameters"
    comments = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(cells[0]).readline)
                if token.type == tokenize.COMMENT and len(token.string.strip("# ")) > 3}
    bare = [ast.unparse(node) for node in ast.parse(cells[0]).body if not comments & set(range(node.lineno, node.end_lineno + 1))]
    assert not bare, f"{path.name}: no comment on {bare}"
    assert parameters(path)


def test_every_run_notebook_has_its_smallest_parameters():
    assert set(SMALLEST) == {path.stem for path in RUNS}
    for path in RUNS:
        assert set(SMALLEST[path.stem]) <= set(parameters(path))


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> str:
    "A small corpus folder."
    folder = tmp_path_factory.mktemp("texts")
    for name, n in SIZES.items():
        (folder / name).mkdir()
        lines = [json.dumps({"id": d.id, "text": d.text}) for d in sample_documents(name, n)]
        (folder / name / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory) -> str:
    "The folder of a small finished run, made by its notebook."
    folder = tmp_path_factory.mktemp("finished") / "small"
    given = SMALLEST["10_cpt"] | {"run_dir": str(folder), "corpus": texts}
    nb = run(ROOT / "nbs" / "10_cpt.ipynb", folder.parent / "10_cpt.ipynb", **given)
    assert [cell for cell in nb.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    return str(folder)


def test_continued_pretraining_runs_once_with_its_smallest_parameters(finished):
    results = json.loads((Path(finished) / "results.json").read_text())
    assert results["training"]["steps"] == 4 and results["scale"] == "tiny"
    assert results["recipe"]["d_model"] == SMALL_MODEL["d_model"]
    assert (Path(finished) / "figures" / "learning_curve.png").stat().st_size > 5_000


def test_learning_curves_runs_once_with_its_smallest_parameters(finished, tmp_path):
    path = ROOT / "nbs" / "13_learning_curves.ipynb"
    made = []
    for name in ("one", "two"):
        run(path, tmp_path / "out.ipynb", runs=finished, run_dir=str(tmp_path / name))
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert {"learning_curves.svg", "small-learning_curve.png", "small.json"} <= set(made[0])
    assert made[0] == made[1], "the same results must give the same bytes"


def test_results_run_twice_with_their_smallest_parameters(finished, tmp_path):
    path = ROOT / "nbs" / "41_results.ipynb"
    made = []
    for name in ("one", "two"):
        nb = run(path, tmp_path / "out.ipynb", runs=finished, run_dir=str(tmp_path / name))
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert set(made[0]) == {"tables.md", "tables.html", "tables.tex", "workflow.svg", "workflow.png", "memory.svg", "memory.png", "language.svg", "language.png"}
    assert made[0] == made[1], "the same results must give the same bytes"
    tables = made[0]["tables.md"].decode()
    assert "## Table A15." in tables and "BioMamba-tiny" in tables and "papermill nbs/10_cpt.ipynb 780m.ipynb -p scale 780m" in tables
    shown = "".join(output.data.get("text/markdown", "") for cell in nb.cells for output in cell.get("outputs", []) if "data" in output)
    assert "| Table 2 |" in shown and "0 of 30" in shown and "8.42" in shown


def test_mixture_ablation_runs_twice_with_its_smallest_parameters(texts, tmp_path):
    given = SMALLEST["11b_mixture"] | {"run_dir": str(tmp_path / "run"), "corpus": texts}
    nb = run(ROOT / "nbs" / "11b_mixture.ipynb", tmp_path / "out.ipynb", **given)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["mixtures"]) == 6 and results["seeds"] == [42] and results["base"]["test"]["documents"] == {"pubmed": 3, "c4": 3, "wikipedia": 3}
    assert results["proposal"]["shares"] not in [about["shares"] for about in results["mixtures"].values()]
    assert len(list((tmp_path / "run").glob("*/training.json"))) == 7 and len(list((tmp_path / "run").glob("*/test.json"))) == 8
    assert (tmp_path / "run" / "figures" / "frontier.png").stat().st_size > 5_000
    shown = "".join(output.data.get("text/markdown", "") for cell in nb.cells for output in cell.get("outputs", []) if "data" in output)
    assert "−9.8 %" in shown and "| Wikipedia only, 30% |" in shown
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*.json")}
    written = (tmp_path / "run" / "results.json").read_bytes()
    run(ROOT / "nbs" / "11b_mixture.ipynb", tmp_path / "again.ipynb", **given)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*.json")} == stamps and (tmp_path / "run" / "results.json").read_bytes() == written


def test_compare_runs_once_with_its_smallest_parameters(texts, tmp_path):
    given = SMALLEST["12_compare"] | {"run_dir": str(tmp_path / "compare"), "corpus": texts}
    nb = run(ROOT / "nbs" / "12_compare.ipynb", tmp_path / "out.ipynb", **given)
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert len(results["models"]) == 8 and all(name.endswith("(stand-in)") for name in results["models"])
    assert {about["documents"] for model in results["models"].values() for about in model["sets"].values()} == {3}
    assert (tmp_path / "compare" / "figures" / "bits_per_byte.png").stat().st_size > 5_000
    shown = "".join(output.data.get("text/markdown", "") for cell in nb.cells for output in cell.get("outputs", []) if "data" in output)
    assert "| BioGPT (stand-in) |" in shown and "15.09" in shown and "104.62" in shown


def test_memorization_runs_once_on_restricted_notes_and_leaves_no_text(tmp_path):
    notes = write_sample(tmp_path / "sample", documents=1, questions=1, notes=60) / "notes" / "discharge.csv"
    given = SMALLEST["33b_memorization"] | {"run_dir": str(tmp_path / "run"), "notes": str(notes)}
    run(ROOT / "nbs" / "33b_memorization.ipynb", tmp_path / "out.ipynb", **given)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["planted"] == {"planned": 8, "in_training_documents": 8}
    assert [len(e["bits"]) for e in results["audit"]["exposures"]] == [2, 2] and "MIMIC" in results["restricted"]
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700 and (tmp_path / "run" / "private" / "corpus").is_dir()
    lines = [line for row in csv.DictReader(notes.open()) for line in row["text"].splitlines() if len(line) > 60]
    outside = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and "private" not in p.parts] + [tmp_path / "out.ipynb"]
    assert len(lines) > 100 and not [p for p in outside if any(line.encode() in p.read_bytes() for line in lines)]
@pytest.fixture(scope="session")
def asked(tmp_path_factory) -> str:
    "Small sets of PubMedQA and BioASQ."
    folder = tmp_path_factory.mktemp("asked")
    records = dict(sample_questions("pubmedqa", 60))
    (folder / "ori_pqal.json").write_text(json.dumps(records))
    (folder / "test_ground_truth.json").write_text(json.dumps({i: r["final_decision"] for i, r in list(records.items())[::2]}))
    for b in range(2): (folder / f"{b + 8}B1_golden.json").write_text(json.dumps({"questions": [r for _, r in sample_questions("bioasq", 20, start=20 * b)]}))
    return str(folder)


def test_question_answering_runs_twice_with_its_smallest_parameters(finished, asked, tmp_path):
    given = SMALLEST["22_qa_runs"] | {"adapted": finished, "pubmedqa": asked, "bioasq": asked, "run_dir": str(tmp_path / "run")}
    run(ROOT / "nbs" / "22_qa_runs.ipynb", tmp_path / "out.ipynb", **given)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"as_published", "binary", "official", "bioasq"} <= set(results) and results["seeds"] == [42, 43]
    assert results["official"]["n"] == 30 and results["as_published"]["n"] == 12 and results["bioasq"]["by_batch"].keys() == {"9B1"}
    lines = [json.loads(line) for p in (tmp_path / "run").glob("*/predictions.jsonl") for line in p.read_text().splitlines()]
    trained = results["data"]["splits"]["three"]["training_answers"]
    assert len(lines) == 2 * 2 * (12 + results["binary"]["n"] + 20 + 30) and sum(trained.values()) < 30
    assert (tmp_path / "run" / "figures" / "calibration.png").stat().st_size > 5_000
    cards = sorted((tmp_path / "run").glob("*/model/README.md"))
    assert len(cards) == 8 and all("| PubMedQA, official, adapted |" in path.read_text() or "PubMedQA, official, adapted" in path.read_text() for path in cards)
    written = (tmp_path / "run" / "results.json").read_bytes()
    run(ROOT / "nbs" / "22_qa_runs.ipynb", tmp_path / "again.ipynb", **given)
    assert (tmp_path / "run" / "results.json").read_bytes() == written
@pytest.mark.slow
def test_clinical_runs_and_cases_run_once_with_their_smallest_parameters(finished, tmp_path):
    own = {"adapted": finished, "run_dir": str(tmp_path / "clinical")}
    for name in ("31_clinical_runs", "32_case_studies"):
        run(ROOT / "nbs" / f"{name}.ipynb", tmp_path / f"{name}.ipynb", **SMALLEST[name] | own)
    results = json.loads((tmp_path / "clinical" / "results.json").read_text())
    assert set(results["stages"]) == {"base", "adapted", "base+SFT", "adapted+SFT"} and results["restricted"] is None
    assert {path.name for path in (tmp_path / "clinical" / "figures").iterdir()} >= {"cases.html", "case-1.png", "case-2.svg"}


@pytest.mark.parametrize("path", RUNS, **IDS)
def test_a_misspelt_parameter_fails(path, tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        run(path, tmp_path / "out.ipynb", stepps=4)
    assert caught.value.ename == "UserError"
    assert "stepps" in caught.value.evalue


@pytest.mark.parametrize("path", RUNS, **IDS)
def test_the_last_line_of_papermill_is_the_sentence(path, tmp_path):
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-p", "stepps", "4", "-k", "python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("UserError: ") and "stepps" in last


# ---------------------------------------------------------------- stored outputs

def test_stored_outputs_belong_to_the_code(notebooks):
    problems = notebooks.check_problems(ROOT / "nbs")
    assert not problems, "\n".join(problems)


def stored(nb, folder: Path, name: str = "00_copy.ipynb") -> Path:
    nbformat.write(nb, folder / name)
    return folder / name


@pytest.fixture
def copy(notebooks):
    "A small notebook whose stored outputs are its own."
    code = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "2"})])
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A copy"), code])
    nb.metadata[notebooks.HASH_KEY] = notebooks.code_hash(nb)
    return nb


def test_prose_may_change(copy, notebooks, tmp_path):
    copy.cells[0].source = "# Another title"
    stored(copy, tmp_path)
    assert notebooks.check_problems(tmp_path) == []


def break_code(nb): nb.cells[1].source = "1 + 2"
def break_order(nb): nb.cells.insert(1, nbformat.v4.new_code_cell("0"))
def break_hash(nb): nb.metadata.clear()
def break_error(nb): nb.cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=["t"])]
def break_stderr(nb): nb.cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="w")]
def break_path(nb): nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="wrote " + "/ho" + "me/me/run\n")]


@pytest.mark.parametrize("change, says", [
    (break_code, "other code cells"), (break_order, "other code cells"), (break_hash, "other code cells"),
    (break_error, "is an error"), (break_stderr, "stderr"), (break_path, "path of the machine"),
])
def test_a_broken_copy_is_named(copy, notebooks, tmp_path, change, says):
    change(copy)
    stored(copy, tmp_path)
    [problem] = notebooks.check_problems(tmp_path)
    assert problem.startswith("00_copy.ipynb") and says in problem


def test_outputs_mends_a_broken_copy(copy, notebooks, tmp_path):
    break_code(copy)
    path = stored(copy, tmp_path)
    assert notebooks.outputs(tmp_path, []) == 0
    assert notebooks.check_problems(tmp_path) == notebooks.clean_problems(tmp_path) == []
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].data["text/plain"] == "3"


def test_outputs_leaves_a_notebook_that_fails(copy, notebooks, tmp_path):
    copy.cells[1].source = "1 / 0"
    path = stored(copy, tmp_path)
    before = path.read_bytes()
    assert notebooks.outputs(tmp_path, []) == 1
    assert path.read_bytes() == before


def test_tags_and_hash_survive_cleaning(copy, notebooks):
    copy.cells[1].metadata = {"tags": ["parameters"], "scrolled": True}
    copy.metadata["language_info"] = {"name": "python"}
    nb = nbformat.reads(notebooks.cleaned(nbformat.writes(copy)), as_version=4)
    assert nb.cells[1].metadata == {"tags": ["parameters"]}
    assert set(nb.metadata) == {notebooks.HASH_KEY}


# ---------------------------------------------------------------- README

def test_readme_is_written_from_the_front_page(notebooks, tmp_path):
    picture = nbformat.v4.new_output("display_data", {"image/png": "aWJt", "text/plain": "<Figure>"})
    table = nbformat.v4.new_output("execute_result", {"text/html": "<table>", "text/markdown": "|a|", "text/plain": "a"})
    nb = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell("# T\n[run](10_cpt.ipynb#Plan) ![c](../figures/c.svg) [web](https://a.b/c) [up](#T)"),
        nbformat.v4.new_code_cell("#| hide\nsecret = 1"),
        nbformat.v4.new_code_cell("#| echo: false\nshow()", outputs=[table]),
        nbformat.v4.new_code_cell("plot()", outputs=[picture]),
    ])
    text, pictures = notebooks.render_readme(stored(nb, tmp_path, "index.ipynb"))
    assert "[run](nbs/10_cpt.ipynb#Plan) ![c](figures/c.svg) [web](https://a.b/c) [up](#T)" in text
    assert "secret" not in text and "show()" not in text and "plot()" in text
    assert "|a|" in text and "<table>" not in text
    assert list(pictures) == ["figures/index_2_0.png"] and "](figures/index_2_0.png)" in text
    assert pictures["figures/index_2_0.png"] == b"ibm"


def test_a_stale_readme_is_named(notebooks, tmp_path, monkeypatch):
    page = {tmp_path / "README.md": "# now\n"}
    monkeypatch.setattr(notebooks, "readme_files", lambda: page)
    (tmp_path / "README.md").write_text("# then\n")
    assert len(notebooks.readme_problems()) == 1
    notebooks.readme()
    assert notebooks.readme_problems() == []
