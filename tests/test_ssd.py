"The scan against its definition, over random shapes, packings and cuts."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from biomamba.conv import causal_conv
from biomamba.mamba2 import scan_step
from biomamba.ssd import chunk_scan, recurrence, step_sizes


def tensors(seed, batch, T, groups, per_group, width, state, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    H = groups * per_group
    return dict(x=draw(batch, T, H, width), dt=F.softplus(draw(batch, T, H) - 2), A=-torch.exp(draw(H)),
                B=draw(batch, T, groups, state), C=draw(batch, T, groups, state), D=draw(H))


def documents(seed, batch, T):
    "Increasing document numbers with random lengths."
    return (torch.rand(batch, T, generator=torch.Generator().manual_seed(seed)) < 0.15).long().cumsum(1)


def initial(seed, t):
    (b, _, H, P), N = t["x"].shape, t["B"].shape[-1]
    return torch.randn(b, H, P, N, dtype=t["x"].dtype, generator=torch.Generator().manual_seed(seed + 1))


def close(a, b, atol=1e-10): torch.testing.assert_close(a, b, rtol=0, atol=atol)


shapes = st.tuples(st.integers(0, 99), st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, chunk=st.integers(1, 80), packed=st.booleans(), start=st.booleans(), skip=st.booleans())
def test_any_shape_equals_the_recurrence(shape, chunk, packed, start, skip):
    t = tensors(*shape)
    if not skip: t["D"] = None
    options = dict(seq_idx=documents(shape[0], *t["x"].shape[:2]) if packed else None, initial_states=initial(shape[0], t) if start else None)
    y, h = chunk_scan(**t, chunk_size=chunk, return_final_states=True, **options)
    y0, h0 = recurrence(**t, **options)
    close(y, y0), close(h, h0)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, chunk=st.integers(1, 80), packed=st.booleans())
def test_gradients_equal_those_through_the_recurrence(shape, chunk, packed):
    t = {k: v.requires_grad_() for k, v in tensors(*shape).items()}
    h0 = initial(shape[0], t).requires_grad_()
    ids = documents(shape[0], *t["x"].shape[:2]) if packed else None
    both = []
    for f, options in ((chunk_scan, dict(chunk_size=chunk, return_final_states=True)), (recurrence, {})):
        y, h = f(**t, initial_states=h0, seq_idx=ids, **options)
        both.append(torch.autograd.grad(y.cos().sum() + h.sin().sum(), (*t.values(), h0)))
    for a, b in zip(*both): close(a, b, 1e-9)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, chunk=st.integers(1, 80), where=st.floats(0, 1))
def test_a_sequence_can_be_cut_anywhere(shape, chunk, where):
    t = tensors(*shape)
    cut = int(where * t["x"].shape[1])
    part = lambda a, b: {k: v[:, a:b] if v.ndim > 2 else v for k, v in t.items()}
    whole, last = chunk_scan(**t, chunk_size=chunk, return_final_states=True)
    if 0 < cut < t["x"].shape[1]:
        first, h = chunk_scan(**part(0, cut), chunk_size=chunk, return_final_states=True)
        second, h = chunk_scan(**part(cut, None), chunk_size=chunk, initial_states=h, return_final_states=True)
        close(torch.cat([first, second], 1), whole), close(h, last)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, chunk=st.integers(1, 80))
def test_packed_documents_equal_documents_alone(shape, chunk):
    t, ids = tensors(*shape), documents(shape[0], shape[1], shape[2])
    y = chunk_scan(**t, chunk_size=chunk, seq_idx=ids)
    for row in range(shape[1]):
        for document in ids[row].unique():
            k = ids[row] == document
            alone = chunk_scan(**{n: v[row:row + 1, k] if v.ndim > 2 else v for n, v in t.items()}, chunk_size=chunk)
            close(y[row:row + 1, k], alone)


def test_gradcheck_with_everything():
    t = {k: v.requires_grad_() for k, v in tensors(0, 2, 7, 2, 2, 2, 3).items()}
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    h0 = initial(0, t).requires_grad_()
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 2]])
    def f(bias, h0, x, dt, A, B, C, D):
        return chunk_scan(x, dt, A, B, C, 3, D, bias, True, (0.0, 1.5), h0, ids, True)
    assert torch.autograd.gradcheck(f, (bias, h0, *t.values()))


