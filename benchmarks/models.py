"""Rows of the model: a training step, its memory, scoring, and time against length, beside stock transformers with the same weights."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2ForCausalLM

from benchmarks.harness import ROUNDS, Found, Skip, alternate, free_memory, fresh, no_bf16, peak_memory, rate
from benchmarks.limits import flops_per_token, matrix_peak
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.perplexity import autocast
from biomamba.recipe import Recipe, recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STOCK_STEP_GB = 11.5                                       # what stock's step at 130m and 1,024 tokens needs, and some room
STOCK_BYTES, LENGTH_LAYERS, LENGTHS = 420_000, 2, tuple(2**k for k in range(8, 15))  # bytes: per token and layer, forward and backward


def shape(
    quick: bool,
    scale: str = "130m",
) -> Recipe:
    "The recipe whose shape is measured, or a very small one."
    return recipe("tiny", d_model=64, layers=2, vocabulary=512) if quick else recipe(scale)


def models(
    chosen: Recipe,
    **options,  # of `mamba2_config`
) -> tuple[torch.nn.Module, torch.nn.Module]:  # ours and stock
    "Both models with the same weights."
    config = mamba2_config(chosen, **options)
    ours, stock = new_model(config, seed=0), Mamba2ForCausalLM(config)
    stock.load_state_dict(ours.state_dict())
    return ours, stock.train()


def some_ids(
    chosen: Recipe,
    rows: int,
    tokens: int,  # of each row
) -> Tensor:      # (rows, tokens)
    "Ids at random, the same each time."
    return torch.randint(2, chosen.vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def loss_of(
    model: torch.nn.Module,
    ids: Tensor,                  # (rows, tokens)
    labels: Tensor | None = None, # (rows, tokens), not shifted, −100 where not scored; None: the ids
    **inputs,                     # of the model
) -> Tensor:
    "Mean loss of the next tokens: ours by `targets`, stock by its own `labels`."
    labels = ids if labels is None else labels
    if type(model) is Mamba2ForCausalLM: return model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss
    return model(input_ids=ids, targets=F.pad(labels[:, 1:], (0, 1), value=-100), **inputs).loss


def take_step(
    model: torch.nn.Module,
    precision: str,   # fp32 or bf16
    ids: Tensor,
    **inputs,         # of `loss_of`
) -> float:  # the loss
    "Forward and backward; no optimizer."
    model.zero_grad(set_to_none=True)
    with autocast(precision, ids.device): loss = loss_of(model, ids, **inputs)
    loss.backward()
    return loss.item()


@torch.no_grad()
def take_score(
    model: torch.nn.Module,
    precision: str,
    ids: Tensor,
) -> float:  # the mean of the losses
    "The loss of every token, without gradients."
    with autocast(precision, ids.device):
        if type(model) is not Mamba2ForCausalLM: losses = model(input_ids=ids[:, :-1], targets=ids[:, 1:], reduction="none").loss
        else: losses = F.cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.float().mean().item()


def beside_stock(
    work: Callable,            # (model, precision, ids) → loss
    chosen: Recipe,
    ids: Tensor,
    series: list[str],         # "ours bf16", "stock fp32" …: the models and precisions that are compared
    quick: bool,
) -> dict[str, list[float]]:   # series → tokens/s
    "Measure ours and stock in turns, and hold their losses to each other."
    both, losses = dict(zip(("ours", "stock"), models(chosen))), {}
    def one(name):
        who, precision = name.split()
        def keep(): losses[name] = work(both[who], precision, ids)
        return lambda: rate(ids.numel(), keep)
    values = alternate({name: one(name) for name in series}, quick)
    assert max(losses.values()) - min(losses.values()) < (0.05 if any("bf16" in name for name in series) else 1e-3), losses
    return values


def compare(
    work: Callable,
    quick: bool,
    scale: str,
    rows: int,
    tokens: int,
    series: list[str],   # the first is ours
    gradients: bool,
) -> Found:
    "A row of tokens a second: ours, stock, and the limit that the matrix products set."
    chosen, precision = shape(quick, scale), series[0].split()[1]
    peak = matrix_peak(DTYPES[precision], quick)
    values = beside_stock(work, chosen, some_ids(chosen, rows, 128 if quick else tokens), series, quick)
    peak, flops = max(peak, matrix_peak(DTYPES[precision], quick)), flops_per_token(chosen, gradients)
    return Found(values, {series[0]: peak / flops}, f"{rows} × {tokens:,} random ids", no_bf16() if precision == "bf16" else "",
                 {"peak_tflops": peak / 1e12, "gflops_per_token": flops / 1e9})


def training_step(quick: bool, series: list[str], scale: str = "130m", rows: int = 1, tokens: int = 1024) -> Found:
    "Forward and backward."
    return compare(take_step, quick, scale, rows, tokens, series, gradients=True)


def scoring(quick: bool, series: list[str], scale: str = "130m", rows: int = 1, tokens: int = 1025) -> Found:
    "Per-token losses without gradients."
    return compare(take_score, quick, scale, rows, tokens, series, gradients=False)


def step_memory(
    who: str,        # ours or stock
    precision: str,
    quick: bool,
) -> dict:  # GB of 10⁹ bytes: peak; above: peak less what was resident before the step
    "What training steps need, measured in the process that calls this; the second finds memory as the first one left it."
    chosen = shape(quick)
    config, ids = mamba2_config(chosen), some_ids(chosen, 1, 128 if quick else 1024)
    model = new_model(config, seed=0) if who == "ours" else Mamba2ForCausalLM(config).train()
    before = peak_memory(reset=True)
    for _ in range(2): take_step(model, precision, ids)
    return {"peak": peak_memory(), "above": peak_memory() - before}


def memory(quick: bool, series: list[str]) -> Found:
    "The peak of one step after another, each in a process of its own; never two at once. Stock's bf16 only where a step of it does not take minutes."
    peak_memory()
    if not quick and free_memory() < STOCK_STEP_GB:
        raise Skip(f"stock's step needs about {STOCK_STEP_GB} GB and {free_memory():.1f} GB are free")
    values = {}
    for name in series:
        if name == "stock bf16" and no_bf16() and not quick: continue
        who, precision = name.split()
        found = fresh("models:step_memory", here=quick, who=who, precision=precision, quick=quick)
        values |= {name: [found["peak"]], f"{name} above": [found["above"]]}
    return Found(values, data="1 × 1,024 random ids; the first two steps of a process, gradients included")


def backbone_step(model: torch.nn.Module, ids: Tensor) -> None:
    "Forward and backward of the layers alone."
    model.zero_grad(set_to_none=True)
    model.backbone(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()


def time_against_length(quick: bool) -> Found:
    "Layers of the 130m shape, forward and backward in fp32, at many lengths; stock as far as half the free memory carries it."
    lengths = (64, 128) if quick else LENGTHS
    ours, stock = models(recipe("130m", layers=LENGTH_LAYERS) if not quick else shape(quick), vocabulary_size=512)
    values, room = {}, 0.5 * free_memory() * 1e9
    for length in lengths:
        ids = torch.randint(2, 512, (1, length), generator=torch.Generator().manual_seed(length))
        step = lambda model: lambda: rate(length, lambda: backbone_step(model, ids))
        runs = {f"ours {length}": step(ours)} | ({f"stock {length}": step(stock)} if STOCK_BYTES * LENGTH_LAYERS * length < room else {})
        values |= alternate(runs, quick, ROUNDS if length <= 4096 else 2)
    return Found(values, data=f"{LENGTH_LAYERS} layers, fp32, one row", facts={"lengths": list(lengths)})
