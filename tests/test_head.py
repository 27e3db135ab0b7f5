"""The head's loss turns its weight on its side, and shares one gradient with the embedding that it is."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from biomamba import head as head_room
from biomamba import mamba2
from biomamba.head import head_loss, look_up
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.recipe import recipe
from biomamba.transpose import add_transposed, transposed


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 100), columns=st.integers(1, 100), beside=st.integers(0, 40), half=st.booleans(), seed=st.integers(0, 99))
def test_a_transpose_is_a_transpose(rows, columns, beside, half, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns + beside, generator=g)[:, :columns]
    x = torch.where(torch.rand(x.shape, generator=g) < 0.02, torch.nan, x)
    if half: x = x.bfloat16()
    torch.testing.assert_close(transposed(x, torch.bfloat16), x.T.bfloat16(), rtol=0, atol=0, equal_nan=True)
    frame = torch.randn(columns, rows + beside, generator=g)
    out, before = frame[:, :rows], frame.clone()
    add_transposed(out, x.bfloat16(), first=False)
    torch.testing.assert_close(out, before[:, :rows] + x.bfloat16().float().T, rtol=0, atol=0, equal_nan=True)
    add_transposed(out, x.bfloat16(), first=True)
    torch.testing.assert_close(out, x.bfloat16().float().T, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(frame[:, rows:], before[:, rows:])


@pytest.mark.parametrize("rows", (1, 40, 1500))
def test_by_tiles_on_its_side_and_upright_the_head_gives_the_same(monkeypatch, rows):
    g = torch.Generator().manual_seed(rows)
    h, w = torch.randn(rows, 48, generator=g, requires_grad=True), torch.randn(9001, 48, generator=g).mul(0.1).requires_grad_()
    targets = torch.randint(0, 9001, (rows,), generator=g)
    def all_of():
        with torch.autocast("cpu", torch.bfloat16): loss = head_loss(h, w, targets)
        return loss, *torch.autograd.grad(loss, (h, w))
    fastest = all_of()  # where there are tiles, by them
    monkeypatch.setattr(head_room, "fits_products", lambda h: False)
    turned = all_of()
    monkeypatch.setattr(head_room, "_turns", lambda dtype, t: False)
    exact = F.cross_entropy(h.double() @ w.double().T, targets)
    for *found, c in zip(fastest, turned, all_of(), (exact, *torch.autograd.grad(exact, (h, w))), strict=True):
        assert all((v - c).norm() < 0.01 * c.norm() for v in found)


@pytest.mark.parametrize("rows", (40, 1500, 2500))
@pytest.mark.parametrize("kind", (torch.bfloat16, torch.float32))
def test_weights_in_any_dtype_get_the_gradient_of_every_block(rows, kind):
    "Of bf16 weights only the last block's was left once."
    g = torch.Generator().manual_seed(rows)
    h, w = torch.randn(rows, 48, generator=g).to(kind).requires_grad_(), torch.randn(4201, 48, generator=g).mul(0.1).to(kind).requires_grad_()
    targets = torch.randint(0, 4201, (rows,), generator=g)
    found = torch.autograd.grad(head_loss(h, w, targets), (h, w))
    exact = [v.detach().double().requires_grad_() for v in (h, w)]
    for v, c in zip(found, torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets), exact), strict=True):
        assert v.dtype == kind and (v - c).norm() < (0.01 if kind == torch.bfloat16 else 1e-5) * c.norm()


def test_a_transpose_is_added_to_fp32_alone():
    with pytest.raises(TypeError, match="bfloat16"): add_transposed(torch.zeros(3, 2).bfloat16(), torch.ones(2, 3).bfloat16(), first=False)


@pytest.mark.parametrize("target", (-1, 50, 1 << 40))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_target_that_is_no_word_is_refused(target, reduction):
    h, w = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with pytest.raises(IndexError, match=f"{target}.*0 to 49"): head_loss(h, w, torch.tensor([-100, target, target]), reduction)
    with pytest.raises(TypeError, match="float32"): head_loss(h, w, torch.ones(3), reduction)


def test_the_mean_is_over_as_many_as_are_said():
    g = torch.Generator().manual_seed(0)
    h, w, targets = torch.randn(5, 8, generator=g, requires_grad=True), torch.randn(50, 8, generator=g, requires_grad=True), torch.tensor([3, -100, 4, 9, 49])
    whole, part = head_loss(h, w, targets), head_loss(h, w, targets, items=10)
    torch.testing.assert_close(part, whole * 0.4)
    for a, b in zip(torch.autograd.grad(part, (h, w)), torch.autograd.grad(whole, (h, w)), strict=True): torch.testing.assert_close(a, b * 0.4)


def a_model(**options) -> tuple[nn.Module, torch.Tensor]:
    return new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, vocabulary=300, **options)), seed=0), torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def gradients(model, ids, times=1, **inputs) -> list[torch.Tensor]:
    "Of all parameters, after so many ways back through one graph."
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    for k in range(times): loss.sum().backward(retain_graph=k < times - 1)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("times", (1, 2, 3))
def test_one_gradient_for_two_uses(monkeypatch, reduction, times):
    model, ids = a_model()
    shared = gradients(model, ids, times, reduction=reduction)
    monkeypatch.setattr(mamba2, "look_up", lambda *_: (None, None))
    for a, b in zip(shared, gradients(model, ids, times, reduction=reduction), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * times)


def test_gradients_are_accumulated_and_scaled():
    model, ids = a_model()
    once = [g.clone() for g in gradients(model, ids)]
    for _ in range(2): (3 * model(ids, labels=ids).loss).backward()
    for p, g in zip(model.parameters(), once, strict=True): torch.testing.assert_close(p.grad, 7 * g, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_the_heads_own_tensor(monkeypatch):
    "Not a copy, and not another of that size beside it."
    formed, model_and_ids = [], a_model()
    keep = head_room._losses_and_gradients
    def noted(*args, **kwargs):
        found = keep(*args, **kwargs)
        formed.append(found[2].data_ptr())
        return found
    monkeypatch.setattr(head_room, "_losses_and_gradients", noted)
    gradients(*model_and_ids)
    assert formed == [model_and_ids[0].lm_head.weight.grad.data_ptr()]


def test_a_use_of_the_weight_beside_is_added():
    model, ids = a_model()
    alone, w = gradients(model, ids)[0].clone(), model.lm_head.weight
    assert alone.shape == w.shape
    model.zero_grad()
    (model(ids, labels=ids).loss + w.square().sum()).backward()
    torch.testing.assert_close(w.grad, alone + 2 * w.detach())


def test_hidden_states_cut_from_their_embeddings_keep_the_heads_gradient():
    "The way back to the lookup does not lead through the layers alone."
    model, ids = a_model()
    model.backbone.norm_f.register_forward_hook(lambda module, args, out: out.detach())
    found, w = gradients(model, ids)[0], model.lm_head.weight.detach().clone().requires_grad_()
    with torch.no_grad(): hidden = model.backbone(ids).last_hidden_state
    F.cross_entropy((hidden[:, :-1] @ w.T).flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(found, w.grad)


def test_an_embedding_that_is_not_plain_is_looked_up_by_itself():
    head, ids = nn.Linear(8, 60, bias=False), torch.arange(6)[None]
    def tied(**options):
        embedding = nn.Embedding(60, 8, **options)
        head.weight = embedding.weight
        return embedding
    assert look_up(tied(), ids, head)[0] is not None
    assert look_up(tied(padding_idx=0), ids, head) == look_up(tied(max_norm=1.0), ids, head) == (None, None)
    hooked = tied()
    hooked.register_forward_hook(lambda *_: None)
    assert look_up(hooked, ids, head) == look_up(nn.Embedding(60, 8), ids, head) == look_up(tied(), None, head) == (None, None)
    frozen = tied().requires_grad_(False)
    assert look_up(frozen, ids, head) == (None, None)
    with torch.no_grad(): assert look_up(tied(), ids, head) == (None, None)
