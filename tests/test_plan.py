"The plan of a run against the model that is trained, and against arithmetic by hand."
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from biomamba.paper import SCALES, published
from biomamba.plan import (HARDWARE, Hardware, activation_bytes, fitting_batch, linear_weights, mean_tokens, memory_parts, optimizer_steps,
                           parameters, plan, sequences_seen, step_seconds, training_flops)
from biomamba.runs import UserError, recipe


@pytest.mark.parametrize("scale", ["tiny", *SCALES])
def test_parameters_are_those_of_the_model(scale):
    from biomamba.mamba2 import BioMambaForCausalLM, mamba2_config
    r = recipe(scale)
    with torch.device("meta"):
        model = BioMambaForCausalLM(mamba2_config(r))
    assert sum(p.numel() for p in model.parameters()) == parameters(r)["total"]
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(matrices) == linear_weights(r)


@pytest.mark.parametrize("scale", SCALES)
def test_published_steps_follow_from_the_sequences(scale):
    r = recipe(scale)
    assert optimizer_steps(replace(r, steps=None)) == published(scale)["steps"] == plan(r).steps
    assert plan(r).sequences == r.epochs * r.sequences


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 13, 40])
def test_sequences_are_those_of_a_walk_through_the_epochs(steps):
    r = recipe("130m", sequences=100, sequences_per_step=17, steps=steps)
    sizes = [min(17, 100 - start) for start in range(0, 100, 17)]
    assert sequences_seen(r) == sum(sizes[step % len(sizes)] for step in range(steps))


def test_a_document_counts_no_more_than_a_sequence_holds():
    r = recipe("130m", mixture={"c4": 0.5, "wikipedia": 0.5})
    assert mean_tokens(r, {"c4": 100, "wikipedia": 9000}) == (100 + 1024) / 2
    assert mean_tokens(replace(r, long_documents="carry"), {"c4": 100, "wikipedia": 9000}) == (100 + 9000) / 2


def test_shares_of_tokens_are_shares_of_sequences_by_their_length():
    r = recipe("130m", mixture={"c4": 0.8, "wikipedia": 0.2}, mixture_by="tokens")
    mean = mean_tokens(r, {"c4": 50, "wikipedia": 1000})
    assert mean == pytest.approx(1 / (0.8 / 50 + 0.2 / 1000))  # 80 tokens of c4 are 1.6 sequences, 20 of Wikipedia 0.02


def test_a_fully_padded_mixture_costs_what_the_padded_rows_cost():
    full = plan(recipe("130m"), tokens_per_document=dict.fromkeys(("pubmed", "c4", "wikipedia"), 1024))
    assert (full.tokens, full.flops, full.hours) == (full.tokens_padded, full.flops_padded, full.hours_padded)


def test_hours_scale_with_devices_utilization_and_speed():
    one = plan(recipe("780m"), "h100", utilization=0.2).hours
    assert plan(recipe("780m"), "h100", devices=4, utilization=0.4).hours == pytest.approx(one / 8)
    slow = Hardware("half", 80, HARDWARE["h100"].peak_tflops_bf16 / 2)
    assert plan(recipe("780m"), slow, utilization=0.2).hours == pytest.approx(2 * one)
    assert plan(recipe("780m", precision="fp32"), "h100").hours is None


def test_flops_by_hand():
    r = recipe("370m")
    linear = 48 * (1024 * (2 * 2048 + 2 * 128 + 32) + 2048 * 1024) + 50288 * 1024
    scan = 48 * (2 * 256 * 128 + 32 * (2 * 256 * 64 + 4 * 128 * 64))
    assert training_flops(r, 1) == 6 * linear + 3 * scan


