"Sections of notes: nothing lost, headers found where people say they are."
import csv
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba.sample import sample_notes
from biomamba.sections import PARTS, line_spans, parse_sections

LABELS = json.loads((Path(__file__).parent / "headers.json").read_text(encoding="utf-8"))
# What was measured when the labels were made; see 30a_sections. Set: (least recall, least precision, least share of right names).
MEASURED = {"tune": (1.0, 1.0, 1.0), "score": (1.0, 1.0, 1.0), "later": (0.99, 0.96, 0.97)}


@pytest.fixture(scope="session")
def open_notes(data) -> dict[tuple[str, str], str]:
    "The open notes by source and id, as their files have them."
    csv.field_size_limit(10**8)
    found = {}
    for path in [data / "clinical" / "mtsamples.csv", *sorted((data / "clinical" / "aci-bench").glob("*.csv"))]:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = ("mtsamples", row["note_id"]) if "transcription" in row else ("aci-bench", row["encounter_id"])
                found[key] = row["transcription" if "transcription" in row else "note"]
    return found


def joined(note: str) -> str:
    return "".join(note[s.start:s.end] for s in parse_sections(note))


def test_the_labels_hold_offsets_and_no_text():
    for note in LABELS["notes"]:
        assert set(note) == {"source", "id", "sha256", "set", "headers"}
        assert all(isinstance(a, int) and a < b and (name is None or name in PARTS) for a, b, name in note["headers"])
    sizes = {name: sum(note["set"] == name for note in LABELS["notes"]) for name in MEASURED}
    assert sizes == {"tune": 40, "score": 20, "later": 20}


@pytest.mark.parametrize("which", MEASURED)
def test_headers_are_found(open_notes, which):
    right = found = labelled = named = wanted = 0
    for label in (note for note in LABELS["notes"] if note["set"] == which):
        text = open_notes[label["source"], label["id"]]
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == label["sha256"], "the labels belong to other texts"
        want = {(a, b): name for a, b, name in label["headers"]}
        got = {s.header: s.name for s in parse_sections(text) if s.name}
        right, found, labelled = right + len(want.keys() & got.keys()), found + len(got), labelled + len(want)
        named += sum(got.get(place) == name for place, name in want.items() if name)
        wanted += sum(name is not None for name in want.values())
    print(f"{which}: recall {right}/{labelled}, precision {right}/{found}, names {named}/{wanted}")
    recall, precision, names = MEASURED[which]
    assert right >= recall * labelled and right >= precision * found and named >= names * wanted


def test_no_open_note_loses_a_character(open_notes):
    assert len(open_notes) > 1000
    for text in open_notes.values():
        assert joined(text) == text
        assert joined(text.replace(",", "\n")) == text.replace(",", "\n")


PIECES = st.sampled_from(["Chief Complaint:", "PLAN", "brief hospital course", "\n", "\r\n", " ", ",", "word ", "LABS:", "1. ", "\u00a0", "：", "Ω", "\t", "___", "HEENT: "])


@given(st.lists(PIECES | st.text(max_size=8), max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_tiled(text):
    sections = parse_sections(text)
    assert joined(text) == text
    assert all(s.start <= s.header[0] <= s.header[1] <= s.body <= s.end and s.start < s.end for s in sections if s.name)


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title], ids=lambda change: change.__name__)
@pytest.mark.parametrize("colon", [":", " :", ""])
def test_the_template_in_any_case_with_and_without_colon(change, colon):
    note = next(sample_notes(1, seed=3))["text"]
    names = [s.name for s in parse_sections(note)]
    lines = [change(line.strip().rstrip(":")) + colon if line.strip().rstrip(":") in PARTS else line for line in note.split("\n")]
    assert [s.name for s in parse_sections("\n".join(lines))] == names


def test_line_ends_of_other_systems():
    note = next(sample_notes(1, seed=4))["text"]
    names = [s.name for s in parse_sections(note)]
    for end in ("\r\n", "\r"):
        assert [s.name for s in parse_sections(note.replace("\n", end))] == names


def test_a_name_inside_a_line_opens_nothing():
    for line in ("He has no allergies: none.", "Medications on admission were continued", "see Discharge Diagnosis: below", "Physical exam revealed rales."):
        assert [s.name for s in parse_sections(f"CHIEF COMPLAINT:\nCough.\n{line}\n")] == ["Chief Complaint"], line


def test_five_megabytes():
    note = next(sample_notes(1))["text"].replace("CHRONIC ISSUES:", "CHRONIC ISSUES:\n" + "Stable. Labs: WBC-5.5, plan: rest.\n" * 140_000)
    assert len(note) > 4.9e6 and joined(note) == note
    assert len(list(line_spans(note))) > 140_000 and len(parse_sections(note)) == 20
    flat = "PLAN: , Rest, and more rest.," * 180_000
    assert joined(flat) == flat and len(flat) > 5e6
