"The model: parity with transformers, documents kept apart, the loss, generation."
import copy
import inspect
import logging
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from biomamba import mamba2
from biomamba.mamba2 import BioMambaForCausalLM, GatedNorm, head_loss, mamba2_config, new_model
from biomamba.runs import UserError, recipe

transformers.logging.set_verbosity_error()
SMALL = recipe("tiny", d_model=64, layers=2, state=16, head_dim=16)


def small(seed=0, **changes):
    "A small model whose decays, steps and norms are not at their initial values."
    config = mamba2_config(SMALL, 300)
    for k, v in changes.items(): setattr(config, k, v)
    model = new_model(config, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model.eval()


def stock_of(model):
    stock = Mamba2ForCausalLM(model.config)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def text(rows=2, length=90, seed=0): return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2])
def test_parity_with_transformers_in_logits_loss_and_gradients(groups):
    model = small(n_groups=groups)
    stock, ids = stock_of(model), text()
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    losses = [m(ids, labels=ids).loss for m in (model, stock)]
    for loss in losses: loss.backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), stock.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm(), name


@pytest.mark.parametrize("cut", [1, 40, 64, 89])
def test_last_token_of_a_does_not_move_b(cut):
    model, ids = small(), text()
    documents = (torch.arange(90) >= cut).int().expand(2, 90)
    other = ids.clone()
    other[:, cut - 1] = (other[:, cut - 1] + 7) % 300
    with torch.no_grad():
        a, b = (model(t, seq_idx=documents).logits[:, cut:] for t in (ids, other))
        leaky = (model(ids).logits - model(other).logits)[:, cut:].abs().max()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert leaky > 1e-3


def test_packed_documents_equal_documents_alone():
    model, ids = small(), text(1, 100)
    lengths = [2, 17, 1, 60, 20]  # shorter than the convolution's window too
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None].int()
    with torch.no_grad():
        packed = model(ids, seq_idx=documents).logits
        alone = torch.cat([model(piece).logits for piece in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_packed_loss_and_gradient_equal_the_padded_batch():
    model, lengths = small(), [5, 30, 12]
    pieces = [text(1, n, seed=n) for n in lengths]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    padded = torch.cat([F.pad(p, (0, 30 - p.shape[1]), value=1) for p in pieces])
    labels = torch.cat([F.pad(p, (0, 30 - p.shape[1]), value=-100) for p in pieces])
    grads = []
    for batch in (dict(input_ids=torch.cat(pieces, 1), labels=torch.cat(pieces, 1), seq_idx=documents), dict(input_ids=padded, labels=labels)):
        loss = model(**batch).loss
        grads.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_targets_are_aligned_and_labels_are_shifted():
    model, ids = small(), text()
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    full = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 90)
    for reduction, expected in dict(none=full, sum=full.sum(), mean=full.sum() / (2 * 89)).items():
        out = model(ids, targets=targets, reduction=reduction)
        assert out.logits is None and out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model(ids, labels=ids, reduction=reduction).loss, expected, rtol=1e-5, atol=1e-4)
    assert (model(ids, targets=targets, reduction="none").loss[:, -1] == 0).all()
    with pytest.raises(UserError, match="mean, sum or none"): model(ids, targets=targets, reduction="max")


@pytest.mark.parametrize("autocast", (False, True))
def test_batches_whose_gradients_add_up_are_one_batch(autocast):
    "What transformers' Trainer asks of a model with num_items_in_batch."
    model, ids = small().train(), text(rows=3)
    labels = ids.clone()
    labels[0, :40], labels[2, 5:] = -100, -100
    items = (labels[:, 1:] != -100).sum()
    gradients = lambda losses: torch.autograd.grad(sum(losses), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole, parts = model(ids, labels=labels).loss, [model(ids[k], labels=labels[k], num_items_in_batch=items).loss for k in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-3 if autocast else 1e-5, atol=0)
        for a, b in zip(gradients(parts), gradients([whole]), strict=True): assert (a - b).norm() < (0.02 if autocast else 1e-5) * b.norm()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, stock_of(model)(ids, labels=labels, num_items_in_batch=7).loss, rtol=1e-5, atol=0)


