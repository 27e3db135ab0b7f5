"The verbs for a clinician's desk: local, streamed, with the notice, and without a word of the note in any error."
import re
from pathlib import Path

import pytest

from biomamba import assist
from biomamba.checkpoints import save_model
from biomamba.cli import main
from biomamba.guards import Hidden
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.runs import recipe
from biomamba.sample import sample_notes
from biomamba.steps import train_tokenizer, wrap_tokenizer

MARKER = "Zyxquarvel"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A small model, and a note without its discharge sections."
    folder = tmp_path_factory.mktemp("assist")
    rows = list(sample_notes(12))
    tokenizer = wrap_tokenizer(train_tokenizer([row["text"] for row in rows], 400))
    save_model(new_model(mamba2_config(recipe("tiny", d_model=32, layers=1, vocabulary=len(tokenizer))), seed=0), folder / "model", tokenizer)
    admission = re.split(r"(?i)\n\W*brief hospital course", rows[0]["text"])[0]
    assert len(admission) < len(rows[0]["text"])
    (folder / "note.txt").write_text(admission.replace("History of Present Illness:\n", f"History of Present Illness:\n{MARKER} was seen.\n"))
    (folder / "bare.txt").write_text(f"{MARKER} was seen in the clinic and went home.")
    return folder


@pytest.mark.parametrize("verb", ["complete", "summarize"])
def test_a_verb_writes_the_notice_and_then_text(verb, place, capsys):
    before = sorted(place.rglob("*"))
    assert main([verb, str(place / "model"), str(place / "note.txt"), "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith(f"[{assist.REVIEW}]\n\n") and "clinician must review" in out.out and len(out.out) > len(assist.REVIEW) + 8
    assert MARKER not in out.err and sorted(place.rglob("*")) == before, "nothing is written"


def test_the_text_comes_piece_by_piece(place):
    pieces = assist.complete(str(place / "model"), str(place / "note.txt"), max_new_tokens=6)
    assert next(pieces).startswith("[A clinician must review") and len(list(pieces)) > 3


@pytest.mark.parametrize("verb, note, more, says", [
    ("summarize", "bare.txt", [], "no admission sections"), ("complete", "none.txt", [], "is no file"),
    ("complete", "note.txt", ["--max-new-tokens", "0"], "at least 1"), ("complete", "note.txt", ["--temperature", "-1"], "0 (the most likely token) or more"),
])
def test_a_mistake_is_a_sentence_without_the_note(verb, note, more, says, place, capsys):
    assert main([verb, str(place / "model"), str(place / note), *more]) == 1
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and MARKER not in out.out + out.err


def test_an_error_in_the_middle_loses_the_words_of_the_note(place, monkeypatch):
    def fails(item, tokenizer):
        raise ValueError(item.note)
    monkeypatch.setattr(assist, "prompt_tokens", fails)
    with pytest.raises(Hidden, match="ValueError at test_assist.py") as caught:
        list(assist.summarize(str(place / "model"), str(place / "note.txt")))
    assert MARKER not in str(caught.value)


def test_the_model_sees_the_admission_and_no_more_than_the_task_shows(place):
    text = (place / "note.txt").read_text().strip()
    asked, gone_on = assist.note_item(text, "discharge"), assist.note_item(text * 5, "completion")
    assert MARKER in asked.context and "____" not in asked.context
    assert len(gone_on.context) == min(4000, len(text * 5)) and (text * 5).endswith(gone_on.context)
