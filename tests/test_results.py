"The paper's tables beside the runs: from folders to files, honest about scales, the same bytes again."
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from biomamba.beside import Line, difference, lines_for, shown
from biomamba.found import KINDS, find, runs_table
from biomamba.paper_results import published_table
from biomamba.pictures import language_figure, said, workflow_figure
from biomamba.recipe import deciding, recipe
from biomamba.report import find_runs, save_figure, sparkline
from biomamba.runs import UserError, mark_restricted
from biomamba.sheets import all_sheets, latex_text, results, sheet, write_sheets
from biomamba.statistics import Interval
from biomamba.task_tables import EVERY, beside, coverage, table_lines

ROOT = Path(__file__).resolve().parent.parent


def cpt_results(scale: str, ppl: float = 8.42, **changes) -> dict:
    figure = lambda value: {"ppl": value, "ci95": [value - 0.1, value + 0.1], "documents": 1000, "bits_per_byte": 1.0, "tokens": 10_000, "non_finite": 0, "window": None}
    change = lambda relative: {"relative": relative, "ci95": [relative - 0.01, relative + 0.01]}
    sources = ("pubmed", "c4", "wikipedia")
    return {"scale": scale, "seed": 42, "recipe": deciding(recipe(scale, **changes)), "small_source": dict.fromkeys(sources, False), "versions": {"commit": "a" * 40},
            "perplexity": {arm: {s: figure(ppl + shift) for s in sources} for arm, shift in (("base", 1.0), ("adapted", 0.0))}, "change": {s: change(-0.1) for s in sources},
            "training": {"steps": 10, "best_step": 9, "best_validation_loss": {"selection": 2.2, "pubmed": 2.1}}, "environment": {"gpu": "NVIDIA H100 80 GB HBM3", "torch": "2.13"}}


def write_run(folder: Path, results: dict, **files) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"results": results, **files}.items(): (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    write_run(tmp_path / "runs" / "130m", cpt_results("130m"), manifest={"mixture": {}, "sources": {"pubmed": {"origin": {"sample": "pubmed"}}}})
    write_run(tmp_path / "runs" / "short", cpt_results("130m", 9.5, steps=20))
    write_run(tmp_path / "runs" / "tiny", cpt_results("tiny", 7.5))
    write_run(tmp_path / "runs" / "odd", {"loss": 3})
    (tmp_path / "runs" / "unfinished").mkdir()
    return tmp_path / "runs"


def test_runs_are_told_by_what_they_found_and_not_by_their_names(runs):
    found = {run.name: run for run in find(f"{runs}/*")}
    assert {name: run.kind for name, run in found.items()} == {"130m": "cpt", "odd": "unknown", "short": "cpt", "tiny": "cpt"}
    rows = {row[0]: row for row in runs_table(list(found.values())).rows}
    assert rows["130m"][4] == "synthetic sample" and rows["short"][5] == "steps=20" and rows["odd"][1] == "unknown" and rows["tiny"][6] == "a" * 12


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    a, b, c = (write_run(tmp_path / name, {}) for name in ("a/tiny", "b/tiny", "c/b/tiny"))
    assert find_runs(f"{tmp_path}/a/tiny {tmp_path}/*/tiny") == {"tiny": a, "b/tiny": b}
    assert find_runs(f"{tmp_path}/b/* {tmp_path}/a/*") == {"tiny": b, "a/tiny": a}
    with pytest.raises(UserError, match="would both be called b/tiny"):
        find_runs(f"{tmp_path}/*/tiny {c}")


def test_every_run_notebook_that_leaves_results_is_a_kind():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "nbs").glob("*.ipynb")}
    notebooks = {name for name, text in texts.items() if "run.finish(" in text and "#| default_exp" not in text}
    assert len(notebooks) >= 4
    assert notebooks <= {notebook for notebook, _ in KINDS.values()}


def test_only_the_scale_itself_stands_beside_the_papers_figure(runs):
    rows = beside(2, find(f"{runs}/*")).rows
    beside_paper = {row[3] for row in rows if row[0] == "BioMamba-130M" and row[1] == "PubMed perplexity"}
    assert beside_paper == {"130m", "short (steps=20)"}
    toy = [row for row in rows if row[3] == "tiny"]
    assert toy and all(row[2] == "–" and row[5] == "not in this table" and "tiny" in row[0] for row in toy)
    assert all(row[4].startswith("papermill nbs/10_cpt.ipynb") for row in rows if row[3] == "–") and sum(row[3] == "–" for row in rows) == 24


def test_tiny_alone_fills_no_figure_of_language(runs):
    tiny = find(str(runs / "tiny"))
    filled = {row[0]: row[2] for row in coverage(tiny).rows}
    assert {filled[f"Table {n}"].split(" of ")[0] for n in ("1", "2", "3", "4", "5", "7", "8", "9", "10", "11", "12", "A3", "A4", "A6", "A7", "A8")} == {"0"}
    assert filled["Table 2"] == "0 of 30" and filled["Table 4"] == "0 of 72" and filled["Table 9"] == "0 of 51"


@pytest.mark.parametrize("number", EVERY)
def test_every_published_figure_has_its_line(number):
    "Counted from the paper's own table: each of its numbers stands in a line, with the run that is missing."
    lines, one = table_lines(number, []), published_table(number)
    assert lines and all(line.need and line.ours is None for line in lines if line.paper is not None)
    stored = [cell for row in one.rows for cell in row[1:] if isinstance(cell, (int, float))]
    typed = [line.paper for line in lines if isinstance(line.paper, (int, float))]
    missing = [cell for cell in stored if not any(abs(cell - value) < 1e-12 for value in typed)]
    gone = {"1": [100, 508], "9": [row[i] for row in one.rows for i in (1, 2)] if number == "9" else []}.get(number, [])
    assert [cell for cell in missing if cell not in gone] == [], number


