"The stored tables against the text of the paper, cell by cell."
import re

import pytest

from biomamba.paper import DISAGREEMENTS, SCALES, TABLES, Table, published, sources, table
from biomamba.paper_results import RESULTS, clinical_score, published_table, qa_score

# The start of a table's last printed heading line and which of the tables with that start it is; the printed columns that are stored.
PRINTED = {
    "1": ("Component | Source", 0, (0, 2, 3)),
    "2": ("Model | PubMed PPL", 0, (0, 1, 2, 3)),
    "3": ("Model | # Parameters | PubMed PPL", 0, (0, 1, 2, 3, 4)),
    "4": ("Model | R-1", 0, range(7)),
    "5": ("Source | Text", 0, (0, 2)),
    "6": ("Source | Text", 1, (0, 2, 3)),
    "7": ("Model | Architecture | Params", 0, range(9)),
    "8": ("Model | # Parameters | BioASQ", 0, range(6)),
    "9": ("Configuration | C4%", 0, (0, 1, 2, 3, 5, 7)),
    "10": ("Benchmark | Model", 0, range(6)),
    "11": ("Model | Mamba2 +SFT", 0, range(7)),
    "12": ("Model scale | Best validation loss", 0, (0, 1, 2, 3)),
    "A1": ("Item | Version", 0, (0, 1)),
    "A2": ("Parameter | Value", 0, (0, 1)),
    "A3": ("Model scale | Batch per GPU", 0, range(7)),
    "A4": ("Model scale | Parameters", 0, range(5)),
    "A5": ("Model | Public checkpoint", 0, (0, 1)),
    "A6": ("Model | Learning rate", 0, range(6)),
    "A7": ("Model | Stage", 0, range(4)),
    "A8": ("Model | Stage", 1, range(4)),
    "A9": ("Size | Batch/GPU", 0, range(6)),
    "A10": ("Size | Batch/GPU", 1, range(7)),
    "A11": ("Source | Text", 2, (0, 2)),
    "A12": ("Source | Text", 3, (0, 2, 3)),
    "A13": ("Source | Text", 4, (0, 2, 3)),
    "A14": ("Source | Text", 5, (0, 2, 3)),
    "A15": ("Capability | Mamba2", 0, range(4)),
}
STARTS = tuple({start for start, _, _ in PRINTED.values()})


@pytest.fixture(scope="module")
def lines(paper) -> list[str]:
    "The lines of the paper's text, the bars at both ends of a table's rows removed, and empty lines for what is no table."
    return [line.strip("| ") if line.startswith("| ") else "" for line in paper.read_text(encoding="utf-8").splitlines()] + [""]


def printed_rows(lines, number) -> list[list[str]]:
    "The rows under one printed heading, without section rows, up to prose or the next heading; a name that spans rows stands in each."
    start, place, _ = PRINTED[number]
    begin = [i for i, line in enumerate(lines) if line.startswith(start)][place]
    end = next(i for i, line in enumerate(lines) if i > begin and (not line or line.startswith(STARTS)))
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[begin + 1:end]]
    rows = [row for row in rows if len(row) > 1 and row[0] != "Reference"]
    if number in ("10", "A7", "A8"):
        rows = [row if len(row) == len(rows[0]) else [rows[i - 1][0], *row] for i, row in enumerate(rows)]
    return rows


def as_printed(cell: str, stored):
    "A printed cell in the stored cell's type: the first number of it, or the text."
    if isinstance(stored, str):
        return cell
    return type(stored)(re.search(r"-?[\d.]+(e-?\d+)?", cell.replace(",", ""))[0])


def test_every_stored_table_is_compared():
    assert set(PRINTED) == set(TABLES) | set(RESULTS)
    assert all(published_table(number).number == number for number in PRINTED)


def test_every_printed_table_is_stored(lines):
    "What is left when the stored tables' lines are taken away is numbered formulas and headings over headings."
    known = {i for number in PRINTED for i, line in enumerate(lines) if line.startswith(PRINTED[number][0])}
    blocks = [i for i, line in enumerate(lines) if line and not lines[i - 1] and i not in known]
    assert all(re.fullmatch(r"\(\d\)", lines[i]) or lines[i + 1].startswith("Model | ") for i in blocks)
    assert len(known) == len(PRINTED)


@pytest.mark.parametrize("number", sorted(set(PRINTED) - {"1", "A2", "A15"}))
def test_cells(lines, number):
    rows, places = printed_rows(lines, number), PRINTED[number][2]
    for printed, stored in zip(rows, published_table(number).rows, strict=True):
        assert tuple(as_printed(printed[p], s) for p, s in zip(places, stored, strict=True)) == stored


def test_composition(lines):
    for printed, stored in zip(printed_rows(lines, "1"), table(1).rows, strict=True):
        name, share, count = printed[0], printed[-2], printed[-1]
        assert (name, share, count) == (stored[0], f"{stored[1]}%", f"{stored[2]}K")


