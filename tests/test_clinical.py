"Notes as tasks: no patient on both sides, no answer in a prompt, no text outside the private folder, nothing scored that was not written."
import csv
import json
import os
import random
import re
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import papermill
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from biomamba.checkpoints import save_model
from biomamba.clinical import LIMITS, SIDES, NoteSet, TARGETS, TASKS, Item, Limits, admission_and_discharge, discharge_item, load_notes, make_items, select_notes, side_of, synthetic_notes, without_copies
from biomamba.clinical_tuning import models_beside, open_clinical_run, score_stage, seeds_from
from biomamba.documents import NOTE_COLUMNS, note_document, read_mimic
from biomamba.guards import Hidden
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.records import Document
from biomamba.runs import UserError, mark_restricted, recipe, restricted
from biomamba.scoring import Answer, exact_rank_p, kept_answers, last_ids, rank_correlation, score_answers, write_public
from biomamba.sections import parse_sections
from biomamba.steps import train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MARKER = "Qzyvarrel"


def write_csv(path: Path, rows: list[dict], columns=NOTE_COLUMNS, encoding: str = "utf-8") -> Path:
    "Notes in MIMIC-IV-Note's columns."
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(i: int, text: str, subject: int | None = None) -> dict:
    return {"note_id": f"{10_000_000 + i}-DS-1", "subject_id": 10_000_000 + (i if subject is None else subject), "hadm_id": i, "note_type": "DS", "note_seq": 1, "text": text}