@pytest.mark.parametrize("groups", [1, 2])
def test_transformers_torch_path(groups):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    t = {k: v.float().requires_grad_() for k, v in tensors(3, 2, 100, groups, 4 // groups, 16, 8).items()}
    h0 = initial(3, t).requires_grad_()
    results = []
    for f in (chunk_scan, mamba2_chunk_scan):
        y, h = f(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=32, D=t["D"], dt_softplus=True, initial_states=h0, return_final_states=True)
        results.append([y, h, *torch.autograd.grad(y.cos().sum() + h.sum(), (*t.values(), h0))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_transformers_scan_is_its_own_torch_path_here():
    "An oracle that had bound mamba-ssm's kernels would not be independent."
    from transformers.models.mamba2 import modeling_mamba2
    assert modeling_mamba2.mamba2_chunk_scan.__wrapped__.__module__ == modeling_mamba2.__name__
    with pytest.raises(ValueError, match="without"):  # what the torch path, and it alone, says to packed rows
        modeling_mamba2.mamba2_chunk_scan(*(None,) * 6, seq_idx=torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_double(dtype):
    t = {k: v.to(dtype) if v.ndim > 1 else v.float() for k, v in tensors(4, 1, 300, 1, 4, 16, 16).items()}
    exact, _ = recurrence(**{k: v.double() for k, v in t.items()})
    y = chunk_scan(**t)
    assert y.dtype == dtype
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_strong_decay_does_not_overflow():
    "Above the diagonal exp() would be infinite; it must be masked before, also for the gradient."
    t = {k: v.float().requires_grad_() for k, v in tensors(5, 1, 64, 1, 2, 4, 4).items()}
    y = chunk_scan(t["x"], t["dt"] * 40, t["A"] * 40, t["B"], t["C"], 64, t["D"])
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(t.values())))


def test_steps_equal_the_scan():
    t = tensors(6, 2, 20, 2, 3, 4, 5)
    h = initial(6, t)
    expected, last = chunk_scan(**t, initial_states=h, return_final_states=True)
    y = [scan_step(h, t["x"][:, i], t["dt"][:, i], t["A"], t["B"][:, i], t["C"][:, i], t["D"]) for i in range(20)]
    close(torch.stack(y, 1), expected), close(h, last)


def test_step_sizes():
    dt, bias = torch.tensor([[[-3.0, 0.5, 40.0]]]), torch.tensor([0.1, 0.2, 0.3])
    close(step_sizes(dt, bias, True, (0.1, 2.0)), F.softplus(dt + bias).clamp(0.1, 2.0))
    close(step_sizes(dt), dt.clamp(min=0))  # mamba-ssm limits the step size to at least 0 by default


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_shapes_that_do_not_fit_are_refused(dtype):
    "Compiled loops would read on behind a tensor that is too small."
    t = {k: v.to(dtype) for k, v in tensors(0, 2, 30, 2, 2, 4, 5).items()}
    wrong = dict(D=t["D"][:1], dt=t["dt"][..., :1], C=torch.cat([t["C"]] * 2, 2), A=t["A"][:3], B=t["B"][..., :3], dt_bias=t["D"][:1], seq_idx=torch.zeros(1, 30),
                 initial_states=torch.zeros(2, 4, 5, 4, dtype=dtype), chunk_size=0)
    for name, v in wrong.items():
        with pytest.raises(ValueError, match="shape|chunks of 0"): chunk_scan(**t | {name: v})
    for longer in (torch.cat([t["dt"]] * 2, 1), t["dt"][:1]):
        with pytest.raises(ValueError, match="dt has shape"): chunk_scan(**t | {"dt": longer})
    with pytest.raises(ValueError, match="heads in 3 groups"): chunk_scan(**t | {name: torch.cat([t[name], t[name][:, :, :1]], 2) for name in ("B", "C")})
    x, w = torch.randn(2, 30, 8, dtype=dtype), torch.randn(8, 4, dtype=dtype)
    for inputs in ((x, w[:4]), (x, w, w[:1, 0]), (x, w, None, torch.zeros(1, 30)), (x, w, None, None, x[:, :2])):
        with pytest.raises(ValueError, match="has shape"): causal_conv(*inputs)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_a_skip_of_its_own_for_every_channel(dtype):
    t = {k: v.to(dtype) for k, v in tensors(0, 2, 70, 1, 3, 4, 5).items()}
    wide = torch.randn(3, 4, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_()
    x = t["x"].requires_grad_()
    y, expected = chunk_scan(**t | {"D": wide}), chunk_scan(**t | {"D": None}) + x * wide
    torch.testing.assert_close(y, expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-6)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, wide)), torch.autograd.grad(expected.sum(), (x, wide)), strict=True): torch.testing.assert_close(a, b, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=0.3 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("chunk", (7, 20, 64))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_a_number_that_comes_again_is_another_document(dtype, chunk):
    t = {k: v.to(dtype) for k, v in tensors(0, 1, 64, 1, 2, 4, 5).items()}
    ids = torch.tensor([[0] * 20 + [1] * 20 + [0] * 24])
    start = initial(3, t)
    exact, state = recurrence(**{k: v.double() for k, v in t.items()}, seq_idx=torch.tensor([[0] * 20 + [1] * 20 + [2] * 24]), initial_states=start.double())
    y, last = chunk_scan(**t, seq_idx=ids, initial_states=start, chunk_size=chunk, return_final_states=True)
    for a, b in ((y, exact), (last, state)): torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)
    x, w = torch.randn(1, 64, 8, dtype=dtype), torch.randn(8, 4, dtype=dtype)
    ids = torch.tensor([[0, 1] * 32])
    torch.testing.assert_close(causal_conv(x, w, seq_idx=ids), F.silu(x * w[:, -1]))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_a_gradient_of_the_gradient_is_refused(dtype):
    "A penalty on the gradient was left out without a word once."
    t = {k: v.to(dtype).requires_grad_() for k, v in tensors(0, 1, 9, 1, 1, 3, 4).items()}
    with pytest.raises(RuntimeError, match="create_graph asks"): torch.autograd.grad(chunk_scan(**t).sum(), t["x"], create_graph=True)
    assert torch.autograd.grad(chunk_scan(**t).sum(), t["x"])[0].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_no_tokens_leave_the_state_as_it_was(dtype):
    t = {k: v.to(dtype).requires_grad_() for k, v in tensors(0, 2, 0, 2, 3, 4, 5).items()}
    before = torch.randn(2, 6, 4, 5, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    for ids in (None, torch.zeros(2, 0, dtype=torch.int32)):
        y, state = chunk_scan(**t, initial_states=before, seq_idx=ids, return_final_states=True)
        assert y.shape == (2, 0, 6, 4) and y.dtype == dtype and torch.equal(state, before)
        *none, back = torch.autograd.grad(y.sum() + state.sum(), [*t.values(), before], materialize_grads=True)
        assert torch.equal(back, torch.ones_like(before)) and all((v == 0).all() for v in none)


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), batch=st.integers(1, 2), T=st.integers(1, 30), taps=st.integers(1, 5))
def test_convolution(packed, seed, batch, T, taps):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((batch, T, 3), (3, taps), (3,)))
    ids = documents(seed, batch, T) if packed else torch.zeros(batch, T, dtype=torch.long)
    rows = []
    for row in range(batch):
        pieces = [x[row, ids[row] == d] for d in ids[row].unique()]
        rows.append(torch.cat([F.silu(F.conv1d(F.pad(p.mT[None], (taps - 1, 0)), w.unsqueeze(1), b, groups=3))[0].mT for p in pieces]))
    ours, theirs = causal_conv(x, w, b, ids if packed else None), torch.stack(rows)
    close(ours, theirs)
    for u, v in zip(*(torch.autograd.grad(y.cos().sum(), (x, w, b)) for y in (ours, theirs))): close(u, v)


@settings(max_examples=15, deadline=None)
@given(T=st.integers(1, 9), cut=st.integers(3, 9))
def test_convolution_goes_on_from_a_window(T, cut):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, cut + T, 3), (3, 4), (3,)))
    close(causal_conv(x[:, cut:], w, b, window=x[:, cut - 3:cut]), causal_conv(x, w, b)[:, cut:])
