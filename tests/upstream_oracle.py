"""mamba-ssm's own kernels and model on the CPU, under Triton's interpreter, beside ours; prints one JSON line of differences.

Run by test_upstream.py in a process of its own: with these stand-ins in place, transformers would bind mamba-ssm's kernels too.
"""
import contextlib
import gc
import json
import os
import sys
import types
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "0"
warnings.simplefilter("ignore")

import torch
import transformers.models.mamba2.modeling_mamba2 as stock_module  # before the stand-ins, so that its scan is its own torch one

for compiled in ("selective_scan_cuda", "causal_conv1d_cuda"): sys.modules[compiled] = types.ModuleType(compiled)

torch.set_num_threads(1)
torch.cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(multi_processor_count=1)

from biomamba import mamba2
from biomamba.checkpoints import config_to_state_spaces, to_state_spaces
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.runs import recipe
from biomamba.ssd import chunk_scan

from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from mamba_ssm.modules import mamba2 as upstream_mamba2
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from triton.runtime.autotuner import Autotuner

for tuner in (o for o in gc.get_objects() if type(o) is Autotuner): tuner.configs = tuner.configs[:1]


def conv_ref(x, weight, bias=None, seq_idx=None, activation=None): return causal_conv1d_ref(x, weight, bias, activation=activation, seq_idx=seq_idx)


def relative(a, b): return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


def scan(packed, start):
    "Outputs, last states and every gradient."
    g, T = torch.Generator().manual_seed(0), 21
    draw = lambda *shape: torch.randn(*shape, generator=g)
    v = [t.requires_grad_() for t in (draw(1, T, 2, 16), draw(1, T, 2) - 2, -draw(2).exp(), draw(1, T, 1, 16), draw(1, T, 1, 16), draw(2), draw(2) * 0.1, draw(1, 2, 16, 16))]
    ids = torch.tensor([[0] * 6 + [1] * 12 + [2] * 3], dtype=torch.int32) if packed else None
    results = []
    for f in (chunk_scan, mamba_chunk_scan_combined):
        x, dt, A, B, C, D, bias, h0 = v
        y, h = f(x, dt, A, B, C, 16, D=D, dt_bias=bias, dt_softplus=True, seq_idx=ids, initial_states=h0 if start else None, return_final_states=True)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + (h * torch.linspace(-1, 1, h.numel()).view_as(h)).sum()
        results.append([y, h, *torch.autograd.grad(loss, v if start else v[:-1])])
    names = "y state x dt A B C D dt_bias initial".split()
    return {n: relative(a, b) for n, a, b in zip(names, *results)}


def small():
    model = new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, state=16, head_dim=16), 64), 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model


def upstream_of(model):
    "mamba-ssm's model with the same weights; its compiled convolution replaced by that package's own reference."
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    config = config_to_state_spaces(model.config)
    config["ssm_cfg"] |= {"use_mem_eff_path": False, "chunk_size": 16}
    upstream_mamba2.causal_conv1d_fn = conv_ref
    upstream = MambaLMHeadModel(MambaConfig(**config | {"fused_add_norm": False}))
    upstream.load_state_dict(to_state_spaces(model.state_dict()))
    return upstream


def model(packed):
    "Logits and the gradient of every parameter, of one state dict; ours also through the kernels, as on a GPU."
    ours = small()
    upstream, stock = upstream_of(ours), stock_module.Mamba2ForCausalLM(ours.config)
    stock.load_state_dict(ours.state_dict())
    ids = torch.randint(2, 64, (1, 21), generator=torch.Generator().manual_seed(0))
    extra = dict(seq_idx=torch.tensor([[0] * 8 + [1] * 13], dtype=torch.int32)) if packed else {}
    weight = torch.linspace(-1, 1, ids.numel() * 64).view(1, -1, 64)
    def run(m, **kwargs):
        logits = m(ids, **kwargs).logits
        return logits, dict(zip([n for n, _ in m.named_parameters()], torch.autograd.grad((logits * weight).sum(), list(m.parameters()))))
    expected, gradients = run(upstream, **extra)
    gradients = {n.replace("backbone.embedding.", "backbone.embeddings."): g for n, g in gradients.items()}
    results = {"ours": run(ours, **extra)}
    if not packed: results["stock"] = run(stock)
    mamba2.kernels_for = lambda x: mamba2.cuda_kernels()._replace(convolve=conv_ref)
    ours.config.chunk_size = 16
    for layer in ours.backbone.layers: layer.mixer.chunk_size = 16
    results["kernels"] = run(ours, **extra)
    out = {f"{k} logits": (logits - expected).abs().max().item() for k, (logits, _) in results.items()}
    for k, (_, grads) in results.items():
        assert grads.keys() == gradients.keys()
        out[f"{k} gradients"] = max(((grads[n] - g).norm() / g.norm().clamp(min=1e-6)).item() for n, g in gradients.items())
    return out


if __name__ == "__main__":
    kind, *flags = sys.argv[1:]
    print(json.dumps(dict(scan=scan, model=model)[kind](*(f == "1" for f in flags))))
