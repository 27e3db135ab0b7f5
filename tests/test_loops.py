"""The loops are held to their definitions in plain PyTorch, in value and gradient, and do not depend on the threads that run them."""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba import conv, layer, loops, mamba2, ssd
from biomamba.conv import LoopConv, causal_conv
from biomamba.loops import by_loops, numbers, spread, team
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.norm import GatedNorm, LoopNorm
from biomamba.recipe import recipe
from biomamba.ssd import chunk_scan


def apart(a, b) -> float:
    "The largest distance of two lists of tensors, relative where they are not near 0."
    return max(((u.double() - v.double()).norm() / v.double().norm().clamp(min=0.1)).item() for u, v in zip(a, b, strict=True) if u is not None)


def with_gradients(function, inputs: list, seed: int = 0) -> list:
    "What a function returns, and the gradient of a random sum of it."
    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    out = function(*leaves)
    out, g = out if isinstance(out, tuple) else (out,), torch.Generator().manual_seed(seed)
    total = sum((v.float() * torch.randn(v.shape, generator=g)).sum() for v in out)
    return [*out, *torch.autograd.grad(total, leaves)]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 3), length=st.integers(1, 90), groups=st.sampled_from((1, 2)), heads=st.integers(1, 3), width=st.sampled_from((1, 5, 16)),
       state=st.sampled_from((1, 7, 16)), chunk=st.sampled_from((1, 13, 64)), documents=st.booleans(), starts=st.booleans(), seed=st.integers(0, 99))
def test_the_scan_by_loops_is_the_scan(batch, length, groups, heads, width, state, chunk, documents, starts, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    H = groups * heads
    inputs = [draw(batch, length, H, width), F.softplus(draw(batch, length, H) - 2), -draw(H).exp(), draw(batch, length, groups, state), draw(batch, length, groups, state), draw(H)]
    if starts: inputs.append(draw(batch, H, width, state))
    ids = (torch.rand(batch, length, generator=g) < 0.1).cumsum(1).int() if documents else None
    if ids is not None: ids -= ids[:, :1].clone()
    def scan(x, dt, A, B, C, D, h=None):
        return chunk_scan(x, dt, A, B, C, chunk, D, seq_idx=ids, initial_states=h, return_final_states=True)
    wide = [v.double() for v in inputs]
    assert apart(with_gradients(scan, inputs), with_gradients(scan, wide)) < 2e-4


def test_which_tensors_the_loops_take(monkeypatch):
    x = torch.zeros(2, 3)
    assert by_loops(x) and by_loops(x.bfloat16()) and by_loops(torch.nn.Parameter(x))
    assert not by_loops(x.double()) and not by_loops(x.half()) and not by_loops(x.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not by_loops(x)


def test_the_model_takes_the_loops_in_fp32_and_the_definitions_in_fp64(monkeypatch):
    used = []
    for module, names in ((ssd, ("LoopScan", "ChunkScan")), (conv, ("LoopConv", "CausalConv")), (mamba2, ("LoopNorm", "GatedNorm")), (layer, ("LoopMixer",))):
        for name in names:
            monkeypatch.setattr(module, name, type(name, (getattr(module, name),), {"apply": classmethod(lambda cls, *a, name=name, real=getattr(module, name): used.append(name) or real.apply(*a))}))
    model, ids = new_model(mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=64), 64), 0), torch.arange(20)[None]
    model(ids, labels=ids)
    assert set(used) == {"LoopMixer", "LoopNorm"}
    used.clear(); model(ids, labels=ids, use_cache=True)
    assert set(used) == {"LoopScan", "LoopConv", "LoopNorm"}
    used.clear(); model.double()(ids, labels=ids)
    assert set(used) == {"ChunkScan", "CausalConv", "GatedNorm"}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("length", (1, 3, 40))
def test_the_convolution_by_loops(dtype, length):
    g = torch.Generator().manual_seed(length)
    side, w, b = torch.randn(2, length, 30, generator=g).to(dtype), torch.randn(9, 4, generator=g), torch.randn(9, generator=g)
    ids = (torch.rand(2, length, generator=g) < 0.2).cumsum(1)
    ids -= ids[:, :1].clone()
    conv = lambda side, w, b: causal_conv(side[..., 11:20], w, b, ids)
    found, wide = with_gradients(conv, [side, w, b]), with_gradients(conv, [side.double(), w.double(), b.double()])
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert apart(found, wide) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("gated", (True, False))
@pytest.mark.parametrize("group", (24, 8))
def test_the_norm_by_loops(gated, group):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 50, 24, generator=g), torch.randn(24, generator=g)] + [torch.randn(2, 50, 24, generator=g)] * gated
    norm = lambda function: lambda x, w, z=None: function.apply(x, z, w, 1e-5, group)
    assert apart(with_gradients(norm(LoopNorm), inputs), with_gradients(norm(GatedNorm), [v.double() for v in inputs])) < 1e-5


@pytest.mark.parametrize("gated", (True, False))
def test_a_norm_of_numbers_whose_squares_overflow_is_zero_and_not_nan(gated):
    inputs = [torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 1e20, torch.ones(64)] + [torch.ones(40, 64)] * gated
    for found in with_gradients(lambda x, w, z=None: LoopNorm.apply(x, z, w, 1e-5, 64), inputs): assert torch.equal(found, torch.zeros_like(found))


