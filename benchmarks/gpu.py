"""What a GPU computes, and how fast: python -m benchmarks.gpu [CHECK ...], or `make gpu-check`.

Every check holds what the card computes to the CPU in fp32 or fp64: the kernels alone, the model at every scale, a training run, what
is written greedily. Beside it: tokens a second of whole optimizer steps and their peak memory beside the plan's, at every scale;
upstream's own model and stock transformers with the same weights. Writes benchmarks/gpu.json after every check, with the name of the
card, and ends with code 1 where a number misses its bound. Without a GPU it says so and ends with code 0.
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ROOT
from biomamba import mamba2
from biomamba.checkpointing import State
from biomamba.decoding import Decoder
from biomamba.generation import generate
from biomamba.mamba2 import cuda_kernels, mamba2_config, new_model
from biomamba.optim import Average, make_optimizer
from biomamba.packing import IGNORE, Batch, fill
from biomamba.perplexity import autocast
from biomamba.plan import fitting_batch, memory_parts, training_flops
from biomamba.recipe import Recipe, UserError, recipe
from biomamba.runs import code_version, version_of, write_atomic
from biomamba.ssd import chunk_scan

RESULTS = ROOT / "benchmarks" / "gpu.json"
PACKAGES = ("mamba_ssm", "causal_conv1d", "triton", "transformers")
WAYS = ("fp32 torch", "fp32 kernels", "bf16 torch", "bf16 kernels")
# Largest relative distance: of a kernel's values and gradients; of what sets a model's losses apart; of any parameter's gradient. Triton multiplies fp32 in TF32.
KERNEL = {"fp32 torch": 1e-4, "fp32 kernels": 5e-3, "bf16 torch": 3e-2, "bf16 kernels": 3e-2}
LOSSES = {"fp32 torch": 1e-4, "fp32 kernels": 1e-2, "bf16 torch": 1e-1, "bf16 kernels": 1e-1}
GRADIENTS = {"fp32 torch": 1e-3, "fp32 kernels": 5e-2, "bf16 torch": 2e-1, "bf16 kernels": 2e-1}
MOST_ROWS = 16   # times 1,024 tokens in one forward pass


@contextlib.contextmanager
def way(name: str):
    "Within the block the GPU runs torch code where the name says so, and the kernels elsewhere."
    found = mamba2.kernels_for
    if name.endswith("torch"): mamba2.kernels_for = lambda x: None
    try: yield
    finally: mamba2.kernels_for = found


def apart(a: Tensor, b: Tensor) -> float:
    "Distance relative to the norm of b, in fp64."
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def text(chosen: Recipe, tokens: int, seed: int) -> Batch:
    "One row of documents of random ids, their lengths spread like those of abstracts, as training lays them."
    g, sequences, left = torch.Generator().manual_seed(seed), [], tokens
    while left:
        drawn = int(torch.empty(1).log_normal_(5.55, 0.5, generator=g).clamp(8, chosen.max_tokens))
        n = left if left - drawn < 8 else drawn
        sequences.append(torch.randint(2, chosen.vocabulary, (n + 1,), generator=g).numpy())
        left -= n
    return fill(sequences, [list(range(len(sequences)))])


def median_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    "Of calls, two first ones apart, each until the GPU has ended it."
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def matrix_peak(size: int = 8192) -> float:  # 10¹² FLOPs a second
    "The card's own matrix product in bf16."
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b) / 1e12


# ---------------------------------------------------------------- the kernels alone

def scan_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    "Two rows of three documents: x, dt, A, B, C, D, dt_bias, and seq_idx; two groups."
    g, (R, T, H, P, G, N) = torch.Generator().manual_seed(0), (2, 700, 8, 64, 2, 128)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    values = [draw(R, T, H, P), draw(R, T, H) - 2, -draw(H).exp(), draw(R, T, G, N) / N**0.5, draw(R, T, G, N), draw(H), 0.1 * draw(H)]
    kinds = [torch.float32 if v.ndim == 1 else dtype for v in values]
    ids = torch.tensor([[0] * 300 + [1] * 17 + [2] * 383, [0] * 64 + [1] * 512 + [2] * 124], dtype=torch.int32)
    return [v.to("cuda", k).requires_grad_() for v, k in zip(values, kinds)], ids.cuda()


def with_gradients(f: Callable, values: list[Tensor]) -> list[Tensor]:
    "What a function gives, and the gradient of every input under one weighting of its outputs."
    y = f(*values)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device, y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), values)]


def exact(values: list[Tensor]) -> list[Tensor]:
    "The same numbers in fp64 on the CPU."
    return [v.detach().cpu().double().requires_grad_() for v in values]


def scans(dtype: torch.dtype) -> dict:  # way → input → relative distance
    "The scan beside ours in fp64."
    inputs, ids = scan_inputs(dtype)
    def run(f, values, ids): return with_gradients(lambda x, dt, A, B, C, D, bias: f(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True, seq_idx=ids), values)
    wanted, names = run(chunk_scan, exact(inputs), ids.cpu()), ("y", "x", "dt", "A", "B", "C", "D", "dt_bias")
    return {path: {n: apart(a, b) for n, a, b in zip(names, run(f, inputs, ids), wanted)} for path, f in (("torch", chunk_scan), ("kernels", cuda_kernels().scan))}


def convolutions(dtype: torch.dtype) -> dict:
    "The convolution beside ours in fp64."
    _, ids = scan_inputs(dtype)
    inputs = [torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_() for shape in ((2, 700, 96), (96, 1, 4), (96,))]
    def run(values, ids):
        conv = torch.nn.Conv1d(96, 96, 4, groups=96, device="meta")
        def f(x, weight, bias):
            conv._parameters |= {"weight": weight, "bias": bias}
            return mamba2.convolve(x, conv, ids, None)
        return with_gradients(f, values)
    wanted, found = run(exact(inputs), ids.cpu()), {}
    for path in ("torch", "kernels"):
        with way(path): found[path] = {n: apart(a, b) for n, a, b in zip(("y", "x", "weight", "bias"), run(inputs, ids), wanted)}
    return found


def norms(dtype: torch.dtype) -> dict:
    "The gated norm beside ours in fp64."
    inputs = [torch.randn(2, 700, 512, device="cuda", dtype=dtype).requires_grad_() for _ in range(2)] + [torch.rand(512, device="cuda").requires_grad_()]
    run = lambda values: with_gradients(lambda x, gate, weight: mamba2.normalize(x, gate, weight, 1e-5, 256), values)
    wanted, found = run(exact(inputs)), {}
    for path in ("torch", "kernels"):
        with way(path): found[path] = {n: apart(a, b) for n, a, b in zip(("y", "x", "gate", "weight"), run(inputs), wanted)}
    return found


def kernels() -> dict:
    "Scan, convolution and norm, by kernel and by torch on the card, values and gradients, documents apart."
    if cuda_kernels() is None: raise UserError("mamba-ssm and causal-conv1d cannot be imported; `pip install biomamba[cuda]` installs them")
    found = {f"{what}, {kind} {path}": errors for what, check in (("scan", scans), ("convolution", convolutions), ("norm", norms))
             for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) for path, errors in check(dtype).items()}
    return {"relative": found, "bounds": KERNEL, "holds": all(e <= KERNEL[name.split(", ")[1]] for name, errors in found.items() for e in errors.values())}


# ---------------------------------------------------------------- a whole model, at every scale

def losses(model: torch.nn.Module, batch: Batch, precision: str) -> Tensor:  # (tokens,), on the CPU
    "Of every target, without gradients."
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad(), autocast(precision, batch.input_ids.device):
        return model(input_ids=batch.input_ids, seq_idx=batch.seq_idx, targets=batch.targets, reduction="none").loss[0].float().cpu()


def gradients(model: torch.nn.Module, batch: Batch, precision: str) -> dict[str, Tensor]:
    "Of the mean loss, for every parameter, on the CPU."
    batch = batch.to(next(model.parameters()).device)
    model.zero_grad(set_to_none=True)
    with autocast(precision, batch.input_ids.device): loss = model(input_ids=batch.input_ids, seq_idx=batch.seq_idx, targets=batch.targets).loss
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def packing_error(model: torch.nn.Module, batch: Batch) -> float:  # nats
    "A document packed, beside the same alone, with the kernels in fp32: the largest difference of a target's loss."
    mine = batch.seq_idx[0] == 1
    alone = Batch(batch.input_ids[:, mine], torch.zeros(1, int(mine.sum()), dtype=torch.int32), batch.targets[:, mine], 1)
    return (losses(model, alone, "fp32") - losses(model, batch, "fp32")[mine]).abs().max().item()


def parity(model: torch.nn.Module, chosen: Recipe) -> dict:
    "Losses of packed documents, and up to 370m the gradients, beside the CPU in fp32; leaves the model on the GPU."
    batch, small, found, slopes = text(chosen, 1024, seed=0), chosen.scale in ("tiny", "130m", "370m"), {}, {}
    centred = lambda v: v - v.mean()
    wanted, wanted_slopes = losses(model, batch, "fp32"), gradients(model, batch, "fp32") if small else {}
    model.cuda()
    for name in WAYS:
        with way(name):
            found[name] = apart(centred(losses(model, batch, name[:4])), centred(wanted))
            if small: slopes[name] = max(apart(g, wanted_slopes[n]) for n, g in gradients(model, batch, name[:4]).items())
    return {"losses": found, "gradients": slopes, "packed_against_alone": packing_error(model, batch)}


def one_step(state: State, batch: Batch, chosen: Recipe, learning_rate: float) -> float:  # the mean loss
    "Forward, backward, clipping, AdamW and average: an optimizer step of one micro-batch."
    batch = batch.to(next(state.model.parameters()).device)
    with autocast(chosen.precision, batch.input_ids.device): loss = state.model(input_ids=batch.input_ids, seq_idx=batch.seq_idx, targets=batch.targets).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), chosen.clip)
    for group in state.optimizer.param_groups: group["lr"] = learning_rate * group["factor"]
    state.optimizer.step()
    state.average.update(state.model)
    state.optimizer.zero_grad()
    return loss.item()


def with_state(model: torch.nn.Module, chosen: Recipe) -> State: return State(model, make_optimizer(model, chosen), Average(model, 0.99))


def speed(model: torch.nn.Module, chosen: Recipe, kernels: bool = True) -> dict:
    "Optimizer steps in bf16 with as many tokens as the plan says fit, at most 16 × 1,024; memory beside what the plan says of it."
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    rows = min(MOST_ROWS, fitting_batch(chosen, total, kernels)) if kernels else 4
    chosen = dataclasses.replace(chosen, precision="bf16", device_batch=rows)
    batch, state = text(chosen, rows * chosen.max_tokens, seed=0), with_state(model, chosen)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with way("kernels" if kernels else "torch"): seconds = median_seconds(lambda: one_step(state, batch, chosen, 1e-6))
    pace, peak = batch.tokens / seconds, matrix_peak()
    return {"tokens": batch.tokens, "documents": batch.documents, "tokens_per_second": pace, "tflops": training_flops(chosen, pace) / 1e12, "matrix_peak_tflops": peak,
            "share_of_peak": training_flops(chosen, pace) / 1e12 / peak, "memory_gb": torch.cuda.max_memory_allocated() / 1e9, "planned_gb": sum(memory_parts(chosen, kernels).values())}


def scale(name: str) -> dict:
    "One scale: what it computes beside the CPU, and how fast a step is."
    chosen = recipe(name, precision="bf16")
    model = new_model(mamba2_config(chosen), seed=0)
    same = parity(model, chosen)
    holds = all(same["losses"][w] <= LOSSES[w] for w in WAYS) and all(e <= GRADIENTS[w] for w, e in same["gradients"].items()) and same["packed_against_alone"] < 2e-2
    without = {"without_kernels": speed(model, chosen, kernels=False)} if name == "130m" else {}
    return {"parity": same, "step": speed(model, chosen), **without, "bounds": {"losses": LOSSES, "gradients": GRADIENTS}, "holds": holds}


def training(steps: int = 20) -> dict:
    "Optimizer steps at scale tiny in fp32 from one base on the same documents: losses on the card beside those on the CPU."
    chosen, found = recipe("tiny", steps=steps), {}
    for where in ("cpu", "cuda"):
        state = with_state(new_model(mamba2_config(chosen), seed=0).to(where), chosen)
        found[where] = [one_step(state, text(chosen, 4096, seed=100 + i), chosen, chosen.learning_rate) for i in range(steps)]
    difference = float(np.abs(np.subtract(found["cpu"], found["cuda"])).max())
    return {"losses": found, "largest_difference": difference, "holds": difference < 5e-3}


# ---------------------------------------------------------------- beside others, and writing

def upstream_model(ours: torch.nn.Module) -> torch.nn.Module:
    "mamba-ssm's own language model with our weights."
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    from biomamba.checkpoints import config_to_state_spaces, to_state_spaces
    known = {f.name for f in dataclasses.fields(MambaConfig)}
    model = MambaLMHeadModel(MambaConfig(**{k: v for k, v in config_to_state_spaces(ours.config).items() if k in known}), device="cuda")
    model.load_state_dict(to_state_spaces(ours.state_dict()))
    return model.train()


def beside(rows: int = 8) -> dict:
    "Forward and backward of rows of 1,024 at 130m under bf16 autocast, same weights: ours, upstream's model with its fused block, stock transformers, which has room for one row."
    chosen, found = recipe("130m"), {}
    ids = torch.randint(2, chosen.vocabulary, (rows, chosen.max_tokens), generator=torch.Generator().manual_seed(0)).cuda()
    ours = new_model(mamba2_config(chosen), seed=0).cuda()
    aims = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    def measure(name, model, ids, loss_of):
        last = []
        def step():
            model.zero_grad(set_to_none=True)
            with autocast("bf16", ids.device): loss = loss_of(ids)
            loss.backward()
            last[:] = [loss.item()]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pace = ids.numel() / median_seconds(step)
        found[name] = {"rows": len(ids), "tokens_per_second": pace, "memory_gb": torch.cuda.max_memory_allocated() / 1e9, "loss": last[0]}
    measure("ours", ours, ids, lambda ids: ours(input_ids=ids, targets=aims[:len(ids)]).loss)
    measure("ours, one row", ours, ids[:1], lambda ids: ours(input_ids=ids, targets=aims[:len(ids)]).loss)
    theirs = upstream_model(ours)
    measure("upstream", theirs, ids, lambda ids: F.cross_entropy(theirs(ids).logits.float().flatten(0, 1), aims.flatten(), ignore_index=IGNORE))
    stock = mamba2.Mamba2ForCausalLM(ours.config).cuda().train()
    stock.load_state_dict(ours.state_dict())
    measure("stock, one row", stock, ids[:1], lambda ids: stock(input_ids=ids, labels=ids, use_cache=False).loss)
    return {"paths": found, "holds": abs(found["ours"]["loss"] - found["upstream"]["loss"]) < 0.02}


def writing(new: int = 32) -> dict:
    "Greedy tokens of sixteen prompts at 130m in fp32 by torch code, beside the CPU's; and the pace in bf16."
    from benchmarks.decoding import endless, loop, some_ids, word_tokenizer
    chosen = recipe("130m")
    model, tokenizer, pace = endless(new_model(mamba2_config(chosen), seed=0)), word_tokenizer(50_277), {}
    prompts = [ids.tolist() for ids in some_ids(chosen, 16, 40)]
    answers = lambda: [c.tokens for c in generate(model, tokenizer, prompts, max_new_tokens=new)]
    here = answers()
    model.cuda()
    with way("torch"): there = answers()
    same = sum(a == b for x, y in zip(here, there) for a, b in zip(x, y)) / sum(map(len, here))
    decoder = Decoder(model, torch.bfloat16)
    for rows in (1, 16, 256):
        run = loop(decoder, some_ids(chosen, rows, 40).cuda(), 64)
        run()
        pace[f"batch {rows}"] = statistics.median(run() for _ in range(5))
    return {"same_tokens": same, "tokens_per_second": pace, "holds": same > 0.99}


CHECKS: dict[str, Callable[[], dict]] = {"kernels": kernels, "130m": lambda: scale("130m"), "training": training, "beside": beside, "writing": writing,
                                         **{name: (lambda name=name: scale(name)) for name in ("tiny", "370m", "780m", "1.3b", "2.7b")}}


def card() -> dict:
    "The card and the versions that the numbers belong to."
    about = torch.cuda.get_device_properties(0)
    return {"gpu": about.name, "memory_gb": about.total_memory / 1e9, "cuda": torch.version.cuda, "torch": torch.__version__, **{n: version_of(n) for n in PACKAGES}}


def run(name: str, path: Path) -> dict:
    "One check; its results join those of the same card."
    gc.collect()
    torch.cuda.empty_cache()
    began = time.perf_counter()
    found = CHECKS[name]() | {"seconds": round(time.perf_counter() - began, 1), **code_version()}
    stored = json.loads(path.read_text()) if path.exists() else {}
    kept = stored["checks"] if stored.get("card") == card() else {}
    write_atomic(path, json.dumps({"card": card(), "checks": kept | {name: found}}, indent=1) + "\n")
    return found


def main() -> int:  # the exit code
    "Run the checks."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", choices=[*CHECKS, []], help=f"all where none is named: {', '.join(CHECKS)}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is in reach of torch: nothing was checked")
        return 0
    missed = []
    for name in asked.checks or CHECKS:
        print(f"{name} …", file=sys.stderr, flush=True)    # the first use of every kernel compiles and tunes it: minutes
        found = run(name, asked.results)
        print(name, json.dumps({k: v for k, v in found.items() if k not in ("bounds", "losses")}), flush=True)
        if not found["holds"]: missed.append(name)
    print(f"{len(asked.checks or CHECKS)} checks on one {card()['gpu']}: " + (f"beyond their bounds: {', '.join(missed)}" if missed else "every number is within its bound"))
    return 1 if missed else 0


if __name__ == "__main__": sys.exit(main())