def test_twenty_bytes_a_parameter_before_the_first_activation():
    parts = memory_parts(recipe("1.3b", precision="fp32"))
    held = sum(gb for name, gb in parts.items() if name not in ("activations", "logits of one chunk"))
    assert held * 1e9 == pytest.approx(20 * parameters(recipe("1.3b"))["total"])


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_activations_are_those_that_the_model_keeps(precision):
    from biomamba.mamba2 import mamba2_config, new_model
    r, kept = recipe("tiny", precision=precision), {}
    model = new_model(mamba2_config(r), 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address taken
        return tensor
    ids = torch.randint(0, r.vocabulary, (2, 1024), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, seq_idx=(torch.arange(1024) // 300).int().expand(2, -1).contiguous(), targets=ids)
    measured = sum(size for size, _ in kept.values()) / ids.numel()
    assert 0.85 < measured / activation_bytes(r, kernels=False) < 1.15


def test_warnings_come_when_due_and_only_then():
    assert not any(plan(recipe(s)).warnings for s in ("130m", "370m", "780m", "1.3b"))
    assert "moving average" in plan(recipe("130m", steps=300)).warnings[0]
    assert "74% base" in plan(recipe("130m", steps=300)).warnings[0]
    assert not plan(recipe("130m", steps=300, ema_decay=None)).warnings


@pytest.mark.parametrize("scale, hardware", [("780m", "24gb"), ("2.7b", "h100"), ("370m", "16gb")])
def test_the_micro_batch_that_a_warning_offers_fits(scale, hardware):
    r = replace(recipe(scale), micro_batch_tokens=16384)
    (warning,) = plan(r, hardware).warnings
    offered = int(warning.split("micro_batch_tokens=")[1].split()[0])
    assert not plan(replace(r, micro_batch_tokens=offered), hardware).warnings
    assert plan(replace(r, micro_batch_tokens=offered + 1024), hardware).warnings


def test_a_model_too_large_for_any_micro_batch_is_said_to_be():
    assert 'still 60 GB; sharding="full" on several devices' in plan(recipe("2.7b"), "16gb").warnings[0]


def test_advice_is_in_the_field_that_counts_and_knows_recomputation():
    (warning,) = plan(recipe("780m", device_batch=64), "24gb").warnings
    assert "micro_batch_tokens" not in warning
    assert not plan(recipe("780m", device_batch=int(warning.split("device_batch=")[1].split()[0])), "24gb").warnings
    narrow = Hardware("18 GB card", 18, 97.5)
    (warning,) = plan(recipe("780m"), narrow).warnings
    offered = int(warning.split("gradient_checkpointing=True and micro_batch_tokens=")[1].split()[0])
    assert not plan(recipe("780m", gradient_checkpointing=True, micro_batch_tokens=offered), narrow).warnings


def test_another_vocabulary_is_warned_of_until_tokens_are_given():
    assert "vocabulary of 2,048" in plan(recipe("tiny")).warnings[0]
    given = plan(recipe("tiny"), tokens_per_document={"pubmed": 400, "c4": 600, "wikipedia": 900})
    assert not given.warnings and given.origin == "Tokens per document as given"


def test_it_shows_itself_everywhere_with_its_warnings():
    made = plan(recipe("1.3b", steps=600), "24gb")
    for page in (str(made), made._repr_html_(), made._repr_markdown_()):
        assert "1,343,757,312" in page and all(warning in page for warning in made.warnings) and len(made.warnings) == 2
    assert "CPU" in str(plan(recipe("tiny")))


@pytest.mark.parametrize("call, sentence", [
    (lambda: plan(recipe("tiny", steps=None)), "neither steps nor sequences"),
    (lambda: plan(recipe("130m"), "tpu"), "h100, 24gb, 16gb, cpu"),
    (lambda: plan(recipe("130m"), utilization=0), "utilization=0"),
    (lambda: plan(recipe("130m"), devices=0), "devices=0"),
    (lambda: plan(recipe("130m"), devices=1.5), "devices=1.5"),
    (lambda: plan(recipe("130m"), tokens_per_document={"c4": -3}), r"\['c4'\] is -3"),
    (lambda: plan(recipe("130m"), tokens_per_document={"c4": float("nan")}), "is nan"),
    (lambda: plan(recipe("130m", mixture={"patents": 1.0})), "patents")])
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_planning_loads_nothing():
    code = ("import sys; from biomamba.plan import plan; from biomamba.runs import recipe; str(plan(recipe('2.7b'))); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- what fits, and how far it scales

@pytest.mark.parametrize("scale", SCALES)
def test_the_papers_own_setting_is_predicted_within_a_quarter(scale):
    tokens = published(scale)["per_device_batch"] * 1024
    predicted = sum(memory_parts(recipe(scale, micro_batch_tokens=tokens), logits_tokens=tokens).values())
    assert 0.75 < predicted / published(scale)["peak_memory_gb"] < 1.25


def test_recomputed_activations_are_those_that_the_model_keeps():
    from biomamba.mamba2 import mamba2_config, new_model
    r, kept = recipe("tiny", gradient_checkpointing=True), {}
    model = new_model(mamba2_config(r), 0)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor
    ids = torch.randint(0, r.vocabulary, (2, 1024), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, seq_idx=torch.zeros_like(ids).int(), targets=ids)
    measured = sum(size for size, _ in kept.values()) / ids.numel()
    between_layers = 4 * r.d_model * r.layers           # what stays until the backward pass; one layer more exists while it runs
    assert between_layers < measured < activation_bytes(r, kernels=False)


@pytest.mark.parametrize("scale, memory, fields", [("130m", 16, {}), ("370m", 24, {}), ("780m", 24, {"gradient_checkpointing": True}), ("2.7b", 80, {"sharding": "full"})])
def test_the_batch_that_fits_is_the_largest(scale, memory, fields):
    devices = 4 if "sharding" in fields else 1
    n = fitting_batch(recipe(scale, **fields), memory, devices=devices)
    need = lambda n: sum(memory_parts(recipe(scale, device_batch=n, **fields), devices=devices).values())
    most = -(-recipe(scale).sequences_per_step // devices)
    assert need(n) <= 0.9 * memory and (n == most or need(n + 1) > 0.9 * memory)


def test_a_card_too_small_for_one_sequence_is_said_to_be():
    with pytest.raises(UserError, match="one sequence of 1,024 tokens at scale 2.7b .* gradient_checkpointing=True, sharding='full'"):
        fitting_batch(recipe("2.7b"), 24)


def test_four_cards_hold_the_papers_largest_run_and_more_do_not_help():
    r = recipe("2.7b", sharding="full", device_batch=6)
    each, alone = (sum(memory_parts(x, devices=4).values()) for x in (r, recipe("2.7b", device_batch=6)))
    assert each < 0.6 * alone and each < 0.9 * 80 < alone
    seconds = {n: sum(step_seconds(r, HARDWARE["h100"], n)[part] for part in ("compute", "exchange")) for n in (4, 8, 64, 1024)}
    assert seconds[8] < seconds[4] and seconds[64] > 0.9 * seconds[8] and step_seconds(r, HARDWARE["h100"], 1024)["devices with work"] == 192