def test_a_norm_under_autocast_is_rounded_once():
    x, w = torch.randn(3, 8), torch.ones(8)
    plain = LoopNorm.apply(x, None, w, 1e-5, 8)
    with torch.autocast("cpu", torch.bfloat16): rounded = LoopNorm.apply(x, None, w, 1e-5, 8)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, plain.bfloat16())


def step(threads: int, precision: str) -> list:
    "Loss and gradients of a small model on some threads."
    model, g = new_model(mamba2_config(recipe("tiny", layers=2, d_model=32, vocabulary=300), 300), 0), torch.Generator().manual_seed(0)
    ids, before = torch.randint(2, 300, (3, 150), generator=g), torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"): loss = model(ids, seq_idx=(torch.arange(150) // 40).expand(3, -1), labels=ids).loss
    loss.backward()
    torch.set_num_threads(before)
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_threads_of_our_own_give_the_same_bits(monkeypatch, precision):
    ours = step(2, precision)
    monkeypatch.setattr(loops, "_openmp", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(step(2, precision), ours, strict=True))


def test_sums_do_not_depend_on_the_number_of_threads():
    def gradients(threads):
        before, (x, w, b) = torch.get_num_threads(), (torch.randn(*s, generator=torch.Generator().manual_seed(1)) for s in ((2, 300, 40), (40, 4), (40,)))
        torch.set_num_threads(threads)
        found = with_gradients(lambda x, w, b: LoopConv.apply(x, w, b, torch.arange(300).clamp(max=3).repeat(2).int()), [x, w, b])
        torch.set_num_threads(before)
        return found
    assert all(torch.equal(a, b) for a, b in zip(gradients(1), gradients(3), strict=True))


@pytest.mark.parametrize("runtime", ("OpenMP", "threads"))
def test_a_loop_that_fails_is_an_error(monkeypatch, capfd, runtime):
    if runtime == "threads": monkeypatch.setattr(loops, "_openmp", lambda: None)
    def broken(number, of):
        if number == 1: raise ArithmeticError("broken")
    with pytest.raises((RuntimeError, ArithmeticError), match="broken|failed on one of its threads"): team(2, broken)


def test_a_smaller_team_does_all_the_work(monkeypatch):
    smaller = type("Smaller", (), {"omp_get_thread_num": lambda self: 0, "omp_get_num_threads": lambda self: 1, "GOMP_parallel": lambda self, work, *rest: work(None)})()
    seen = []
    monkeypatch.setattr(loops, "_openmp", lambda: smaller)
    spread(lambda part, first, last: seen.extend(range(first, last)), 100)
    assert sorted(seen) == list(range(100))


def test_parts_cover_every_row_once():
    for n in (0, 1, 7, 8, 9, 1000):
        seen = []
        spread(lambda part, first, last: seen.extend(range(first, last)), n, least=3)
        assert sorted(seen) == list(range(n))


def test_a_number_that_is_none_reaches_the_loss():
    model, ids = new_model(mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=64), 64), 0), torch.arange(20)[None]
    with torch.no_grad(): model.backbone.layers[0].mixer.norm.weight[3] = torch.nan
    assert model(ids, labels=ids).loss.isnan()


def test_strided_rows_are_not_copied():
    x = torch.randn(4, 6)
    line, distance = loops.rows(x[:, 2:5])
    assert distance == 6 and line[6] == x[1, 2]
    assert loops.rows(x.mT)[1] == 4 and numbers(x.bfloat16()).dtype.name == "uint16"


def test_a_parameter_can_still_be_resized():
    model, ids = new_model(mamba2_config(recipe("tiny", layers=1, d_model=32, vocabulary=64), 64), 0), torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.untyped_storage().resizable() for p in model.parameters())


FAULTS = """
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a large page would hide many small ones
from biomamba.loops import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8): torch.empty(1 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.empty(1 << 20).fill_(1)
before, kept = faults(), keep_memory()
faults()
print(before, min(faults() for _ in range(3)), kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
@pytest.mark.parametrize("told", (False, True))
def test_freed_memory_stays_with_the_process(told):
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    mine = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"} if told else {}
    before, after, kept = subprocess.run([sys.executable, "-c", FAULTS], env=bare | mine, capture_output=True, text=True, check=True).stdout.split()
    assert int(before) > 1000 and kept == str(not told)
    assert int(after) > 1000 if told else int(after) < 100


MIXED = """
import numpy as np
from room.loops import SOURCES
from room.scan_loops import mix_loop
M, ones = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
mix_loop(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.int32), ones, M, 0, 0, 1)
print(M.item())
"""


def test_what_is_kept_on_disk_is_not_taken_for_other_text(tmp_path):
    package = tmp_path / "room"
    shutil.copytree(Path(loops.__file__).parent, package, ignore=lambda folder, names: [n for n in names if n not in (*loops.ROOMS, "__init__.py")])
    (package / "__init__.py").write_text("")
    rooms = {room: (package / room).read_text() for room in ("loops.py", "lanes.py")}
    def found(room, text):
        (package / room).write_text(text)
        done = subprocess.run([sys.executable, "-c", MIXED], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
        return float(done.stdout)
    assert found("loops.py", rooms["loops.py"].replace('"biomamba", room', '"room", room')) == 1 and list(package.rglob("*.nbi"))
    changed = rooms["lanes.py"].replace("return _power(_within(x, -87, 88), 1)", "return _power(_within(x, -87, 88), 1) * 2.0")
    assert changed != rooms["lanes.py"] and found("lanes.py", changed) == 2
