"""Products with few rows are held to fp64, and their digits depend neither on the threads nor on the rows beside them; the loops between them to PyTorch's."""
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba import decoding, products
from biomamba.decoding import Decoder, heads_at_once, prefill
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.products import BLOCK, FIELDS, STREAMS, Job, Product, by_vectors, chain, laid_out, multiplies
from biomamba.recipe import recipe
from biomamba.runs import UserError

KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def drawn(seed: int, *shape: int) -> torch.Tensor: return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    "Sets their number; the old one comes back."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype, by_tiles", KINDS)
@given(rows=st.integers(1, 35), outputs=st.integers(1, 2 * BLOCK * STREAMS + 40), inputs=st.integers(1, 150), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_product_is_the_product_of_the_rounded_numbers(dtype, by_tiles, rows, outputs, inputs, seed):
    weight, x = drawn(seed, outputs, inputs).to(dtype), drawn(seed + 100, rows, inputs).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "tiles", lambda: by_tiles)
        found = Product(weight)(x)
    assert found.shape == (rows, outputs) and found.dtype == torch.float32
    bound = x.double().abs() @ weight.double().abs().T
    assert ((found - x.double() @ weight.double().T).abs() <= 2e-6 * bound + 1e-30).all()


@pytest.mark.parametrize("dtype, by_tiles", KINDS)
def test_digits_depend_on_neither_threads_nor_neighbours(dtype, by_tiles, threads, monkeypatch):
    monkeypatch.setattr(products, "tiles", lambda: by_tiles)
    product, x = Product(drawn(0, 500, 200).to(dtype)), drawn(1, 21, 200).to(dtype)
    threads(1)
    whole = product(x)
    threads(2)
    assert torch.equal(product(x), whole)
    assert torch.equal(torch.cat([product(part) for part in x.split([1, 3, 6, 11])]), whole)


def bits(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    "Numbers of bf16 of either sign whose exponents lie between two, as it stores them: 0 are those below 2^-126, 255 infinities."
    g = torch.Generator().manual_seed(seed)
    sign, exponent, digits = (torch.randint(low_, high_, shape, generator=g, dtype=torch.int32) for low_, high_ in ((0, 2), (low, high), (0, 128)))
    return (sign << 15 | exponent << 7 | digits * (exponent < 255)).to(torch.uint16).view(torch.bfloat16)


@pytest.mark.parametrize("of_x, of_weight", [((117, 130), (117, 130)), ((110, 130), (0, 4)), ((0, 4), (110, 130)), ((60, 68), (60, 68)), ((0, 130), (0, 130)), ((150, 192), (150, 192))])
def test_vectors_have_the_digits_of_a_tile(of_x, of_weight, monkeypatch):
    "Usual numbers; weights and inputs below 2^-126; products about there; all at once; sums that overflow, and infinite weights. The last of 17 rows is alone in its tile."
    weight, x = bits(0, *of_weight, 1503, 700), bits(1, *of_x, 17, 700)
    monkeypatch.setattr(products, "tiles", lambda: True)
    if of_weight[1] > 130: weight[::7, 5], weight[::6, 8] = torch.inf, -torch.inf
    product = Product(weight)
    together, alone, beside = product(x), torch.cat([product(row[None]) for row in x]), product(x[[16, 0]])[0]
    assert torch.equal(together.isnan(), alone.isnan()) and together.isnan().float().mean() < 0.9
    whole = lambda t: t.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int32)
    assert torch.equal(whole(together), whole(alone)) and torch.equal(whole(together[16]), whole(beside))
    small = torch.full((1 << 17,), 1e-40)
    assert (small * 1.5 > small).all()  # the threads round again as they did


@pytest.mark.parametrize("dtype, by_tiles", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_comes_out_where_it_went_in(dtype, by_tiles, bad, monkeypatch):
    monkeypatch.setattr(products, "tiles", lambda: by_tiles)
    weight, x = drawn(0, 130, 50).to(dtype), drawn(1, 6, 50).to(dtype)
    x[4, 49] = bad
    found, exact = Product(weight)(x), x.double() @ weight.double().T
    assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isposinf(), exact.isposinf()) and torch.equal(found.isneginf(), exact.isneginf())
    x[4, 49], weight[17, 3] = 0, bad
    assert (~Product(weight)(x).isfinite()).any(0).nonzero().tolist() == [[17]]


