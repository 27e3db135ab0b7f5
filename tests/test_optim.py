"The optimizer against torch's and transformers' own."
import dataclasses
import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_wsd_schedule

from biomamba.mamba2 import mamba2_config, new_model
from biomamba.optim import Average, depth_factor, is_decayed, learning_rate_factor, make_optimizer, parameter_groups, set_learning_rate
from biomamba.paper import SCALES
from biomamba.recipe import VARIANTS, UserError, recipe

SMALL = recipe("tiny", d_model=32, layers=3, state=8, head_dim=16, vocabulary=300)


def model():
    return new_model(mamba2_config(SMALL), seed=0)


@pytest.mark.parametrize("steps, ratios", [(5967, {}), (5967, {"decay_ratio": None}), (100, {}), (7953, {"floor": 0.0}), (1000, {"warmup_ratio": 0.0})])
def test_the_schedule_is_transformers_own(steps, ratios):
    r = recipe("130m", steps=steps, **ratios)
    warmup, stable = round(steps * r.warmup_ratio), round(steps * r.stable_ratio)
    decay = (steps - warmup - stable if r.decay_ratio is None else round(steps * r.decay_ratio)) + (not r.floor)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = {floor: get_wsd_schedule(optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_stable_steps=stable, min_lr_ratio=floor).lr_lambdas[0]
              for floor in (0.0, r.floor)}
    for step in range(steps - 1):     # its warmup, too, begins at the floor; the paper's begins at zero
        assert learning_rate_factor(step, steps, r) == pytest.approx(theirs[0.0 if step < warmup else r.floor](step + 1), abs=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_the_last_twentieth_runs_at_the_floor_and_the_codes_variant_does_not(scale):
    paper, code = recipe(scale), recipe(scale, variant="code_schedule")
    tail = range(math.ceil(0.951 * paper.steps), paper.steps)
    assert {learning_rate_factor(s, paper.steps, paper) for s in tail} == {0.1}
    assert learning_rate_factor(tail[0], code.steps, code) > 0.1 == learning_rate_factor(code.steps - 1, code.steps, code)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_no_step_of_a_decay_to_zero_is_wasted(steps):
    r = recipe("130m", stable_ratio=0.0, decay_ratio=None, floor=0.0)
    rates = [learning_rate_factor(s, steps, r) for s in range(steps)]
    assert min(rates) > 0.0 and rates[round(0.1 * steps):] == sorted(rates[round(0.1 * steps):], reverse=True)


def test_groups_are_one_adamw_per_parameter():
    together, apart = model(), model()
    r = dataclasses.replace(SMALL, steps=10, layer_decay=0.5, weight_decay=0.3)
    grouped = make_optimizer(together, r)
    single = {n: torch.optim.AdamW([p], lr=1, betas=r.betas, weight_decay=0.3 if p.ndim > 1 else 0.0) for n, p in apart.named_parameters()}
    for step in range(6):
        torch.manual_seed(step)
        grads = {n: torch.randn_like(p) for n, p in apart.named_parameters()}
        set_learning_rate(grouped, step, 10, r)
        for net in (together, apart):
            for n, p in net.named_parameters(): p.grad = grads[n].clone()
        grouped.step()
        for n, optimizer in single.items():
            optimizer.param_groups[0]["lr"] = r.learning_rate * learning_rate_factor(step, 10, r) * depth_factor(n, r)
            optimizer.step()
    for (name, a), b in zip(together.named_parameters(), apart.parameters()):
        assert torch.allclose(a, b, atol=1e-7), name


def test_the_lowest_embedding_rate_lies_below_the_first_layer():
    r = recipe("130m", variant="slow_embedding")
    rates = [depth_factor("backbone.embeddings.weight", r), *(depth_factor(f"backbone.layers.{i}.mixer.in_proj.weight", r) for i in range(24))]
    assert all(b / a == pytest.approx(1 / 0.9) for a, b in zip(rates, rates[1:])) and rates[-1] == 1 == depth_factor("backbone.norm_f.weight", r)
    assert depth_factor("backbone.embeddings.weight", recipe("130m")) == 1


def test_what_decays_is_what_mamba_marks():
    for name, p in model().named_parameters():
        marked = name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias", "bias") or "norm" in name
        assert is_decayed(name, p) != marked, name
    everything = parameter_groups(model(), dataclasses.replace(SMALL, decayed="all"))
    assert {g["weight_decay"] for g in everything} == {SMALL.weight_decay}


def test_the_average_is_torchs_over_a_training():
    net = model()
    ours, theirs = Average(net, 0.9), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)
    optimizer = make_optimizer(net, SMALL)
    for step in range(8):
        torch.manual_seed(step)
        for p in net.parameters(): p.grad = torch.randn_like(p)
        set_learning_rate(optimizer, step, 10, SMALL)
        optimizer.step(); ours.update(net); theirs.update_parameters(net)
    for name, p in theirs.module.named_parameters():
        assert torch.allclose(ours.shadow[name], p, atol=1e-6), name
    raw = {n: p.detach().clone() for n, p in net.named_parameters()}
    with ours.applied(net):
        assert all(torch.equal(p, ours.shadow[n]) for n, p in net.named_parameters())
    assert all(torch.equal(p, raw[n]) for n, p in net.named_parameters())


def test_every_variant_has_a_name_and_changes_something():
    for name in VARIANTS:
        assert recipe("370m", variant=name) != recipe("370m")
    assert recipe("370m", variant="code", learning_rate=1e-6).learning_rate == 1e-6
    with pytest.raises(UserError, match="variant='authors'.*code_schedule"):
        recipe("370m", variant="authors")
