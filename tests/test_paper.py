"The stored tables against the text of the paper, cell by cell."
import os
import re
from pathlib import Path

import pytest

from biomamba.paper import DISAGREEMENTS, SCALES, TABLES, Table, published, sources, table

# The start of a table's printed heading, and the printed columns that are stored.
PRINTED = {
    "1": ("Component | Source", (0, 2, 3)),
    "2": ("Model | PubMed PPL", (0, 1, 2, 3)),
    "3": ("Model | # Parameters | PubMed PPL", (0, 1, 2, 3, 4)),
    "9": ("Configuration | C4%", (0, 1, 2, 3, 5, 7)),
    "12": ("Model scale | Best validation loss", (0, 1, 2, 3)),
    "A1": ("Item | Version", (0, 1)),
    "A2": ("Parameter | Value", (0, 1)),
    "A3": ("Model scale | Batch per GPU", (0, 1, 2, 3, 4, 5, 6)),
    "A4": ("Model scale | Parameters", (0, 1, 2, 3, 4)),
}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    "The lines of the paper's text, the bars at both ends of a table's rows removed."
    name = os.environ.get("BIOMAMBA_PAPER")
    if not name:
        pytest.skip("set BIOMAMBA_PAPER to a text file of the paper to compare the tables with it")
    return [line.strip("| ") if line.startswith("| ") else "" for line in Path(name).read_text().splitlines()] + [""]


def printed_rows(lines, number) -> list[list[str]]:
    "The rows under one printed heading, without section rows, up to prose or the next heading."
    headings = tuple(heading for heading, _ in PRINTED.values())
    (start,) = [i for i, line in enumerate(lines) if line.startswith(PRINTED[number][0])]
    end = next(i for i, line in enumerate(lines) if i > start and (not line or line.startswith(headings)))
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[start + 1:end]]
    return [row for row in rows if len(row) > 1]


def as_printed(cell: str, stored):
    "A printed cell in the stored cell's type: the first number of it, or the text."
    if isinstance(stored, str):
        return cell
    return type(stored)(re.search(r"[\d.]+(e-?\d+)?", cell.replace(",", ""))[0])


def test_every_stored_table_is_compared():
    assert set(PRINTED) == set(TABLES)


@pytest.mark.parametrize("number", sorted(set(PRINTED) - {"1", "A2"}))
def test_cells(lines, number):
    rows, places = printed_rows(lines, number), PRINTED[number][1]
    assert len(rows) == len(table(number).rows)
    for printed, stored in zip(rows, table(number).rows):
        assert tuple(as_printed(printed[p], s) for p, s in zip(places, stored)) == stored


def test_composition(lines):
    for printed, stored in zip(printed_rows(lines, "1"), table(1).rows, strict=True):
        name, share, count = printed[0], printed[-2], printed[-1]
        assert (name, share, count) == (stored[0], f"{stored[1]}%", f"{stored[2]}K")


def test_shared_hyperparameters(lines):
    for printed, stored in zip(printed_rows(lines, "A2"), table("A2").rows, strict=True):
        text = printed[2] if printed[1] == "Enabled" else printed[1]
        assert (printed[0], as_printed(text, stored[1])) == stored[:2]


def test_changes_printed_in_table_9_follow_from_the_stored_perplexities(lines):
    base = table(9).rows[0]
    for printed, stored in zip(printed_rows(lines, "9")[1:], table(9).rows[1:], strict=True):
        for place, source in ((4, 3), (6, 4), (8, 5)):
            change = 100 * abs(stored[source] / base[source] - 1)
            assert abs(change - float(printed[place].rstrip("%"))) < 0.11


def test_learning_rates_of_the_largest_and_smallest_scale():
    assert (published("130m")["learning_rate"], published("2.7b")["learning_rate"]) == (1.5e-6, 2.0e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_each_number_has_a_source(scale):
    assert set(published(scale)) == set(sources())


def test_cells_are_escaped_in_html():
    page = Table("x", "a < b", ("name",), ("",), (("<i>",),))._repr_html_()
    assert "<i>" not in page and "a &lt; b" in page


@pytest.mark.parametrize("call, answer", [
    (lambda: published("8b"), "130m, 370m"), (lambda: published(130), "130m, 370m"),
    (lambda: table("4"), "1, 2, 3"), (lambda: sources("rate"), "learning_rate"),
    (lambda: table(2).column("pubmed"), "PubMed"), (lambda: table(2).row("x"), "BioMamba-2.7B")])
def test_a_wrong_name_is_answered_with_the_right_ones(call, answer):
    with pytest.raises(ValueError, match=answer):
        call()


def test_disagreements_cover_the_scheduler_and_the_learning_rate():
    assert {"schedule", "learning rate", "mixture"} <= set(DISAGREEMENTS.column("topic"))