def test_what_would_be_dropped_without_a_word_is_refused():
    model, ids = small(), text()
    for name, value, says in (("target", ids, "did you mean 'targets'"), ("position_ids", ids, "told apart by seq_idx"), ("output_attentions", True, "output_attentions")):
        with pytest.raises(TypeError, match=says): model(ids, **{name: value})
    one = torch.zeros_like(ids)
    expected = model(ids).logits
    for more in (dict(output_attentions=None), dict(output_attentions=False), dict(seq_idx=one, position_ids=ids, cu_seq_lens_q=ids, max_length_q=9)):
        torch.testing.assert_close(model(ids, **more).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="window and seq_idx"): model(ids[:, :3], cache=model(ids, use_cache=True).cache, seq_idx=one[:, :3])


def test_a_penalty_on_the_gradient_is_refused():
    model, ids = small(), text()
    with pytest.raises(RuntimeError, match="create_graph asks"): torch.autograd.grad(model(ids, labels=ids).loss, model.backbone.norm_f.weight, create_graph=True)


def test_numbers_of_documents_may_come_again():
    model, ids = small(), text(1)
    again, anew = torch.tensor([[0] * 40 + [1] * 20 + [0] * 30]), torch.tensor([[0] * 40 + [1] * 20 + [2] * 30])
    torch.testing.assert_close(model(ids, seq_idx=again).logits, model(ids, seq_idx=anew).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="seq_idx has shape"): model(ids, seq_idx=again[:, :80])


def test_embeddings_instead_of_ids():
    model, ids = small(), text()
    embeds = model.backbone.embeddings(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, labels=ids).loss, model(ids, labels=ids).loss)
    for both in (dict(input_ids=ids, inputs_embeds=embeds), {}):
        with pytest.raises(ValueError, match="and not both"): model(**both, labels=ids)


def test_what_computes_otherwise_is_refused():
    for change, says in ((dict(hidden_act="gelu"), "hidden_act"), (dict(time_step_limit=(0.1,)), "time_step_limit"), (dict(layer_norm_epsilon=float("nan")), "layer_norm_epsilon")):
        with pytest.raises(ValueError, match=says): small(**change)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_a_head_that_is_more_than_its_weight_is_asked_itself(reduction):
    "Hooks of accelerate, or an adapter, would be passed over."
    model, ids = small().train(), text()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    expected, plain = model(ids, labels=labels, reduction=reduction).loss, dict(model.named_parameters())
    wanted = torch.autograd.grad(expected.sum(), list(plain.values()))
    calls = []
    for module in (model.lm_head, model.backbone.embeddings, model.backbone.layers[0].mixer.in_proj):
        module.forward = lambda *args, own=module.forward: (calls.append(1), own(*args))[1]
    found = model(ids, labels=labels, reduction=reduction).loss
    assert len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.sum(), list(plain.values())), wanted, strict=True): assert (a - b).norm() <= 1e-4 * b.norm()
    with pytest.raises(UserError, match="mean, sum or none"): model(ids, labels=labels, reduction="max")


