"""A layer by loops is held to its parts in double precision, keeps little, and leaves to the parts what it does not know."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba import head as head_room
from biomamba import layer as layer_room
from biomamba import mamba2, ssd, transpose
from biomamba.conv import causal_conv
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.layer import LoopMixer, Parameters, Projection, Shape, fits_loops
from biomamba.norm import GatedNorm
from biomamba.recipe import recipe
from biomamba.ssd import chunk_scan
from biomamba.transpose import matmul


def by_parts(projected, seq_idx, shape: Shape, *parameters):
    "The definitions, one after another."
    p, G = Parameters(*parameters), shape.groups
    inner, C = p.out.shape[1], len(p.conv_weight)
    gate, inputs, dt = projected.split([inner, C, len(p.D)], -1)
    x, B, Cm = causal_conv(inputs, p.conv_weight, p.conv_bias, seq_idx).split([inner, (C - inner) // 2, (C - inner) // 2], -1)
    maps = lambda v: v.unflatten(-1, (G, -1))
    y = chunk_scan(x.unflatten(-1, (-1, shape.head)), dt, p.A, maps(B), maps(Cm), shape.chunk, p.D, p.dt_bias, True, shape.limit, seq_idx=seq_idx)
    return F.linear(GatedNorm.apply(y.flatten(2), gate, p.norm, shape.eps, shape.group), p.out)


def a_layer(g, batch=2, length=50, groups=1, heads=2, head=8, state=4, width=6) -> list:
    "The first projection of some tokens, and a layer's parameters."
    H, draw = groups * heads, lambda *s: torch.randn(*s, generator=g)
    inner, C = H * head, H * head + 2 * groups * state
    return [draw(batch, length, inner + C + H), draw(C, 4), draw(C), draw(H), -draw(H).exp(), draw(H), draw(inner), draw(width, inner)]


def gradients(function, seq_idx, shape, tensors, seed=0) -> list:
    "The output, and the gradients of a random sum of it."
    leaves = [v.detach().clone().requires_grad_() for v in tensors]
    out = function(leaves[0], seq_idx, shape, *leaves[1:])
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return [out, *torch.autograd.grad((out * probe).sum(), leaves)]


def apart(a, b) -> float:
    return max(((u.double() - v.double()).norm() / v.double().norm().clamp(min=0.1)).item() for u, v in zip(a, b, strict=True))


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), length=st.integers(1, 90), groups=st.sampled_from((1, 2)), heads=st.integers(1, 3), chunk=st.sampled_from((1, 16, 64)),
       limited=st.booleans(), documents=st.booleans(), seed=st.integers(0, 99))
def test_a_layer_by_loops_is_its_parts(batch, length, groups, heads, chunk, limited, documents, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = a_layer(g, batch, length, groups, heads)
    ids = (torch.rand(batch, length, generator=g) < 0.1).cumsum(1).int() if documents else None
    if ids is not None: ids -= ids[:, :1].clone()
    shape = Shape(groups, 8, (0.1, 2.0) if limited else (0.0, float("inf")), 1e-3, heads * 8, chunk)
    assert apart(gradients(LoopMixer.apply, ids, shape, tensors), gradients(by_parts, ids, shape, [v.double() for v in tensors])) < 1e-3


def without_bf16(monkeypatch):
    "As on a processor that has no instructions for bf16."
    for room in (layer_room, head_room): monkeypatch.setattr(room, "fits_products", lambda x: False)
    monkeypatch.setattr(ssd, "fits_tiles", lambda *_: False)
    for room in (ssd, transpose): monkeypatch.setattr(room, "multiplies_bf16", lambda: False)


@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize(("length", "documents"), ((300, 1), (300, 3), (131, 2)))
def test_under_autocast_no_gradient_is_worse_than_its_rounding(length, documents, plain, monkeypatch):
    if plain: without_bf16(monkeypatch)
    g, shape = torch.Generator().manual_seed(1), Shape(1, 8, (0.0, float("inf")), 1e-5, 64)
    tensors, ids = a_layer(g, length=length, heads=8, state=16), (torch.arange(length) * documents // length).int().expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16): rounded = gradients(LoopMixer.apply, ids, shape, tensors)
    exact = gradients(by_parts, ids, shape, [v.double() for v in tensors])
    assert rounded[0].dtype == torch.bfloat16 and apart(rounded, exact) < 0.015


@pytest.mark.parametrize(("precision", "numbers"), (("fp32", 4), ("bf16", 2)))
def test_what_a_layer_keeps(precision, numbers):
    config = mamba2_config(recipe("tiny", layers=1, d_model=64, vocabulary=64), 64)
    model, kept = new_model(config, 0), {}
    mixer, hidden = model.backbone.layers[0].mixer, torch.randn(1, 640, 64, requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in mixer.parameters()} | {hidden.untyped_storage().data_ptr()}
    def keep(t): kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): mixer(hidden)
    H, P, N, channels = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, mixer.conv_dim
    counted = (2 * H * P + channels + H + N * H * P // 64) * numbers + 3 * 4 * H + 4  # projection, output, states; three decays and a start
    assert 0.95 < sum(size for at, size in kept.items() if at not in known) / (640 * counted) < 1.05


def test_a_layer_that_the_loops_do_not_know_goes_by_its_parts(monkeypatch):
    config = mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=64), 64)
    mixer, hidden, used = new_model(config, 0).backbone.layers[0].mixer, torch.randn(2, 70, 32), []
    monkeypatch.setattr(mamba2, "mix_by_loops", lambda *a, real=mamba2.mix_by_loops: used.append(1) or real(*a))
    whole = mixer(hidden)
    assert used == [1] and fits_loops(mixer, hidden) and not fits_loops(mixer, hidden.double())
    torch.testing.assert_close(mixer(hidden, attention_mask=torch.ones(2, 70)), whole, rtol=1e-4, atol=1e-5)
    mixer.in_proj.bias = torch.nn.Parameter(torch.zeros(len(mixer.in_proj.weight)))
    torch.testing.assert_close(mixer(hidden), whole, rtol=1e-4, atol=1e-5)
    assert used == [1]


def test_a_projection_with_a_hook_is_called(monkeypatch):
    mixer, hidden, seen = new_model(mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=64), 64), 0).backbone.layers[0].mixer, torch.randn(1, 20, 32), []
    handle = mixer.out_proj.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    mixer(hidden)
    assert seen == [(1, 20, 32)] and not fits_loops(mixer, hidden)
    handle.remove()
    assert fits_loops(mixer, hidden)


def test_frozen_parameters_get_no_gradient_and_change_no_other():
    def gradients_of(frozen):
        model = new_model(mamba2_config(recipe("tiny", layers=2, d_model=32, vocabulary=64), 64), 0)
        for name, p in model.named_parameters(): p.requires_grad_(not name.endswith(frozen))
        ids = torch.arange(40)[None]
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}
    frozen = ("in_proj.weight", "A_log", "conv1d.bias")
    some, all_ = gradients_of(frozen), gradients_of(("nothing",))
    assert all((some[name] is None) == name.endswith(frozen) for name in some)
    assert all(torch.equal(some[name], all_[name]) for name in some if some[name] is not None)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 90), inner=st.integers(0, 70), columns=st.integers(0, 60), strip=st.sampled_from((1, 300, 2**22)), turned=st.booleans(), seed=st.integers(0, 99))
def test_by_way_of_fp32_a_product_is_rounded_once(rows, inner, columns, strip, turned, seed):
    "Whatever the strips: small whole numbers, of which every sum is exact, so that only the last rounding is left."
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-9, 10, size, generator=g).bfloat16() for size in ((rows, inner), (columns, inner) if turned else (inner, columns)))
    if turned: b = b.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transpose, "multiplies_bf16", lambda: False)
        patch.setattr(transpose, "STRIP", strip)
        out = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
        assert torch.equal(matmul(a, b, out), (a.double() @ b.double()).bfloat16()) and torch.equal(matmul(a, b), out)


def test_a_model_without_bf16_instructions_takes_the_step_that_others_take(monkeypatch):
    "Loss and gradients under autocast, against fp32 and as far from it as with the instructions."
    model, ids = new_model(mamba2_config(recipe("tiny", d_model=64, layers=2, vocabulary=512), 512), 0), torch.arange(2 * 700).view(2, 700) % 512
    def step(**cast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **cast): loss = model(input_ids=ids, targets=ids.roll(-1, 1)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    exact, here = step(enabled=False), step()
    without_bf16(monkeypatch)
    there = step()
    assert apart(there, exact) < 0.03 and apart(there, here) < 0.03
    assert any(not torch.equal(u, v) for u, v in zip(there, exact, strict=True))  # bf16 it is


@pytest.mark.parametrize("rows", (640, 641, 1025, 1535, 1536))
def test_halves_are_the_whole_product(rows):
    g = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(*s, generator=g).bfloat16() for s in ((rows, 96), (96, 40)))
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=0.01, atol=0.1)


def test_a_product_under_autocast_keeps_its_weight_as_it_is():
    x, w = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): y = Projection.apply(x, w)
    dx, dw = torch.autograd.grad(y.float().sum(), (x, w))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), x.float() @ w.bfloat16().float().T, rtol=0.02, atol=0.02)
    torch.testing.assert_close(dw, x.float().sum(0).expand(6, -1), rtol=0.02, atol=0.02)


def on_threads(number, f, *inputs):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try: return f(*inputs)
    finally: torch.set_num_threads(before)


def test_step_sizes_have_the_same_bits_on_any_number_of_threads():
    "Beyond 32,768 numbers PyTorch shares out what it does to each, and computes the ends of shares by other code."
    g, sizes = torch.Generator().manual_seed(1), lambda dt: ssd.step_sizes(dt, dt_softplus=True)
    for T in range(3301, 3401):
        dt = torch.randn(1, T, 10, generator=g)
        for f in (sizes, lambda z: ssd.by_pieces(torch.sigmoid, z)):
            one = on_threads(1, f, dt)
            for number in (2, 3): assert torch.equal(on_threads(number, f, dt), one)


def test_a_long_row_has_the_same_bits_on_any_number_of_threads():
    c = recipe("tiny")
    model, g = new_model(mamba2_config(c), seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.02)
    ids = torch.randint(2, c.vocabulary, (1, 3282), generator=g)
    gradients = lambda: torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
    one = on_threads(1, gradients)
    for number in (2, 3): assert all(map(torch.equal, on_threads(number, gradients), one))
