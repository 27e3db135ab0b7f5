"""Rows of greedy generation: our loop beside transformers' `generate`, from the first new token to the last; reading the prompt is not timed."""
import copy, time

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness import Found, alternate, no_bf16
from benchmarks.limits import reads_per_second
from benchmarks.models import DTYPES, models, shape, some_ids
from biomamba.decoding import Decoder, prefill
from biomamba.generation import stream
from biomamba.mamba2 import BioMambaForCausalLM, mamba2_config, new_model
from biomamba.steps import END, PAD, wrap_tokenizer

PROMPT, NEW = 10, 64   # tokens


def word_tokenizer(vocabulary: int):
    "One word an id, so that every token is a piece of text."
    from tokenizers import Tokenizer, models as kinds
    return wrap_tokenizer(Tokenizer(kinds.WordLevel({END: 0, PAD: 1, **{f"word{i}": i for i in range(2, vocabulary)}}, unk_token=END)))


def pace(stamps: list[float]) -> float:  # tokens a second
    "From the first new token to the last."
    assert len(stamps) > 1, f"{len(stamps)} tokens were written: generation stopped early"
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


class Clock(BaseStreamer):
    "Notes when each new token comes."
    def __init__(self): self.stamps, self.prompt = [], True
    def put(self, value):
        if not self.prompt: self.stamps.append(time.perf_counter())
        self.prompt = False
    def end(self): pass


def stock_pace(model: torch.nn.Module, ids: Tensor, new: int) -> float:  # tokens a second
    "transformers' greedy `generate`."
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=clock)
    assert len(clock.stamps) == new
    return pace(clock.stamps)


def our_pace(decoder: Decoder, tokenizer, ids: Tensor, new: int) -> float:  # tokens a second
    "Our `stream`, text included."
    return pace([time.perf_counter() for _ in stream(decoder, tokenizer, ids[0].tolist(), max_new_tokens=new, temperature=0)])


def endless(model: torch.nn.Module) -> torch.nn.Module:
    "A model that does not stop at an end of text."
    model.generation_config.eos_token_id = None
    return model.eval()


def weight_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    "What a token has to read at least: every weight once, the tied head included; states and activations are not counted."
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def decoding(quick: bool) -> Found:
    "One text at a time; bf16 means weights in bf16, for stock too."
    chosen, new = shape(quick), 8 if quick else NEW
    ours, stock = map(endless, models(chosen))
    ids, tokenizer, runs = some_ids(chosen, 1, PROMPT), word_tokenizer(min(chosen.vocabulary, 50_277)), {}
    for name, dtype in DTYPES.items():
        decoder, other = Decoder(ours, dtype), copy.deepcopy(stock).to(dtype)
        runs[f"ours {name}"] = lambda decoder=decoder: our_pace(decoder, tokenizer, ids, new)
        runs[f"stock {name}"] = lambda other=other: stock_pace(other, ids, new)
    reads = lambda: {f"ours {name}": reads_per_second(weight_bytes(ours, dtype), quick) for name, dtype in DTYPES.items()}
    before, values, after = reads(), alternate(runs, quick), reads()
    limits = {name: max(before[name], after[name]) for name in before}
    return Found(values, limits, f"{PROMPT} random ids, {new} new tokens", no_bf16(), {f"reads_per_second_{name.split()[1]}": v for name, v in limits.items()})


def loop(
    decoder: Decoder,
    ids: Tensor,   # (rows, T)
    new: int,
):  # () → tokens a second, all rows together; each call goes on where the last one ended
    "Read the prompts once; return what writes `new` tokens of each."
    logits, cache = prefill(decoder.model, ids, dtype=decoder.dtype)
    batch, last = decoder.batch(len(ids)), [logits.argmax(-1)]
    for row in range(len(ids)): batch.put(row, cache, row)
    def run() -> float:
        began = time.perf_counter()
        for _ in range(new): last[0] = decoder.step(batch, last[0]).argmax(-1)
        return len(ids) * new / (time.perf_counter() - began)
    return run


def our_model(quick: bool) -> BioMambaForCausalLM:
    "Fresh weights of the shape that is measured."
    return new_model(mamba2_config(shape(quick)), seed=0).eval()


def contexts(quick: bool) -> Found:
    "The same loop after a short and after a long prompt, bf16."
    decoder, new = Decoder(our_model(quick), torch.bfloat16), 8 if quick else NEW
    lengths = {"short prompt": 10, "long prompt": 200 if quick else 10_000}
    runs = {name: loop(decoder, some_ids(shape(quick), 1, n), new) for name, n in lengths.items()}
    return Found(alternate(runs, quick, 5), data=f"{new} new tokens", untargeted=no_bf16(), facts=lengths)


def batches(quick: bool) -> Found:
    "The same loop with one row and with sixteen, bf16."
    decoder, new = Decoder(our_model(quick), torch.bfloat16), 8 if quick else NEW
    runs = {f"batch {n}": loop(decoder, some_ids(shape(quick), n, PROMPT), new) for n in (1, 16)}
    return Found(alternate(runs, quick, 5), data=f"{PROMPT} random ids, {new} new tokens of each row", untargeted=no_bf16())
