"Packed, padded, carried, shared out: the same documents, the same loss, the same gradient."
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biomamba.corpus import with_ends
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.optimizer_step import Carried, loss_of
from biomamba.packing import best_fit, carried_batches, deal, fill, long_document_counts, micro_batches, padded_batches, step_batches, stream_batches
from biomamba.recipe import recipe

ROOT = Path(__file__).resolve().parent.parent
SMALL = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400, max_tokens=128)


def made(lengths, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(2, 400, size=n + 1) for n in lengths]


def loss_and_gradients(batches, tokens, dtype=torch.float32):
    "Of the token mean of a step, summed over micro-batches."
    model, found, carried = new_model(mamba2_config(SMALL), seed=3).to(dtype), 0.0, None
    for i, batch in enumerate(batches):
        if not batch.carried: carried = Carried() if i + 1 < len(batches) and batches[i + 1].carried else None
        loss = loss_of(model, batch, carried) / tokens
        loss.backward()
        found += loss.item()
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(one, other):
    assert abs(one[0] - other[0]) < 1e-5
    for name, grad in one[1].items():
        assert (grad - other[1][name]).abs().max() <= 1e-5 * grad.abs().max() + 1e-11, name     # of a parameter's own largest: those of dt_bias are 1e-6


LENGTHS = [[1, 2, 40, 128, 127, 5, 5, 90], list(range(1, 30)), [128] * 3, [1]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_packed_step_equals_the_padded_one(lengths):
    sequences = made(lengths)
    padded = loss_and_gradients([fill(sequences, [[i] for i in range(len(sequences))])], sum(lengths))
    for micro in (128, 256, 4096):
        assert_equal(padded, loss_and_gradients(micro_batches(sequences, 128, micro), sum(lengths)))
        assert_equal(padded, loss_and_gradients(padded_batches(sequences, 128, micro), sum(lengths)))


def test_documents_of_one_to_1024_tokens_over_micro_batches_and_devices():
    lengths = [1, 2, 3, 1024, 1023, 700, 324, 300, 289, 64, 63, 257, 256, 255, 511, 1, 17]
    sequences = made(lengths)
    padded = loss_and_gradients(padded_batches(sequences, 1024, 4096), sum(lengths))
    for micro, processes in ((8192, 1), (2048, 1), (1024, 3), (2048, 4)):
        batches = [b for p in range(processes) for b in micro_batches(sequences, 1024, micro, p, processes)]
        assert_equal(padded, loss_and_gradients(batches, sum(lengths)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 5), st.sampled_from([64, 200, 1000]),
       st.sampled_from([micro_batches, padded_batches, stream_batches]))
def test_every_layout_trains_each_target_once(lengths, processes, micro, layout):
    sequences = [np.arange(n + 1) + 1000 * i for i, n in enumerate(lengths)]
    shared = [layout(sequences, 200, micro, p, processes) for p in range(processes)]
    assert len({len(mine) for mine in shared}) == 1             # as many micro-batches everywhere
    batches = [b for mine in shared for b in mine]
    aims = np.concatenate([b.targets[b.targets >= 0].numpy() for b in batches])
    assert sorted(aims) == sorted(np.concatenate([s[1:] for s in sequences])) and sum(b.documents for b in batches) == len(lengths)
    assert all(b.input_ids.numel() <= max(micro, 200) for b in batches)
    inner = [(b.targets == b.input_ids + 1)[b.targets >= 0].all() for b in batches if b.tokens]
    assert all(inner)                                           # each id is asked for its own successor


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1024), min_size=1, max_size=100), st.integers(1, 8))
def test_processes_get_the_same_tokens_but_for_one_document(lengths, processes):
    loads = [sum(lengths[i] for i in mine) for mine in deal(lengths, processes)]
    assert sum(loads) == sum(lengths) and max(loads) - min(loads) <= max(lengths)


def test_micro_batches_of_a_step_are_balanced():
    lengths = np.random.RandomState(1).randint(100, 500, 256)
    tokens = [[b.tokens for b in micro_batches(made(lengths), 1024, 8192, p, 4)] for p in range(4)]
    assert max(map(sum, tokens)) - min(map(sum, tokens)) <= 100     # devices
    assert all(max(mine) - min(mine) <= 1024 for mine in tokens)    # micro-batches of a device, a row at most


