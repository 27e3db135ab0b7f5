"Canaries and passages: what an audit counts, against counting by hand."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba.privacy import DIGITS, Canary, Extraction, exposure_bits, lines_of_form, make_canaries, more_than, passages, plant, planted, template
from biomamba.records import Document
from biomamba.runs import UserError


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.lists(st.integers(0, 50), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_exposure_is_the_rank_counted_by_hand(losses, references):
    bits = exposure_bits(np.array(losses, float), np.array(references, float))
    ranks = [1 + sum(other <= loss for other in references) for loss in losses]
    assert np.allclose(bits, np.log2((len(references) + 1) / np.array(ranks)))
    assert (bits >= -1e-12).all() and (bits <= np.log2(len(references) + 1) + 1e-12).all()


@pytest.mark.parametrize("losses, references, says", [([1.0, np.nan], [2.0], r"losses\[1\] is nan"), ([1.0], [np.inf, 2.0], r"references\[0\] is inf")])
def test_a_loss_that_is_not_finite_has_no_exposure(losses, references, says):
    with pytest.raises(UserError, match=says): exposure_bits(np.array(losses), np.array(references))


def test_canaries_differ_from_each_other_and_from_other_seeds():
    lines = lines_of_form(500, 0)
    assert len(set(lines)) == 500 and all(sum(c.isdigit() for c in line) == DIGITS for line in lines)
    assert not set(lines) & set(lines_of_form(500, 1))


def test_a_canary_stands_in_as_many_documents_as_it_says():
    documents = [Document(str(i), f"Line one of {i}.\nLine two.\n\nLine three.", "notes") for i in range(30)]
    canaries = make_canaries((0, 1, 7, 30), each=3, seed=5)
    made = plant(documents, canaries, seed=2)
    for canary in canaries:
        holding = [d for d in made if canary.text in d.text.split("\n")]
        assert len(holding) == canary.repetitions == planted((d.text for d in made), canaries)[canary.text]
    assert all(d.text.split("\n")[0] == f"Line one of {d.id}." for d in made), "never first"
    assert plant(documents, canaries, seed=3) != made


@pytest.mark.parametrize("repetitions, each, says", [((), 1, "whole numbers"), ((1.5,), 1, "whole numbers"), ((True,), 1, "whole numbers"), ((-1,), 1, "whole numbers"), ((1,), 0, "each=0")])
def test_canaries_that_cannot_be_made(repetitions, each, says):
    with pytest.raises(UserError, match=says):
        make_canaries(repetitions, each)


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_template_is_what_another_patient_has(seed, prefix, length):
    rng = np.random.default_rng(seed)
    notes = [rng.integers(0, 4, size=rng.integers(0, 25)) for _ in range(6)]
    patients = [str(rng.integers(0, 3)) for _ in notes]
    places = passages(notes, patients, prefix=prefix, length=length, each=2, seed=seed)
    text = lambda ids: "".join(map(str, ids))
    for place, common in zip(places, template(places, notes, patients)):
        others = [text(ids) for ids, patient in zip(notes, patients) if patient != place.patient]
        assert common == (any(text(place.continuation) in other for other in others) or text(place.continuation) in text(place.prefix))
        assert any(text(place.prefix + place.continuation) in text(ids) for ids, patient in zip(notes, patients) if patient == place.patient)


def test_short_notes_have_no_passage():
    assert passages([np.arange(47), np.arange(48)], ["a", "b"], prefix=32, length=16, each=3) == [
        p for p in passages([np.arange(48)], ["b"], prefix=32, length=16, each=3, seed=9)]


def test_the_test_of_a_difference_knows_none():
    even = Extraction("training", 20, 5, 20, 5), Extraction("held out", 20, 5, 20, 5)
    assert more_than(*even) > 0.5 and more_than(Extraction("training", 9, 0, 9, 0), even[1]) == 1
    assert Extraction("training", 3, 3, 0, 0).share.high == 1 and Canary("x", 1).repetitions == 1
