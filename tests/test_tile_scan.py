"""The scan by tiles is held to the definition in double precision and to the loops, and its digits do not depend on the threads."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba import ssd, tile_scan
from biomamba.conv import causal_conv
from biomamba.layer import LoopMixer, Parameters, Shape
from biomamba.norm import GatedNorm
from biomamba.ssd import chunk_scan, recurrence
from biomamba.tile_scan import fits_tiles

NAMES = ("y", "last", "x", "dt", "A", "B", "C", "D", "initial")


@pytest.fixture(autouse=True, scope="module")
def by_tiles():
    "The scan goes by tiles where there are none, too."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_scan, "tiles", lambda: True)
        yield


def drawn(seed, batch, T, groups, heads, width, state, starts=True):
    "x, dt, A, B, C, D and an initial state; what the products take is in bf16."
    g = torch.Generator().manual_seed(seed)
    draw, H = lambda *shape: torch.randn(*shape, generator=g), groups * heads
    maps = [draw(batch, T, groups, state).bfloat16() for _ in range(2)]
    return [draw(batch, T, H, width).bfloat16(), F.softplus(draw(batch, T, H) - 2), -draw(H).exp(), *maps, draw(H), *[draw(batch, H, width, state)] * starts]


def documents(seed, batch, T, often=0.05):
    ids = (torch.rand(batch, T, generator=torch.Generator().manual_seed(seed)) < often).cumsum(1)
    return ids - ids[:, :1] * (seed % 2)  # of every other seed the first token belongs to the initial state


def results(inputs, chunk, ids, of=chunk_scan, parts=("y", "last")) -> dict:
    "What the scan returns, and the gradients of a sum of it with weights that bf16 holds."
    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    options = dict(chunk_size=chunk, return_final_states=True) if of is chunk_scan else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=inputs[0].dtype == torch.bfloat16):
        y, last = of(*leaves[:5], D=leaves[5], initial_states=leaves[6] if len(leaves) > 6 else None, seq_idx=ids, **options)
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(v.shape, generator=g).bfloat16().to(v.dtype) for v in (y, last)]
    total = sum((v * w).sum().double() for v, w, name in zip((y, last), weights, ("y", "last")) if name in parts)
    return dict(zip(NAMES, (y, last, *torch.autograd.grad(total, leaves, allow_unused=True))))


def apart(found, exact, least=0.0) -> dict[str, float]:
    "Relative distances; numbers below `least` in the mean count as that large, since terms of either sign may leave little of what was rounded."
    return {name: ((found[name].double() - v).norm() / v.norm().clamp(min=least * v.numel() ** 0.5 + 1e-9)).item() for name, v in exact.items() if v is not None}


def by_loops_alone(inputs, chunk, ids, monkeypatch) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(ssd, "fits_tiles", lambda *of: False)
        patch.setattr(ssd, "multiplies_bf16", lambda: True)  # with products in bf16, as where there are tiles
        return results(inputs, chunk, ids)


@pytest.fixture
def used(monkeypatch):
    "How often the scan went by tiles."
    calls = []
    monkeypatch.setattr(ssd, "tile_forward", lambda *given: calls.append(1) or tile_scan.tile_forward(*given))
    return calls


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 3), T=st.integers(20, 150), groups=st.sampled_from((1, 2)), heads=st.sampled_from((1, 2, 3, 11)), width=st.sampled_from((32, 64)),
       state=st.sampled_from((32, 64, 128)), chunk=st.sampled_from((1, 13, 32, 64, 100)), packed=st.booleans(), starts=st.booleans(), seed=st.integers(0, 99))
def test_the_scan_by_tiles_is_the_scan(batch, T, groups, heads, width, state, chunk, packed, starts, seed):
    inputs, ids = drawn(seed, batch, T, groups, heads, width, state, starts), documents(seed, batch, T) if packed else None
    found, exact = results(inputs, chunk, ids), results([v.double() for v in inputs], chunk, ids)
    del exact["A"]  # a few sums of numbers of either sign; what is in them stands in the gradient of dt too
    assert max(apart(found, exact, least=0.5).values()) < 0.008


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_text_may_be_shorter_than_a_row_of_tiles(T, used):
    inputs, ids = drawn(9, 3, T, 2, 11, 32, 64), documents(9, 3, T, often=0.3)
    exact = results([v.double() for v in inputs], 64, ids)
    assert max(apart(results(inputs, 64, ids), exact, least=0.5).values()) < 0.008 and used == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_recurrence_and_no_less_exact_than_the_loops(packed, used, monkeypatch):
    inputs, ids = drawn(3, 2, 150, 2, 3, 32, 64), documents(3, 2, 150) if packed else None
    found, loops = results(inputs, 64, ids), by_loops_alone(inputs, 64, ids, monkeypatch)
    assert used == [1]
    exact = results([v.double() for v in inputs], 64, ids, of=recurrence)
    ours, theirs = apart(found, exact), apart(loops, exact)
    assert max(ours.values()) < 0.004
    assert all(ours[name] < 1.1 * theirs[name] + 1e-6 for name in exact)


@pytest.mark.parametrize("parts", [("y",), ("last",)])
def test_one_of_two_results_may_have_no_gradient(parts, used):
    inputs, ids = drawn(4, 1, 90, 1, 2, 32, 32), documents(4, 1, 90)
    found, exact = results(inputs, 32, ids, parts=parts), results([v.double() for v in inputs], 32, ids, parts=parts)
    assert used == [1] and max(apart(found, exact).values()) < 0.006


def test_digits_depend_neither_on_threads_nor_on_the_sequences_beside():
    inputs, before = drawn(5, 1, 130, 1, 11, 32, 64), torch.get_num_threads()
    try:
        several = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            several.append(results(inputs, 64, None))
    finally: torch.set_num_threads(before)
    for other in several[1:]:
        for name, v in several[0].items(): assert torch.equal(v, other[name]), name
    twice = [v if v.ndim == 1 else torch.cat([v, v.flip(1)]) for v in inputs]
    assert torch.equal(results(twice, 64, None)["y"][:1], several[0]["y"])


def test_strong_decay_neither_overflows_nor_is_lost(used):
    x, dt, A, *rest = drawn(6, 1, 100, 1, 2, 32, 32)
    inputs = [x, dt * 10, A, *rest]  # over a row up to e⁻¹⁰⁰, and above the diagonal as much the other way
    found, exact = results(inputs, 64, None), results([v.double() for v in inputs], 64, None)
    assert used == [1] and all(v.isfinite().all() for v in found.values())
    assert max(apart(found, exact).values()) < 0.004


def test_what_tiles_do_not_take_goes_by_loops(used, monkeypatch):
    results(drawn(0, 1, 20, 1, 1, 32, 32), 64, None)
    assert used == [1]
    for width, state in ((48, 32), (32, 40)): results(drawn(0, 1, 20, 1, 1, width, state), 64, None)
    chunk_scan(*(v.float() for v in drawn(0, 1, 20, 1, 1, 32, 32)[:5]))
    x, B = torch.zeros(2, 8, 1, 1, 32), torch.zeros(2, 8, 1, 32)
    assert fits_tiles(x.bfloat16(), B.bfloat16(), B.bfloat16(), torch.bfloat16) and not fits_tiles(x, B, B, torch.bfloat16)
    assert not fits_tiles(x.bfloat16(), B.bfloat16(), B.bfloat16(), torch.float32)
    monkeypatch.setattr(tile_scan, "tiles", lambda: False)
    results(drawn(0, 1, 20, 1, 1, 32, 32), 64, None)
    assert used == [1]


def by_parts(projected, seq_idx, shape: Shape, *parameters):
    "A layer by its definitions."
    p = Parameters(*parameters)
    inner, channels = p.out.shape[1], len(p.conv_weight)
    gate, inputs, dt = projected.split([inner, channels, len(p.D)], -1)
    x, B, C = causal_conv(inputs, p.conv_weight, p.conv_bias, seq_idx).split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    maps = lambda v: v.unflatten(-1, (shape.groups, -1))
    y = chunk_scan(x.unflatten(-1, (-1, shape.head)), dt, p.A, maps(B), maps(C), shape.chunk, p.D, p.dt_bias, True, shape.limit, seq_idx=seq_idx)
    return F.linear(GatedNorm.apply(y.flatten(2), gate, p.norm, shape.eps, shape.group), p.out)


@pytest.mark.parametrize(("length", "packed"), ((200, False), (131, True)))
def test_a_layer_by_tiles_is_its_parts(length, packed, used):
    g, shape = torch.Generator().manual_seed(1), Shape(2, 32, (0.0, float("inf")), 1e-5, 128)
    draw, H, inner, channels = lambda *s: torch.randn(*s, generator=g), 4, 128, 128 + 2 * 2 * 64
    tensors = [draw(2, length, inner + channels + H), draw(channels, 4), draw(channels), draw(H), -draw(H).exp(), draw(H), draw(inner), draw(64, inner)]
    ids, probe = documents(8, 2, length) if packed else None, draw(2, length, 64).bfloat16()
    def gradients(function, tensors):
        leaves = [v.clone().requires_grad_() for v in tensors]
        out = function(leaves[0], ids, shape, *leaves[1:])
        return [out, *torch.autograd.grad((out * probe.to(out.dtype)).sum(), leaves)]
    with torch.autocast("cpu", torch.bfloat16): found = gradients(LoopMixer.apply, tensors)
    assert used == [1]
    for name, u, v in zip(("out", "projected", *Parameters._fields), found, gradients(by_parts, [v.double() for v in tensors]), strict=True):
        assert (u.double() - v).norm() < 0.012 * v.norm(), name