@given(outputs=st.integers(1, 70), inputs=st.integers(1, 70))
@settings(deadline=None, max_examples=30)
def test_every_weight_has_its_place(outputs, inputs):
    weight = torch.arange(1.0, outputs * inputs + 1).view(outputs, inputs)
    placed = laid_out(weight).transpose(1, 2).flatten(0, 1)
    assert torch.equal(placed[:outputs], weight) and not placed[outputs:].any()
    halves = (weight % 250).bfloat16()
    placed = laid_out(halves).transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.equal(placed[:outputs, :inputs], halves) and not placed[outputs:].any() and not placed[:, inputs:].any()


def test_a_job_takes_places_of_the_right_size_only():
    product = Product(drawn(0, 20, 10).bfloat16())
    x, y = product.places(3)
    for wrong in ((x[:, :10], y), (x.float(), y), (x, y[:2]), (x, y.bfloat16())):
        with pytest.raises(AssertionError): product.job(*wrong)


def test_which_weights_become_products(monkeypatch):
    w = torch.zeros(2, 3)
    assert multiplies(w) and multiplies(w.bfloat16()) and not multiplies(w.double()) and not multiplies(w.half()) and not multiplies(w.to("meta"))
    monkeypatch.setattr(products, "_openmp", lambda: None)
    assert not multiplies(w)
    with pytest.raises(RuntimeError, match="OpenMP"): Product(w)(torch.zeros(1, 3))


def test_a_chain_does_one_product_after_the_other(threads):
    "The second reads what the first wrote; three times, with one thread and with two."
    first, second = Product(drawn(0, 64, 40)), Product(drawn(1, 30, 64))
    x, between = first.places(3)
    _, y = second.places(3)
    x[:, :40] = drawn(2, 3, 40)
    both = chain(first.job(x, between), second.job(between, y))
    for n in (1, 2, 2):
        threads(n)
        y.zero_(), between.zero_()
        both()
        assert torch.equal(y[:, :30], second(first(x)))


# ---------------------------------------------------------------- a step by loops

def wild_model():
    "A small model whose norms' weights and step sizes are not the initial ones."
    model, g = new_model(mamba2_config(recipe("tiny", d_model=48, layers=2, state=9, head_dim=12, vocabulary=100), 100), 0).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


def prompts(decoder, ids):
    "What the model remembers of each row's first 5 tokens."
    return [prefill(decoder.model, t[None, :5])[1] for t in ids]


def written(decoder, ids, remembered=None):
    "Logits of every step, the first after a prompt of 5 tokens; ids (rows, T)."
    batch, out = decoder.batch(len(ids)), []
    for row, cache in enumerate(remembered or prompts(decoder, ids)): batch.put(row, cache)
    for t in ids[:, 5:].T: out.append(decoder.step(batch, t).float())
    return torch.stack(out, 1)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_loops_take_the_step_that_the_calls_take(dtype, close, monkeypatch):
    "Odd sizes; three flushes."
    model, ids = wild_model(), torch.randint(2, 100, (3, 60), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, dtype)
    assert decoder.by_loops
    found = written(decoder, ids)
    monkeypatch.setattr(decoding, "multiplies", lambda weight: False)
    decoder = Decoder(model, dtype)
    assert not decoder.by_loops
    calls = written(decoder, ids)
    assert (found - calls).square().mean().sqrt() < close * calls.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_writes_the_same_digits_in_every_batch_with_any_threads(dtype, threads):
    decoder, ids = Decoder(wild_model(), dtype), torch.randint(2, 100, (5, 40), generator=torch.Generator().manual_seed(3))
    read = prompts(decoder, ids)  # by products of a library, which on some processors sums in another order with other threads
    threads(1)
    whole = written(decoder, ids, read)
    threads(2)
    assert torch.equal(written(decoder, ids, read), whole)
    assert all(torch.equal(written(decoder, ids[k:k + 1], read[k:k + 1])[0], whole[k]) for k in range(5))