def test_nothing_leaks_from_a_neighbour():
    sequences, model = made([60, 60]), new_model(mamba2_config(SMALL), seed=0)
    changed = [sequences[0].copy(), sequences[1]]
    changed[0][:-1] = 7
    of = lambda batch: model(input_ids=batch.input_ids, seq_idx=batch.seq_idx, targets=batch.targets, reduction="none").loss[0, 60:120]
    apart = [of(micro_batches(s, 128, 128)[0]) for s in (sequences, changed)]
    joined = [of(stream_batches(s, 128, 128)[0]) for s in (sequences, changed)]
    assert torch.equal(*apart) and not torch.allclose(*joined)


def test_a_carried_document_has_the_loss_of_the_whole_one():
    sequences = made([700, 300, 129])
    loss = lambda batches: loss_and_gradients(batches, 1, torch.float64)[0]
    whole = sum(loss([fill([s], [[0]])]) for s in sequences)
    for micro in (128, 256, 512):
        assert loss(carried_batches(sequences, 128, micro)) == pytest.approx(whole, rel=1e-12)
    forgetful = [dataclasses.replace(b, carried=False) for b in carried_batches(sequences, 128, 512)]
    assert loss(forgetful) != pytest.approx(whole, rel=1e-7)


def test_a_carried_step_mixes_long_and_short_documents():
    r = dataclasses.replace(SMALL, long_documents="carry", sequences_per_step=5, micro_batch_tokens=256)
    sequences = made([700, 30, 129, 100, 128])
    for processes in (1, 2, 3):
        shared = [step_batches(sequences, r, 0, p, processes) for p in range(processes)]
        assert len({len(mine) for mine in shared}) == 1
        assert sum(b.tokens for mine in shared for b in mine) == 700 + 30 + 129 + 100 + 128
        assert sum(b.documents for mine in shared for b in mine) == 5
    assert max(b.input_ids.numel() for mine in shared for b in mine) <= 256


def test_long_documents_are_counted_either_way():
    targets = [100, 128, 129, 500]
    assert long_document_counts(targets, dataclasses.replace(SMALL, long_documents="truncate")) == \
        {"policy": "truncate", "documents": 4, "longer": 2, "tokens_cut": 1 + 372}
    assert long_document_counts(targets, dataclasses.replace(SMALL, long_documents="carry"))["tokens_cut"] == 0


# ---------------------------------------------------------------- real abstracts

@pytest.fixture(scope="module")
def abstracts(data):
    "The real abstracts as the paper reads them: title and abstract, between two ends of text."
    from tokenizers import Tokenizer
    records = [json.loads(line) for line in (data / "pubmed" / "abstracts.jsonl").open()]
    encoded = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json")).encode_batch_fast([f"{r['title']}\n{r['abstract']}" for r in records], add_special_tokens=False)
    return [with_ends(np.array(e.ids))[:1025] for e in encoded]


def test_rows_of_real_abstracts_are_full(abstracts):
    assert len(abstracts) == 3000
    r = recipe("130m", sequences=None, device_batch=1)
    steps = [step_batches(abstracts, r, s) for s in range(11)]                      # 256 documents a step
    whole = [sum(b.tokens for b in step) / (1024 * sum(len(b.input_ids) for b in step)) for step in steps]
    assert min(whole) >= 0.97
    rows = best_fit([len(s) - 1 for s in abstracts], 1024)
    assert sum(len(s) - 1 for s in abstracts) / (1024 * len(rows)) >= 0.99


def test_the_papers_batches_of_real_abstracts_are_mostly_padding(abstracts):
    batches = step_batches(abstracts, recipe("130m", padding="paper", device_batch=32), 0)
    assert [tuple(b.input_ids.shape) for b in batches] == [(32, 1024)] * 8          # 32 × 8 × 1, as published
    assert 0.65 < 1 - sum(b.tokens for b in batches) / (256 * 1024) < 0.78


def test_documents_of_real_text_stay_apart_where_a_stream_joins_them(abstracts):
    packed, stream = (step_batches(abstracts, recipe("130m", packing=way), 0) for way in ("documents", "stream"))
    cost = [sum(b.input_ids.numel() for b in batches) for batches in (packed, stream)]
    assert abs(cost[0] / cost[1] - 1) < 0.03
    assert all((b.seq_idx.max(1).values >= 1).any() for b in packed) and not any(b.seq_idx[b.targets >= 0].any() for b in stream)


def test_the_stored_costs_of_the_layouts_are_those_of_real_abstracts(abstracts):
    if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
    from benchmarks.layouts import WAYS, cost
    stored = json.loads((ROOT / "benchmarks" / "layouts.json").read_text())
    assert {name: cost(abstracts, recipe("130m", **fields)) for name, fields in WAYS.items()} == stored["costs"] and set(stored["costs"]) == set(WAYS)
