"Perplexity: one number for any packing, any cut and any neighbour; surprisal is the same number taken apart."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba.mamba2 import mamba2_config, new_model
from biomamba.perplexity import Scores, change, document_losses, perplexity, score
from biomamba.runs import UserError, recipe
from biomamba.steps import train_tokenizer, wrap_tokenizer
from biomamba.surprisal import cells_of, sections_of, surprisal

SMALL = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=300)


@pytest.fixture(scope="module")
def model():
    made = new_model(mamba2_config(SMALL), seed=3).eval()
    with torch.no_grad():
        made.backbone.embeddings.weight.mul_(10)
    return made


def reference(model, documents) -> float:
    "Nats of all tokens, one document after the other, from plain logits."
    nats = 0
    for document in documents:
        ids = torch.tensor([[0, *document]])
        with torch.no_grad():
            nats -= model(ids[:, :-1]).logits.double().log_softmax(-1)[0].gather(1, ids[0, 1:, None]).sum().item()
    return nats


def with_sizes(max_tokens: int, micro_batch_tokens: int):
    return recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=300, max_tokens=max_tokens, micro_batch_tokens=micro_batch_tokens)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=7), row=st.integers(1, 120), most=st.integers(1, 200), seed=st.integers(0, 99))
def test_no_packing_and_no_cut_changes_the_number(model, lengths, row, most, seed):
    documents = [np.random.RandomState(seed + i).randint(2, 300, n) for i, n in enumerate(lengths)]
    found = score(model, documents, with_sizes(row, most))
    assert math.isclose(found.nats.sum(), reference(model, documents), rel_tol=1e-5)
    assert found.tokens.tolist() == lengths


def test_a_window_scores_the_first_tokens_and_knows_the_bytes_of_what_it_did_not_cut(model):
    class Documents(list):
        bytes = np.array([70, 40])
    documents = Documents([np.arange(2, 52), np.arange(2, 22)])
    found = score(model, documents, SMALL, window=20)
    assert math.isclose(found.nats.sum(), reference(model, [d[:20] for d in documents]), rel_tol=1e-5)
    assert found.bytes.tolist() == [0, 40] and perplexity(found).bits_per_byte is None
    assert "first 20 tokens" in repr(perplexity(found)) and "whole documents" in repr(perplexity(score(model, documents, SMALL)))


def test_a_document_without_a_finite_loss_spoils_no_neighbour(model):
    def forward(input_ids, **options):
        seen = model.backbone.embeddings(input_ids).masked_fill((input_ids == 5)[..., None], math.nan)
        return model(inputs_embeds=seen, **options)
    spoiled = type("Spoiled", (torch.nn.Module,), {"forward": lambda self, input_ids, **o: forward(input_ids, **o)})()
    spoiled.inner = model
    documents = [np.full(9, 7), np.array([7, 5, 7]), np.full(6, 8), np.full(4, 9)]
    found = score(spoiled, documents, SMALL)
    assert found.finite.tolist() == [True, False, True, True]
    assert np.allclose(found.nats[[0, 2, 3]], score(model, documents, SMALL).nats[[0, 2, 3]])
    shown = perplexity(found)
    assert (shown.documents, shown.non_finite) == (3, 1) and "1 without a finite loss left out" in repr(shown)
    assert change(found, score(model, documents, SMALL)).non_finite == 1


def test_too_few_finite_documents_are_a_sentence():
    one = Scores(np.array([1.0, math.inf]), np.array([2, 2]), np.array([4, 4]))
    with pytest.raises(UserError, match="1 of 2 documents have a finite loss"):
        perplexity(one)


def test_training_mode_is_given_back(model):
    model.train()
    score(model, [np.arange(2, 9)], SMALL)
    assert model.training
    model.eval()


# ---------------------------------------------------------------- surprisal

@pytest.fixture(scope="module")
def tokenizer():
    return wrap_tokenizer(train_tokenizer(["Aspirin relieves pain in adults. We asked whether it does so in children."] * 3, 290))


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_cells_are_the_text_and_every_token_is_in_one(tokenizer, text):
    ids, cells = cells_of(text, tokenizer)
    assert "".join(shown for shown, _ in cells) == text
    assert sum(n for _, n in cells) == len(ids) and all(shown for shown, _ in cells)
    assert tokenizer.decode(ids) == text


def test_the_bits_of_a_text_are_its_loss(model, tokenizer):
    other = new_model(mamba2_config(SMALL), seed=4).eval()
    text = "AIM: β-blockers.\nRESULTS: None <b></b>& \n\n🙂."
    s = surprisal(text, model, other, tokenizer, piece=7)
    ids = cells_of(text, tokenizer)[0]
    assert math.isclose(s.base.sum() * math.log(2), document_losses(model, ids, SMALL).sum(), rel_tol=1e-6)
    assert math.isclose(s.adapted.sum() * math.log(2), document_losses(other, ids, SMALL).sum(), rel_tol=1e-6)
    page = s._repr_html_()
    assert all(page.count(e) >= n for e, n in (("&lt;", 2), ("&gt;", 2), ("&amp;", 1))) and "<b>" not in page and [name for name, _ in s.sections] == ["AIM", "RESULTS"]


def test_a_note_and_a_page_have_sections():
    assert sections_of("Allergies:\nnone\n\nSocial History:\nLives: alone") == [("Allergies", 0), ("Social History", 17)]
    assert [name for name, _ in sections_of("One two three four five.\n\nSix.")] == ["One two three four …", "Six."]