def test_logits_are_kept():
    decoder = Decoder(wild_model())
    batch = decoder.batch(1)
    first = decoder.step(batch, torch.tensor([3]))
    before = first.clone()
    decoder.step(batch, torch.tensor([4]))
    assert torch.equal(first, before)


@pytest.mark.parametrize("wrong", [-1, 100, 1 << 40])
def test_a_token_outside_the_vocabulary_is_refused(wrong):
    decoder = Decoder(wild_model())
    batch, other, ids = decoder.batch(2), decoder.batch(2), torch.tensor([3, 7])
    for b in (batch, other): decoder.step(b, ids)
    with pytest.raises(IndexError, match="0 to 99"): decoder.step(batch, torch.tensor([3, wrong]))
    with pytest.raises(ValueError, match="2 rows want a token each"): decoder.step(batch, ids[:1])
    assert torch.equal(decoder.step(batch, ids), decoder.step(other, ids))  # what was refused left no trace


def test_a_convolution_whose_ring_does_not_fit_is_refused():
    model = new_model(mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=100, conv=3), 100), 0)
    with pytest.raises(UserError, match="3 taps"): Decoder(model)


def test_no_thread_is_left_without_heads(threads):
    for n in (1, 2, 3, 4):
        threads(n)
        for rows in (1, 2, 3, 5, 16):
            for heads in (1, 6, 24, 80):
                part = heads_at_once(rows, 1, heads)
                units = rows * heads // part
                assert heads % part == 0 and (units % n == 0 or units >= 4 * n or part == 1)


def test_what_is_no_number_stays_in_its_row():
    decoder = Decoder(wild_model())
    batch = decoder.batch(2)
    for memory in batch.layers: memory.state[1] = torch.nan
    logits = decoder.step(batch, torch.tensor([3, 3]))
    assert logits[1].isnan().all() and logits[0].isfinite().all()


def test_a_job_wants_all_of_its_record():
    fields = dict.fromkeys(FIELDS.split(), 0)
    with pytest.raises(TypeError, match="was not given weight"): Job(by_vectors, 1, **{k: v for k, v in fields.items() if k != "weight"})
    with pytest.raises(TypeError, match="has no weigth, but half, weight"): Job(by_vectors, 1, **fields, weigth=0)


# ---------------------------------------------------------------- other processors

ANY = """
import torch
from biomamba.decoding import Decoder
from biomamba.lanes import features
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.recipe import recipe
from biomamba.registers import load, piece, store_half
from numba.core.registry import cpu_target
for name in ("avx", "fma", "f16c"): assert "+" + name not in features(cpu_target.target_context), name

@piece
def rounded(x, y): store_half(y, load(x))

x, y = torch.randn(16), torch.empty(16, dtype=torch.bfloat16)
rounded(x.data_ptr(), y.data_ptr())
assert torch.equal(y, x.bfloat16())

model, ids = new_model(mamba2_config(recipe("tiny", d_model=32, layers=1, state=16, head_dim=16, vocabulary=100), 100), 0), torch.arange(2, 22)[None]
with torch.autocast("cpu", torch.bfloat16): model(input_ids=ids, targets=ids).loss.backward()
assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
with torch.no_grad(): whole = model.eval()(input_ids=ids).logits[0]
for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
    decoder = Decoder(model, dtype)
    batch = decoder.batch(1)
    steps = torch.cat([decoder.step(batch, t).float() for t in ids.T])
    assert decoder.by_loops and (steps - whole).square().mean().sqrt() < close * whole.std(), dtype
print("all of it")
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions are x86's")
def test_compiled_code_asks_for_nothing_that_a_processor_may_lack():
    "LLVM turns what an instruction is missing for into a call, and where no library has the function, the process ends."
    plain = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", ANY], env=plain, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all of it\n"), (done.returncode, done.stderr[-2000:])