@pytest.fixture(scope="session")
def shaped(data, tmp_path_factory) -> Path:
    "The open notes that have sections of admission and of discharge, as a MIMIC-shaped CSV: three notes a patient."
    csv.field_size_limit(10**8)
    texts = []
    for path in sorted((data / "clinical").rglob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            texts += [r.get("transcription") or r.get("note") or "" for r in csv.DictReader(file)]
    kept = [t for t in texts if not isinstance(discharge_item(Document("x", t, "open", {"subject_id": "1"}), Limits()), str)]
    assert len(kept) > 300
    return write_csv(tmp_path_factory.mktemp("shaped") / "discharge.csv", [row(i, t, i // 3) for i, t in enumerate(kept)])


# ---------------------------------------------------------------- split

@pytest.mark.parametrize("seed", [42, 7])
def test_no_patient_and_no_note_on_two_sides(seed):
    chosen = load_notes(None, 200, seed=seed)
    for what in (lambda n: n.id, lambda n: n.meta["subject_id"], lambda n: n.text):
        sets = [{what(n) for n in chosen.notes[side]} for side in SIDES]
        assert sum(map(len, sets)) == len(set.union(*sets))
    assert all(side_of(n.meta["subject_id"], seed) == side for side in SIDES for n in chosen.notes[side])


def test_the_order_of_the_file_and_more_notes_change_no_side():
    notes = list(synthetic_notes(150))
    shuffled = random.Random(0).sample(notes, len(notes))
    some, all_ = select_notes(notes[:100]), select_notes(shuffled)
    for side in SIDES:
        assert {n.id for n in some.notes[side]} <= {n.id for n in all_.notes[side]}
        assert [n.id for n in all_.notes[side]] == [n.id for n in select_notes(notes).notes[side]]


def test_at_most_as_many_notes_are_kept_and_the_rest_is_counted():
    most = {"train": 20, "validation": 3, "test": 4}
    chosen = select_notes(synthetic_notes(150), most)
    assert {side: len(chosen.notes[side]) for side in SIDES} == most
    assert chosen.counts["more than needed"] == 150 - 27
    everything = select_notes(synthetic_notes(150))
    assert all(chosen.notes[side] == everything.notes[side][:n] for side, n in most.items())


def test_a_planted_near_duplicate_leaves_the_side_that_is_not_scored(shaped):
    notes = list(read_mimic(shaped))
    test = next(n for n in notes if side_of(n.meta["subject_id"]) == "test" and len(n.text) > 2000)
    stranger = next(str(p) for p in range(999) if side_of(str(p)) == "train")
    copy = replace(test, id="1-DS-1", text=test.text.replace("patient", "pt.", 1) + " End.", meta=test.meta | {"subject_id": stranger})
    before, after = without_copies(select_notes(notes)), without_copies(select_notes([copy, *notes]))
    assert after.counts["near-duplicate of another side"] == before.counts["near-duplicate of another side"] + 1
    assert copy.id not in {n.id for side in SIDES for n in after.notes[side]} and test.id in {n.id for n in after.notes["test"]}


def test_a_note_that_is_like_a_scored_one_goes_whatever_that_one_repeats(shaped):
    "Test notes are never removed, so one that repeats another test note still guards its own near copies."
    notes = list(read_mimic(shaped))
    test = next(n for n in notes if side_of(n.meta["subject_id"]) == "test" and len(n.text) > 2000)
    words, strangers = [f"w{i}" for i in range(400)], [next(str(p) for p in range(999) if side_of(str(p)) == side) for side in ("test", "test", "train")]
    text = lambda start: test.text[:300] + " " + " ".join(words[start : start + 300])
    chain = [replace(test, id=f"chain {i}", text=text(25 * i), meta=test.meta | {"subject_id": stranger}) for i, stranger in enumerate(strangers)]
    left = {n.id for side in SIDES for n in without_copies(NoteSet({"train": chain[2:], "validation": [], "test": chain[:2]}, Counter(), None)).notes[side]}
    assert left == {"chain 0", "chain 1"}


def test_blanks_around_a_patients_id_are_no_other_patient():
    notes = [note_document(dict.fromkeys(NOTE_COLUMNS, "1") | {"note_id": f"{i}", "subject_id": f"{blank}111{blank}"}) for i, blank in enumerate(("", " ", "\t"))]
    assert [n.meta["subject_id"] for n in notes] == ["111"] * 3


# ---------------------------------------------------------------- leaks

def test_no_target_in_the_prompt_of_any_open_note(shaped):
    items, counts = make_items(read_mimic(shaped), "discharge", Limits(None, None))
    assert len(items) > 300 and not counts
    for item in items:
        targets = [(s.start, s.end) for s in parse_sections(item.note) if s.name in TARGETS]
        assert not [1 for a, b in item.source for c, d in targets if a < d and c < b]
        assert item.context == "".join(item.note[a:b] for a, b in item.source)


FORMS = ["{}:", "{}", "IV. {}:", "\u200b{}\u2003:", "{} :", "  {}:", "# {}", "**{}**", "= {} =", "3. {}:", "{} (by problem):", "{} - see below"]


@pytest.mark.parametrize("name", [n for n in TARGETS if n not in ("Assessment", "Plan")])
@pytest.mark.parametrize("form", FORMS)
def test_a_marker_in_a_target_section_never_reaches_the_prompt(name, form):
    note = next(synthetic_notes(1, seed=5))
    for change in (str, str.upper, str.lower):
        planted = f"{form.format(change(name))}\n{MARKER}\nPhysical Exam:\n{MARKER}\nAllergies: {MARKER}\nLabs: {MARKER}\n"
        text = note.text.replace(f"{name}:\n", planted) if f"\n{name}:\n" in note.text else note.text.replace("Brief Hospital Course:\n", planted)
        item = discharge_item(replace(note, text=text), Limits(None, None))
        assert MARKER in text and MARKER not in item.context, (form, change)


LATE = ["DISCHARGE EXAM:", "Exam at discharge:", "Physical exam on discharge", "PE on day of discharge:", "On discharge:", "Discharge:", "discharge vitals:", "D/C exam", "Vitals prior to discharge:", "DISCHARGE PHYSICAL EXAMINATION"]
LATE_LABS = ["DISCHARGE LABS", "Labs at discharge:", "Labs on the day of discharge", "ON DISCHARGE", "D/C labs:", "Discharge: ", "discharge CBC:", "DISCHARGE Hgb-", "Labs prior to discharge", "Lab results at time of discharge:"]


@pytest.mark.parametrize("header, forms", [("DISCHARGE PHYSICAL EXAM:\n", LATE), ("DISCHARGE LABS:\n", LATE_LABS)], ids=["exam", "labs"])
def test_what_was_found_at_discharge_is_cut(header, forms):
    note = next(synthetic_notes(1, seed=6))
    for form in forms:
        text = note.text.replace(header, f"{form}\n{MARKER}\nHEENT: {MARKER}\nNEURO:\n{MARKER}\n")
        item = discharge_item(replace(note, text=text), Limits(None, None))
        assert MARKER in text and MARKER not in item.context, form
        assert "ADMISSION PHYSICAL EXAM" in item.context and "ADMISSION LABS" in item.context and "STUDIES" in item.context


TURNED = ["PHYSICAL EXAM - DISCHARGE:", "PHYSICAL EXAMINATION, DISCHARGE", "Physical Exam: Discharge", "EXAM (DISCHARGE):", "Exam/discharge:", "Vitals, discharge:", "VS DC:", "DCPE:", "Final exam:"]
TURNED_LABS = ["LABS (DISCHARGE):", "Labs - discharge", "LABS DISCHARGE", "LABS: DISCHARGE", "Labs, Discharge:", "**Labs [d/c]**", "Laboratory data, discharge:"]


@pytest.mark.parametrize("form", TURNED + TURNED_LABS)
def test_a_header_that_names_the_day_last_is_cut(form):
    note = next(synthetic_notes(1, seed=6))
    header, kept = ("DISCHARGE LABS:\n", "DISCHARGE PHYSICAL EXAM:\n") if form in TURNED_LABS else ("DISCHARGE PHYSICAL EXAM:\n", "DISCHARGE LABS:\n")
    text = note.text.replace(header, f"{form}\n{MARKER}\nHEENT: {MARKER}\n")
    item = discharge_item(replace(note, text=text), Limits(None, None))
    assert MARKER in text and MARKER not in item.context and kept in text
    assert "ADMISSION PHYSICAL EXAM" in item.context and "ADMISSION LABS" in item.context and "STUDIES" in item.context


@pytest.mark.parametrize("form", ["LABS: no discharge noted", "Data regarding discharge from the ear: none", "Labs and discharge planning were discussed"])
def test_a_line_that_only_speaks_of_a_discharge_is_kept(form):
    note = next(synthetic_notes(1, seed=6))
    item = discharge_item(replace(note, text=note.text.replace("DISCHARGE LABS:\n", f"{form}\n{MARKER}\n")), Limits(None, None))
    assert MARKER in item.context


@pytest.mark.parametrize("lines", ["\n" * 20_000, "***\n" * 20_000, "- -\n\t \n" * 10_000], ids=["blank", "stars", "dashes"])
def test_lines_without_a_word_cost_no_time_and_change_nothing(lines):
    note = next(synthetic_notes(1, seed=6))
    def shown(filling):
        text = note.text
        for header in ("DISCHARGE PHYSICAL EXAM:\n", "DISCHARGE LABS:\n"):
            assert header in text
            text = text.replace(header, filling + header)
        begin = time.perf_counter()
        source, _ = admission_and_discharge(text)
        return re.findall(r"\w+", "".join(text[a:b] for a, b in source)), time.perf_counter() - begin
    (plain, _), (filled, seconds) = shown(""), shown(lines)
    assert filled == plain and seconds < 20


def test_source_and_target_may_not_meet():
    with pytest.raises(AssertionError, match="must not meet"):
        Item("1", "1", "discharge", "abcdef", ((0, 4),), ((3, 6),))


# ---------------------------------------------------------------- bad input

def test_missing_columns_are_named(tmp_path):
    path = write_csv(tmp_path / "discharge.csv", [], columns=("note_id", "text"))
    with pytest.raises(UserError, match="subject_id"):
        load_notes(path)


def test_what_is_no_note_is_counted(tmp_path):
    good = [row(i, n.text, i) for i, n in enumerate(synthetic_notes(120))]
    bad = [row(500, ""), row(501, "  \n "), row(502, "\x01\x02\x03\x04 a"), row(503, "12 34"), good[3], row(504, "Chief Complaint:\n" + "Cough and nothing else. " * 20)]
    chosen = load_notes(write_csv(tmp_path / "discharge.csv", good + bad))
    assert [chosen.counts[why] for why in ("empty text", "binary", "no words", "duplicate note_id")] == [2, 1, 1, 1]
    assert chosen.restricted and {"10000504-DS-1"} & {n.id for side in SIDES for n in chosen.notes[side]}
    side = side_of("10000504")
    items, counts = make_items(chosen.notes[side], "discharge", LIMITS[side])
    assert counts == {"no discharge sections": 1} and len(items) == len(chosen.notes[side]) - 1


def test_another_encoding_is_refused_by_name(tmp_path):
    rows = [row(i, "Chief Complaint:\nFi\u00e8vre et c\u00e9phal\u00e9es. " * 9) for i in range(30)]
    for encoding, says in (("latin-1", "no valid UTF-8"), ("utf-16", "columns")):
        with pytest.raises(UserError, match=says):
            list(read_mimic(write_csv(tmp_path / "discharge.csv", rows, encoding=encoding)))


def test_a_note_of_five_megabytes_is_a_note(tmp_path):
    note = next(synthetic_notes(1))
    long = note.text.replace("CHRONIC ISSUES:", "CHRONIC ISSUES:\n" + "Stable on the floor, no events overnight.\n" * 120_000)
    assert len(long) > 5e6
    [read] = read_mimic(write_csv(tmp_path / "discharge.csv", [row(1, long)]))
    for task, make in TASKS.items():
        item = make(read, LIMITS["train"])
        assert len(item.context) <= 3000 and 50 <= len(item.reference) <= 2000, task


def test_too_few_patients_are_refused(tmp_path):
    path = write_csv(tmp_path / "discharge.csv", [row(i, n.text) for i, n in enumerate(synthetic_notes(2))])
    with pytest.raises(UserError, match="leaves no note for"):
        load_notes(path)


# ---------------------------------------------------------------- scoring

@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items(list(synthetic_notes(6)), "discharge", LIMITS["test"])[0]


@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer([n.text for n in synthetic_notes(20)], 500))


def test_answers_of_other_items_are_never_scored(items, tokenizer, tmp_path):
    answers = [Answer(i.id, "text", 1, "eos") for i in items]
    with pytest.raises(AssertionError, match="other items"):
        score_answers(items, answers[::-1], tokenizer)
    with pytest.raises(ValueError):
        score_answers(items, answers[:-1], tokenizer)
    kept_answers(tmp_path / "a.jsonl", items, lambda: answers, "model")
    calls = []
    kept_answers(tmp_path / "a.jsonl", [replace(items[0], target=items[0].target[:1]), *items[1:]], lambda: calls.append(1) or answers, "model")
    assert calls, "a changed reference needs new answers"


def test_an_error_while_writing_is_an_error(items, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        kept_answers(tmp_path / "a.jsonl", items, lambda: (_ for _ in ()).throw(RuntimeError("out of memory")), "model")
    assert not list(tmp_path.iterdir())


def test_nothing_shows_a_text_by_itself(items):
    from biomamba.note_tables import Case
    shown = [items[0], replace(items[0], note=MARKER * 99, source=((0, 9),), target=((9, 18),)), Answer("1", MARKER, 1, "eos"), Case("1", "discharge", MARKER, {"base": (MARKER, {})})]
    chosen = NoteSet({"train": [Document("Ann Other", MARKER, "x", {})], "validation": [], "test": []})
    assert repr(chosen) == "NoteSet(1 train, 0 validation, 0 test)"      # an executed notebook keeps it beside its table
    assert items[0].context[:30] not in repr(shown) and MARKER not in repr(shown) and "9 characters shown, 9 asked for" in repr(shown)


def test_an_error_on_restricted_notes_loses_its_words(tmp_path, monkeypatch):
    from biomamba import clinical
    path = write_csv(tmp_path / "discharge.csv", [row(i, n.text, i) for i, n in enumerate(synthetic_notes(120))])
    def fails(text):
        raise KeyError(text)
    monkeypatch.setattr(clinical, "unfit", fails)
    with pytest.raises(Hidden, match="KeyError at test_clinical.py") as caught:
        load_notes(path)
    assert "Chief Complaint" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(KeyError, match="Chief Complaint"):
        load_notes(None, 10)


def newborns(folder: Path, tokenizer) -> dict[str, Path]:
    "A base and an adapted model of no size."
    small = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=512)
    for seed, name in enumerate(("base", "adapted")):
        save_model(new_model(mamba2_config(small), seed=seed), folder / name, tokenizer)
    return {name: folder / name for name in ("base", "adapted")}


def test_a_restricted_model_makes_the_run_restricted(tokenizer, tmp_path):
    models = newborns(tmp_path, tokenizer)
    mark_restricted(tmp_path / "adapted", "ward 7")
    run = open_clinical_run(tmp_path / "run", **models, chosen=load_notes(None, 120), test_notes=3)
    assert run.reason == restricted(tmp_path / "run") == "ward 7" and (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["restricted"] == "ward 7"
    both = open_clinical_run(tmp_path / "both", **models, chosen=replace(load_notes(None, 120), restricted="ward 8"), test_notes=3)
    assert both.reason == restricted(tmp_path / "both") == "ward 8; ward 7"


def test_a_folder_of_somebody_is_neither_marked_nor_closed(tmp_path):
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home" / "thesis.tex").touch()
    chosen = replace(load_notes(None, 120), restricted="ward 7")
    with pytest.raises(UserError, match="holds thesis.tex"):
        open_clinical_run(tmp_path / "home", tmp_path, tmp_path, chosen, 3)
    assert restricted(tmp_path / "home") is None and (tmp_path / "home").stat().st_mode & 0o077


# ---------------------------------------------------------------- models beside, seeds, ranks

def test_changed_weights_in_the_same_folder_write_anew(tokenizer, tmp_path, monkeypatch):
    from biomamba import clinical_tuning
    run = open_clinical_run(tmp_path / "run", **newborns(tmp_path, tokenizer), chosen=load_notes(None, 120), test_notes=2)
    wrote = []
    def write(model, tokenizer, items, max_new_tokens):
        wrote.append(model)
        return [Answer(item.id, "text", 1, "eos") for item in items]
    monkeypatch.setattr(clinical_tuning, "open_public", lambda name: (name, tokenizer))
    monkeypatch.setattr(clinical_tuning, "write_public", write)
    folder = tmp_path / "public"
    folder.mkdir()
    for content, calls in ((b"1", 2), (b"1", 2), (b"2", 4)):
        (folder / "model.safetensors").write_bytes(content)
        score_stage(run, "public", folder, public=True)
        assert wrote == [str(folder)] * calls, "one call for each of two tasks, where something is new"
    for _ in range(2): score_stage(run, "hub", "some/model", public=True)
    assert wrote[4:] == ["some/model"] * 2, "a hub name stays its name"


def test_a_cut_prompt_keeps_the_tokens_it_begins_with(items):
    assert last_ids([2, 5, 6, 7], [2, 0], 4) == [2, 5, 6, 7] and last_ids([2, 5, 6, 7], [2, 0], 3) == [2, 6, 7]
    assert last_ids([2, 0, 5, 6, 7], [2, 0], 3) == [2, 0, 7] and last_ids([5, 6, 2, 7], [2], 2) == [2, 7]
    for room in (1, 0, -5):
        with pytest.raises(UserError, match=f"leaves {max(0, room)} tokens"):
            last_ids([2, 5, 6], [2], room)


class Beginning:
    "A tokenizer that puts a token of its own first, as BioGPT's does."
    all_special_ids = (2,)

    def __call__(self, text, **_): return self
    input_ids = property(lambda self: [2, *range(10, 500)])
    def decode(self, ids, **_): return "text"


def test_a_public_model_reads_its_first_token_and_the_end_of_the_prompt(items, monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)).eval()
    seen, plain = [], model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **given: seen.append(ids[0].tolist()) or plain(ids, **given))
    write_public(model, Beginning(), items[:1], max_new_tokens=8)
    assert seen == [[2, *range(500 - 55, 500)]]
    with pytest.raises(UserError, match="leaves 0 tokens"):
        write_public(model, Beginning(), items[:1], max_new_tokens=64)


def test_models_of_the_same_folder_name_are_told_apart(tmp_path):
    for name in ("a/x/model", "b/x/model", "c/b/x", "base/model", "tuned"): (tmp_path / name).mkdir(parents=True)
    one, two, three, base, tuned = (str(tmp_path / name) for name in ("a/x/model", "b/x/model", "c/b/x", "base/model", "tuned"))
    assert models_beside([one, two, tuned, one, "hub/x"]) == {"x": one, "b/x": two, "tuned": tuned, "hub/x": "hub/x"}
    assert models_beside([base]) == {f"{tmp_path.name}/base": base}, "a stage of ours has that name"
    with pytest.raises(UserError, match="called b/x"):
        models_beside([one, two, three])


@pytest.mark.parametrize("wrong", [[42, 42], "[1, 2, 1]", [True], [1, True], True, "true", 0, [], "three", [1.0]])
def test_a_seed_counts_once(wrong):
    with pytest.raises(UserError, match="each once"):
        seeds_from(wrong)


@pytest.mark.parametrize("values, p", [([0, 0, 0, 0, 0, 0.2], 0.333), ([0, 0, 0, 0, 0.1, 0.2], 0.067), ([0, 1, 2, 3, 4, 5], 0.003), ([1] * 6, 1.0)])
def test_the_exact_p_permutes_the_values_themselves(values, p):
    assert abs(exact_rank_p(range(6), values) - p) < 0.0005


# ---------------------------------------------------------------- the run, on open notes

def long_pieces(texts: list[str]) -> set[str]:
    "A piece of each text that no other has, in one line and long enough to be told from a template."
    pieces = Counter(p for t in texts for p in {p.strip() for p in re.split(r"[\n,]|(?<=\.)\s", t)} if len(p) > 40)
    return {p for p, n in pieces.items() if n == 1}


def stranger(folder: Path, tokenizer) -> str:
    "A public model of another kind, with its own tokenizer."
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_open_notes_run_through_and_no_text_gets_out(shaped, tmp_path, tokenizer):
    newborns(tmp_path, tokenizer)
    given = {"scale": "tiny", "base": str(tmp_path / "base"), "adapted": str(tmp_path / "adapted"), "notes": str(shaped), "test_notes": 3}
    run = tmp_path / "run"
    papermill.execute_notebook(ROOT / "nbs/31_clinical_runs.ipynb", run.parent / "31.ipynb", cwd=ROOT, kernel_name="python3", progress_bar=False,
        parameters=given | {"run_dir": str(run), "seeds": 1, "steps": 2, "answer": 200, "settings": 6, "tried_notes": 2, "compare": stranger(tmp_path / "stranger", tokenizer),
                            "overrides": {"max_tokens": 256, "sequences_per_step": 2, "evaluations": 1}})
    papermill.execute_notebook(ROOT / "nbs/32_case_studies.ipynb", run.parent / "32.ipynb", cwd=ROOT, kernel_name="python3", progress_bar=False, parameters=given | {"run_dir": str(run), "cases": 1})
    results = json.loads((run / "results.json").read_text())
    assert results["stages"].keys() == {"base", "adapted", "base+SFT", "adapted+SFT", "stranger"} and results["restricted"] == restricted(run)
    assert len(results["tried"]["settings"]) == 6 and set(results["tried"]["rank_correlation"]) == {"completion", "discharge"}
    assert "Data Use Agreement" in json.loads((run / "manifest.json").read_text())["restricted"]
    assert all("Data Use Agreement" in (run / "models" / f"{arm}-42" / "model" / "README.md").read_text() for arm in ("base", "adapted"))
    texts = [n.text for n in read_mimic(shaped)]
    answers = [json.loads(line)["text"] for path in (run / "private").glob("*.jsonl") for line in path.read_text().splitlines()[1:] if "text" in line]
    found = long_pieces(texts) | long_pieces(answers)
    begins = {p[:40] for p in [p.encode() for p in found] + [json.dumps(p)[1:-1].encode() for p in found]}
    holds = lambda data: any(data[i:i + 40] in begins for i in range(len(data) - 39))
    assert len(begins) > 3000 and holds(shaped.read_bytes()) and any(holds(p.read_bytes()) for p in (run / "private").glob("*.jsonl"))
    outside = [p for p in [*run.rglob("*"), *tmp_path.glob("*.ipynb")] if p.is_file() and "private" not in p.parts]
    assert len(outside) > 8 and not [str(p) for p in outside if holds(p.read_bytes())]
    assert list((run / "private/cases").glob("case-*.png")) and oct((run / "private").stat().st_mode)[-3:] == "700"
    assert all(not p.stat().st_mode & 0o077 for p in (run / "private").glob("*.jsonl")) or os.name != "posix"


@pytest.mark.parametrize("values", [[2.5, float("nan"), 2.3], [2.5, float("inf"), 2.3]])
def test_a_loss_that_is_not_finite_has_no_rank(values):
    for ranked in (rank_correlation, exact_rank_p):
        with pytest.raises(UserError, match=r"values\[1\] is (nan|inf)"): ranked(values, [1, 2, 3])