def test_every_command_names_a_notebook_that_is_there_and_its_parameters():
    import ast

    import nbformat
    known = {}
    for path in (ROOT / "nbs").glob("*.ipynb"):
        tagged = [c.source for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
        known[path.name] = {t.id for source in tagged for node in ast.parse(source).body for t in node.targets}
    needs = {line.need for number in EVERY for line in table_lines(number, [])}
    checked = 0
    for need in needs:
        if not need.startswith("papermill"): continue
        name, given = re.match(r"papermill nbs/(\S+)", need)[1], set(re.findall(r"-p (\w+) ", need))
        if name == "11b_mixture.ipynb" and name not in known: continue     # another room's
        assert given <= known[name], need
        checked += 1
    assert checked > 15


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0.001, 10))
def test_the_difference_is_ours_minus_the_papers(ours, paper, half):
    text = difference(Line("r", "m", paper, "run", Interval(ours, ours - half, ours + half, n=7)))
    value, where = text.replace(",", "").replace("−", "-").split(" ")
    assert abs(float(value) - (ours - paper)) <= 0.0051 and where == ("inside" if ours - half <= paper <= ours + half else "outside")


def test_a_cell_shows_its_n_and_no_figure_is_lost():
    assert shown(Interval(8.42, 8.31, 8.53, n=1234)) == "8.42 [8.31, 8.53], n = 1,234" and shown(None) == "–"
    assert [line.run for line in lines_for("r", "m", 1.0, {"a": 1.0, "b": None, "c": 0}, "need")] == ["a", "c"], "a zero is a figure"


# ---------------------------------------------------------------- export

def cells_of_markdown(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]


def test_all_formats_hold_the_same_cells(runs):
    found = find(f"{runs}/*")
    grid = beside(2, found)
    rows = [list(grid.headings), *map(list, grid.rows)]
    assert cells_of_markdown(sheet({"": grid}, "markdown")) == rows
    tex = sheet({"": grid}, "latex")
    for row in rows: assert " & ".join(map(latex_text, row)) + r" \\" in tex
    page = sheet({"": grid}, "html", "T")
    assert page.count("<tr>") == len(rows) and page.startswith("<!doctype html>")
    assert not any("|" in cell for number in EVERY for row in beside(number, found).rows for cell in row), "a bar would break the Markdown"


def test_latex_has_only_what_it_can_print(runs):
    text = sheet(all_sheets(find(f"{runs}/*")), "latex")
    assert sorted({letter for letter in text if ord(letter) > 127}) == [], "every sign is ASCII or has a command"
    assert text.count(r"\begin{longtable}") == text.count(r"\end{longtable}") == 29
    for line in text.splitlines():
        if line.endswith(r"\\") and not line.startswith(r"\caption"): assert not re.search(r"(?<!\\)[#_%]", line), line


def test_the_same_results_give_the_same_bytes(runs, tmp_path):
    made = []
    for name in ("one", "two"):
        found = find(f"{runs}/*")
        write_sheets(all_sheets(found), tmp_path / name, "tables", "T")
        for title, figure in (("workflow", workflow_figure()), ("language", language_figure(found))): save_figure(figure, tmp_path / name, title)
        plt.close("all")
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1] and set(made[0]) == {"tables.md", "tables.html", "tables.tex", "workflow.svg", "workflow.png", "language.svg", "language.png"}


def test_a_restricted_run_says_so(runs):
    mark_restricted(runs / "130m", "notes of ward 7")
    assert [row[7] for row in runs_table(find(str(runs / "130m"))).rows] == ["notes of ward 7"]


def test_a_bad_request_is_one_sentence(runs, tmp_path):
    for call, says in ((lambda: results(runs=str(tmp_path / "none")), "no finished run"), (lambda: results(runs=f"{runs}/*", table="99"), "no table '99'"), (lambda: results(runs=f"{runs}/*", format="pdf"), "pdf")):
        with pytest.raises(UserError, match=says): call()


# ---------------------------------------------------------------- pictures

def test_the_title_says_what_the_intervals_say():
    rows = {"a": {"pubmed": Interval(-5, -6, -4)}, "b": {"pubmed": Interval(-1, -2, 1)}}
    assert said(rows, "pubmed") == "PubMed falls in 1 of 2"
    assert said(rows | {"c": {"pubmed": Interval(5, 4, 6)}}, "pubmed") == "PubMed rises in 1 and falls in 1 of 3"


def test_series_differ_in_grey(tmp_path, runs):
    "Marks have different shapes, so that they can be told apart where colours are not."
    from biomamba.report import LOOKS
    assert len({LOOKS[s]["marker"] for s in ("pubmed", "c4", "wikipedia")}) == 3
    grey = lambda colour: sum(w * int(colour[i:i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))
    assert len({round(grey(LOOKS[s]["color"]) / 12) for s in ("pubmed", "c4", "wikipedia")}) >= 2
    path = save_figure(language_figure(find(f"{runs}/*")), tmp_path, "language")[1]
    plt.close("all")
    with Image.open(path) as picture: assert picture.size[0] > 800


@pytest.mark.parametrize("values, says", [([1.0, float("nan"), 2.0], r"values\[1\] is nan"), ([], "a curve of no values was asked for; at least one is accepted")])
def test_a_curve_of_what_is_no_number_is_refused(values, says):
    with pytest.raises(UserError, match=says): sparkline(values)