def test_shared_hyperparameters(lines):
    for printed, stored in zip(printed_rows(lines, "A2"), table("A2").rows, strict=True):
        text = printed[2] if printed[1] == "Enabled" else printed[1]
        assert (printed[0], as_printed(text, stored[1])) == stored[:2]


def test_words_of_the_capabilities(lines):
    for printed, stored in zip(printed_rows(lines, "A15"), published_table("A15").rows, strict=True):
        assert printed[0] == stored[0] and len(printed) == len(stored)
        assert all(word and word in cell.lower() for word, cell in zip(stored[1:], printed[1:]))


def test_changes_printed_in_table_9_follow_from_the_stored_perplexities(lines):
    base = table(9).rows[0]
    for printed, stored in zip(printed_rows(lines, "9")[1:], table(9).rows[1:], strict=True):
        for place, source in ((4, 3), (6, 4), (8, 5)):
            change = 100 * abs(stored[source] / base[source] - 1)
            assert abs(change - float(printed[place].rstrip("%"))) < 0.11


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("benchmark", ["BioASQ", "PubMedQA"])
def test_tables_that_repeat_a_score_agree(scale, benchmark):
    eight, eleven = table_row("8", f"BioMamba-{scale.upper()}"), table_row("11", scale.upper())
    assert eight[f"{benchmark} accuracy"] == eleven[f"{benchmark} adapted+sft"] == qa_score(benchmark, "accuracy", scale, "adapted+sft")
    assert eleven[f"{benchmark} gain"] == round(eleven[f"{benchmark} adapted+sft"] - eleven[f"{benchmark} base+sft"], 2)


def test_the_changes_that_table_9_prints_follow_to_a_tenth_of_a_point(paper):
    printed = {row[0]: [float(cell.rstrip("%")) for cell in row[4::2]]
               for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in paper.read_text(encoding="utf-8").splitlines()
                           if line.startswith("|")) if len(row) == 9 and row[0] in table(9).column("configuration")[1:]}
    assert len(printed) == 16 and "to a tenth of a point" in table(9).note
    base, off = table(9).rows[0][3:], 0
    for name, *_, a, b, c in table(9).rows[1:]:
        for value, before, change in zip((a, b, c), base, printed[name], strict=True):
            away = round(abs(round(100 * abs(value / before - 1), 1) - change), 1)
            off += away > 0
            assert away <= 0.1, (name, value, before, change)
    assert off == 6


def table_row(number: str, *names: str) -> dict:
    return published_table(number).row(*names)


def test_learning_rates_of_the_largest_and_smallest_scale():
    assert (published("130m")["learning_rate"], published("2.7b")["learning_rate"]) == (1.5e-6, 2.0e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_each_number_has_a_source(scale):
    assert set(published(scale)) == set(sources())


@pytest.mark.parametrize("one", (TABLES | RESULTS).values(), ids=lambda t: t.number)
def test_each_table_says_where_it_comes_from_and_shows_itself(one):
    assert one.source.startswith(f"Table {one.number},")
    perplexities = any(unit in ("PPL", "nats per token") for unit in one.units)
    assert one.measured_on or not perplexities
    assert one._repr_html_().count("<tr>") == len(one.rows) + 1
    assert one._repr_markdown_().count("\n| ") == len(one.rows) + 2


def test_cells_are_escaped_in_html():
    page = Table("x", "a < b", ("name",), ("",), (("<i>",),))._repr_html_()
    assert "<i>" not in page and "a &lt; b" in page


@pytest.mark.parametrize("call, answer", [
    (lambda: published("8b"), "130m, 370m"), (lambda: published(130), "130m, 370m"),
    (lambda: table("4"), "1, 2, 3.*published_table"), (lambda: published_table("A16"), "11, 12, A1"), (lambda: sources("rate"), "learning_rate"),
    (lambda: table(2).column("pubmed"), "PubMed"), (lambda: table(2).row("x"), "no row 'x'.*BioMamba-2.7B"),
    (lambda: table_row("10", "PubMedQA"), "2 rows 'PubMedQA'.*PubMedQA, BioMamba-130M"),
    (lambda: qa_score("MedQA", "accuracy", "130m", "base+sft"), "BioASQ, PubMedQA"),
    (lambda: qa_score("BioASQ", "accuracy", "130m", "base"), r"base\+sft, adapted\+sft"),
    (lambda: clinical_score("completion", "R-3", "130m", "base"), "R-1, R-2, R-L")])
def test_a_wrong_name_is_answered_with_the_right_ones(call, answer):
    with pytest.raises(ValueError, match=answer):
        call()


def test_disagreements_cover_the_scheduler_and_the_learning_rate():
    assert {"schedule", "learning rate", "mixture"} <= set(DISAGREEMENTS.column("topic"))