@pytest.mark.parametrize("rows,vocabulary,reduction", [(1, 5, "mean"), (700, 300, "sum"), (3000, 40, "mean"), (257, 33, "none")])
def test_loss_equals_cross_entropy(rows, vocabulary, reduction):
    g = torch.Generator().manual_seed(rows)
    h, w = (torch.randn(n, 12, generator=g, dtype=torch.float64, requires_grad=True) for n in (rows, vocabulary))
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < 0.3] = -100
    if rows == 1: targets[0] = 2
    weights = torch.rand(rows, generator=g, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0)
    results = []
    for loss in (head_loss(h, w, targets, reduction), F.cross_entropy(h @ w.T, targets, reduction=reduction)):
        results.append([loss, *torch.autograd.grad((loss * weights).sum(), (h, w))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_loss_equals_torch_linear_cross_entropy():
    if not hasattr(F, "linear_cross_entropy"): pytest.skip("this torch has no linear_cross_entropy")
    h, w, targets = torch.randn(600, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True), torch.randint(0, 90, (600,))
    results = []
    for loss in (head_loss(h, w, targets), F.linear_cross_entropy(h, w, targets)):
        results.append([loss, *torch.autograd.grad(loss, (h, w))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loss_of_nothing_is_zero_with_zero_gradient():
    model, ids = small(), text()
    loss = model(ids, targets=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_frozen_head_and_no_grad():
    h, w, targets = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.randint(0, 11, (5,))
    expected, = torch.autograd.grad(F.cross_entropy(h @ w.T, targets), h)
    torch.testing.assert_close(torch.autograd.grad(head_loss(h, w, targets), h)[0], expected)
    with torch.no_grad(): torch.testing.assert_close(head_loss(h, w, targets), F.cross_entropy(h @ w.T, targets))


def test_bf16_autocast_trains_fp32_weights():
    model, ids = small().train(), text()
    exact = model(ids, labels=ids).loss
    expected = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        loss.backward()  # inside, where autocast is still on
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.01 * exact
    for (name, p), g in zip(model.named_parameters(), expected):
        assert p.grad.dtype == torch.float32 and (p.grad - g).norm() < 0.05 * g.norm(), name


def test_recomputing_activations_changes_nothing():
    model, ids = small().train(), text()
    documents = (torch.arange(90) > 30).int().expand(2, 90)
    expected = torch.autograd.grad(model(ids, labels=ids, seq_idx=documents).loss, list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = torch.autograd.grad(model(ids, labels=ids, seq_idx=documents).loss, list(model.parameters()))
    for a, b in zip(again, expected): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pieces", [[90], [1] * 20 + [70], [60, 1, 1, 28], [2, 3, 64, 1, 20]])
def test_any_pieces_equal_the_whole(pieces):
    "Recurrent steps, chunked prefill, and a prefill shorter than the convolution's window."
    model, ids = small(), text()
    with torch.no_grad():
        whole, cache, parts = model(ids).logits, None, []
        for piece in ids.split(pieces, 1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


def test_what_transformers_hands_to_a_mixer_is_taken_or_refused():
    "It renamed `cache_params` to `cache` once: a mixer that took any other name began every piece of a text from nothing."
    named = lambda f: {n for n, p in inspect.signature(f).parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert named(Mamba2Mixer.forward) <= named(mamba2.BioMambaMixer.forward)
    model, ids = small(), text()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(ids[:, 40:], cache=model(ids[:, :40], use_cache=True).cache, use_cache=True)
        with pytest.raises(TypeError, match="cache_params"): model.backbone.layers[0].mixer(torch.zeros(1, 3, 64), cache_params=None)
        with pytest.raises(TypeError, match="takes no cache_params"): model(ids, cache_params=model(ids, use_cache=True).cache)


def test_generate_equals_transformers_and_the_argmax_of_full_forwards():
    model = small()
    ids = text(1, 12)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    ours = model.generate(ids, **options)
    assert torch.equal(ours, stock_of(model).generate(ids, **options))
    for t in range(12, ours.shape[1]):
        with torch.no_grad(): assert model(ours[:, :t]).logits[0, -1].argmax() == ours[0, t]


def test_left_padded_batch_equals_single_prompts():
    model = small()
    prompts = [text(1, n, seed=n)[0] for n in (3, 11, 7)]
    batch = torch.stack([F.pad(p, (11 - len(p), 0), value=1) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (11 - len(p), 0)) for p in prompts])
    with torch.no_grad():
        for row, logits in zip(prompts, model(batch, attention_mask=mask).logits):
            torch.testing.assert_close(logits[11 - len(row):], model(row[None]).logits[0], rtol=0, atol=1e-5)
    both = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, 11:]
    for row, p in zip(both, prompts):
        alone = model.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=10, do_sample=False)[0, len(p):]
        assert torch.equal(row[:len(alone)], alone)


def test_generation_stops_at_end_of_text():
    model = small()
    ids = text(1, 5)
    first = model(ids).logits[0, -1].argmax().item()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=first)
    assert out[0].tolist() == [*ids[0].tolist(), first]
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (0, 0, 1)


def test_new_model_is_seeded_and_leaves_the_global_generator_alone():
    config = mamba2_config(SMALL)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = new_model(config, 5), new_model(config, 5), new_model(config, 6)
    assert torch.equal(before, torch.get_rng_state())
    same = lambda m: [torch.equal(p, q) for p, q in zip(a.parameters(), m.parameters())]
    assert all(same(b)) and not all(same(c))


def test_new_model_follows_mamba_ssm():
    model = new_model(mamba2_config(recipe("tiny", layers=4)), 0)
    d, inner = model.config.hidden_size, model.config.expand * model.config.hidden_size
    for layer in model.backbone.layers:
        mixer = layer.mixer
        dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
        assert 1e-3 <= dt.min() and dt.max() <= 0.1001 and 1 <= A.min() and A.max() <= 16
        assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all() and (layer.norm.weight == 1).all()
        for p, bound in ((mixer.in_proj.weight, d**-0.5), (mixer.out_proj.weight, inner**-0.5 / 2), (mixer.conv1d.weight, 0.5), (mixer.conv1d.bias, 0.5)):
            assert 0.97 * bound < p.abs().max() <= bound
    assert abs(model.backbone.embeddings.weight.std() - 0.02) < 1e-3
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_importing_and_building_changes_nothing_for_others():
    small()
    stock = Mamba2ForCausalLM(mamba2_config(SMALL, 300))
    assert {type(m).__module__ for m in stock.modules() if "Mamba" in type(m).__name__} == {Mamba2ForCausalLM.__module__}


def test_deepcopy_and_two_models_stay_apart():
    model = small()
    twin = copy.deepcopy(model)
    assert type(twin.backbone.layers[0].mixer) is mamba2.BioMambaMixer
    ids = text()
    with torch.no_grad():
        twin.backbone.layers[0].mixer.D.add_(1)
        assert not torch.equal(twin(ids).logits, model(ids).logits)


def test_save_pretrained_is_a_plain_model_for_transformers(tmp_path):
    model, ids = small(), text()
    model.save_pretrained(tmp_path)
    for cls in (transformers.AutoModelForCausalLM, BioMambaForCausalLM):
        loaded = cls.from_pretrained(tmp_path).eval()
        assert loaded.config.architectures == ["Mamba2ForCausalLM"]
        with torch.no_grad(): torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_kernels_are_called_with_seq_idx(monkeypatch):
    "What the GPU path hands to the kernels, seen by recording stand-ins that run the torch path."
    seen, model, ids = [], small(), text()
    documents = (torch.arange(90) > 30).long().expand(2, 90)
    def conv(x, weight, bias, seq_idx=None, activation=None):
        seen.append(("conv", x.shape, seq_idx.dtype, activation))
        return mamba2.causal_conv(x.mT, weight, bias, seq_idx).mT
    def scan(x, dt, A, B, C, chunk_size, **options):
        seen.append(("scan", chunk_size, options["seq_idx"].dtype, options["dt_softplus"]))
        return mamba2.chunk_scan(x, dt, A, B, C, chunk_size, **options)
    def norm(x, weight, bias, z, eps, group_size, norm_before_gate):
        seen.append(("norm", z is not None, norm_before_gate))
        return mamba2.GatedNorm.apply(x, z, weight, eps, group_size)
    expected = model(ids, seq_idx=documents).logits
    monkeypatch.setattr(mamba2, "kernels_for", lambda x: mamba2.Kernels(conv, scan, norm))
    torch.testing.assert_close(model(ids, seq_idx=documents).logits, expected, rtol=0, atol=1e-5)
    layer = [("norm", False, False), ("conv", (2, 160, 90), torch.int32, "silu"), ("scan", 256, torch.int32, True), ("norm", True, False)]
    assert seen == layer * 2 + [("norm", False, False)]


def test_missing_kernels_are_said_once(monkeypatch, caplog):
    import builtins
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.startswith(("causal_conv1d", "mamba_ssm")): raise ImportError(f"No module named '{name}'")
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    mamba2.cuda_kernels.cache_clear()
    with caplog.at_level(logging.WARNING, logger="biomamba.mamba2"):
        assert mamba2.kernels_for(types.SimpleNamespace(is_cuda=True)) is None
        assert mamba2.kernels_for(types.SimpleNamespace(is_cuda=True)) is None
    mamba2.cuda_kernels.cache_clear()
    assert len(caplog.records) == 1 and "pip install biomamba[cuda]" in caplog.text


def test_config_of_every_published_scale():
    for scale, d_model, layers, heads in (("130m", 768, 24, 24), ("370m", 1024, 48, 32), ("780m", 1536, 48, 48), ("1.3b", 2048, 48, 64), ("2.7b", 2560, 64, 80)):
        c = mamba2_config(recipe(scale))
        assert isinstance(c, Mamba2Config) and (c.hidden_size, c.num_hidden_layers, c.num_heads, c.vocab_size) == (d_model, layers, heads, 50288)
        assert (c.n_groups, c.state_size, c.head_dim, c.conv_kernel, c.tie_word_embeddings) == (1, 128, 64, 4, True)


def test_gated_norm_in_bf16():
    x, z, w = torch.randn(4, 6, 16).bfloat16(), torch.randn(4, 6, 16).bfloat16(), torch.rand(16) + 0.5
    g = x.double() * F.silu(z.double())
    expected = g / (g.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    torch.testing.assert_close(GatedNorm.apply(x, z, w, 1e-5, 16).double(), expected, rtol=1e-4, atol=1e-4)
