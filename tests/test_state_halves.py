"A state in halves is the state: to the rounding of fp32, in the tokens that are written, and with what is no number in it."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import carray

from biomamba import decoding
from biomamba.decoding import Decoder, prefill
from biomamba.generation import most_likely
from biomamba.loops import f32
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.products import Job, shared
from biomamba.recipe import recipe
from biomamba.state_halves import joined, reads_halves, rows_summed, scale, scale_of, split, tokens_added

needs_halves = pytest.mark.skipif(not reads_halves(), reason="this processor does not convert half precision by itself")


def drawn(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.integers(-60, 60), st.floats(1, 1000, width=32))
@settings(deadline=None, max_examples=300)
def test_nothing_of_fp32_is_lost(values, power, loose):
    "Whatever the scale, and with a bound a thousand times too large."
    numbers = torch.tensor(values) * 2.0**power
    bound = numbers.abs().max() * loose
    back = joined(*split(numbers, bound), bound)
    large = numbers.abs() > scale_of(bound) * 2.0**-14
    assert torch.equal(back[large], numbers[large])
    assert ((back - numbers).abs() <= scale_of(bound) * 2.0**-39).all()


def slow_model(layers=2):
    "Odd sizes; half of the heads forget next to nothing."
    model, g = new_model(mamba2_config(recipe("tiny", d_model=48, layers=layers, state=9, head_dim=12, vocabulary=100), 100), 0).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.1)
        for block in model.backbone.layers: block.mixer.A_log[::2] = -6
    return model


def run(decoder, ids):
    "Logits of every step after a prompt of 5 tokens, and what the batch then remembers."
    batch, out = decoder.batch(len(ids)), []
    for row, t in enumerate(ids): batch.put(row, prefill(decoder.model, t[None, :5], dtype=decoder.dtype)[1])
    for t in ids[:, 5:].T: out.append(decoder.step(batch, t).clone())
    return torch.stack(out, 1), batch.layers


@needs_halves
def test_the_state_in_halves_is_the_state_and_the_logits_are_as_good(monkeypatch):
    "1,000 tokens. What enters the first layer's state depends on the tokens alone: it is the same to the rounding of fp32."
    model, ids = slow_model(), torch.randint(2, 100, (2, 1005), generator=torch.Generator().manual_seed(2))
    logits, [first, _] = run(Decoder(model, torch.bfloat16), ids)
    exact, _ = run(Decoder(model), ids)
    monkeypatch.setattr(decoding, "reads_halves", lambda: False)
    whole, [other, _] = run(Decoder(model, torch.bfloat16), ids)
    assert first.rest is not None and other.rest is None
    state = joined(first.state, first.rest, first.bound[..., None, None])
    expected = other.state.unflatten(3, (state.shape[1], -1)).squeeze(1).transpose(1, 2)
    assert ((state - expected).abs() <= 1e-6 * first.bound[..., None, None]).all() and state.abs().max() > 1
    assert (state.abs().amax((2, 3)) <= first.bound).all() and (first.bound < 1000 * state.abs().amax((2, 3))).all()
    gap = lambda a, b: (a - b).std() / exact.std()
    assert gap(whole, logits) < 0.5 * gap(whole, exact) and gap(logits, exact) < 1.03 * gap(whole, exact)


@needs_halves
def test_what_is_no_number_stays_in_its_row_and_an_infinity_stays_one():
    decoder = Decoder(slow_model(), torch.bfloat16)
    batch, other = decoder.batch(2), decoder.batch(2)
    for memory in batch.layers: memory.state[1, 0, 0, 0] = torch.nan
    for t in range(40):
        logits, clean = decoder.step(batch, torch.tensor([t + 3, t + 3])), decoder.step(other, torch.tensor([t + 3, t + 3]))
        assert logits[1].isnan().all() and torch.equal(logits[0], clean[0])
    infinite = torch.tensor([torch.inf, 1.0])
    assert joined(*split(infinite, infinite.max()), infinite.max())[0] == torch.inf


@needs_halves
@given(rows=st.integers(1, 21), columns=st.integers(1, 150), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_compiled_code_sums_rows_and_adds_tokens(rows, columns, seed):
    numbers, x, w = drawn(seed, rows, columns), drawn(seed + 1, 3, columns), drawn(seed + 2, rows, 3)
    old, new, y = numbers.abs().max(), torch.tensor(40.0), torch.full((columns,), torch.nan)
    upper, rest = split(numbers, old)
    Job(both, 1, upper=upper, rest=rest, x=x, w=w, c=torch.tensor(w[:, 0].tolist()), y=y, rows=rows, columns=columns, old=old.item(), new=new.item())()
    before = split(numbers, old)[0].double() * scale_of(old)
    torch.testing.assert_close(y.double() * scale_of(old), w[:, 0].double() @ before, rtol=0, atol=1e-4)
    torch.testing.assert_close(joined(upper, rest, new).double(), 0.25 * numbers.double() + w.double() @ x.double(), rtol=0, atol=5e-6)


three = tokens_added(3)


@shared("upper rest x w c y rows columns", "old new")
def both(p):
    j = carray(p, 1)[0]
    rows_summed(j.y, j.upper, j.c, j.rows, j.columns)
    three(j.upper, j.rest, f32(0.25) * scale(f32(j.old)), j.x, j.columns * 4, j.w, j.rows, j.columns, f32(1) / scale(f32(j.new)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_most_likely_token_is_the_first_of_the_largest(dtype):
    logits = drawn(0, 5, 1000).to(dtype)
    logits[1, [7, 900]] = logits[2, [3, 4]] = 9
    logits[3, [50, 60]] = torch.nan
    logits[4] = -torch.inf
    assert most_likely(logits[:, :990]) == logits[:, :990].argmax(-1).tolist()
    assert most_likely(logits)[1:] == [7, 3, 50, 0]
