"""Rows of text: tokenizing, how full packed rows are, and documents a second of a packed and of a padded training step."""
import itertools, os
from pathlib import Path

import numpy as np

from benchmarks.harness import ROUNDS, Found, alternate, middle, no_bf16, rate
from biomamba.corpus import with_ends
from biomamba.documents import read_documents
from biomamba.duplicates import HASHES, SHINGLE, band_hashes, shingles, signature
from biomamba.packing import IGNORE, Batch, best_fit, micro_batches, padded_batches, step_indices
from biomamba.records import Document
from biomamba.recipe import recipe
from biomamba.sample import sample_documents
from biomamba.steps import train_tokenizer
from biomamba.storage import batches, tokenize

TOKENS, PER_STEP = recipe("130m").max_tokens, recipe("130m").sequences_per_step
SYNTHETIC = "BIOMAMBA_DATA is not set: the built-in sample"


def abstracts(
    quick: bool,
) -> tuple[list[Document], object, str]:  # documents, tokenizers.Tokenizer, what they are
    "Real abstracts with their tokenizer where BIOMAMBA_DATA names them, else the sample's."
    from tokenizers import Tokenizer
    folder = os.environ.get("BIOMAMBA_DATA")
    if folder:
        documents = read_documents(Path(folder) / "pubmed" / "abstracts.jsonl", "pubmed")
        documents = list(itertools.islice(documents, 40 if quick else None))
        return documents, Tokenizer.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json")), f"{len(documents):,} real abstracts"
    documents = list(sample_documents("pubmed", 40 if quick else 3000))
    return documents, train_tokenizer((d.text for d in documents[:1000]), 400 if quick else 8192), f"{len(documents):,} documents of the sample"


def tokenizing(quick: bool) -> Found:
    "Our table of ids, and the library's own batch call on the same texts and cores."
    documents, tokenizer, data = abstracts(quick)
    documents = documents * (1 if quick else 4)
    texts = [d.text for d in documents]
    runs = {"ours": lambda: rate(len(texts), lambda: [tokenize(some, tokenizer) for some in batches(documents)]),
            "encode_batch": lambda: rate(len(texts), lambda: tokenizer.encode_batch(texts, add_special_tokens=False))}
    return Found(alternate(runs, quick, 5), data=f"{data}, repeated to {len(texts):,}")


def signatures(quick: bool) -> Found:
    "What the search for near-duplicates computes of every document, on one core."
    documents, _, data = abstracts(quick)
    work = lambda: band_hashes(np.stack([signature(shingles(d.text)) for d in documents]))
    return Found(alternate({"ours": lambda: rate(len(documents), work)}, quick), data=data, facts={"hashes": HASHES, "words": SHINGLE})


def step_sequences(
    quick: bool,
) -> tuple[list[list[np.ndarray]], str, str]:  # per optimizer step, its sequences of at most 1,025 ids; what they are; why no target holds
    "The sequences of the optimizer steps of one epoch, as training takes them."
    documents, tokenizer, data = abstracts(quick)
    ids = [with_ends(np.array(e.ids))[: TOKENS + 1] for e in tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)]
    size = 16 if quick else PER_STEP
    chosen = [step_indices(len(ids), size, seed=42, step=step) for step in range(max(1, len(ids) // size))]
    return [[ids[i] for i in step] for step in chosen], data, SYNTHETIC if "sample" in data else ""


def filling(quick: bool) -> Found:
    "How much of the rows of an optimizer step are tokens, step by step; the last row of a step is counted whole."
    steps, data, untargeted = step_sequences(quick)
    tokens = [sum(len(s) - 1 for s in step) for step in steps]
    rows = [len(best_fit([len(s) - 1 for s in step], TOKENS)) for step in steps]
    percent = lambda n, rows: 100 * n / (rows * TOKENS)
    return Found({"packed": list(map(percent, tokens, rows)), "padded": list(map(percent, tokens, map(len, steps)))}, {"packed": 100.0},
                 f"{data}, steps of {len(steps[0])} documents", untargeted, {"all_steps": percent(sum(tokens), sum(rows))})


def row_step(
    model,
    who: str,        # ours or stock
    precision: str,
    batch: Batch,
) -> None:
    "Forward and backward of a micro-batch; stock takes labels and a mask, as the paper gives them."
    from biomamba.perplexity import autocast
    ids, scored = batch.input_ids, batch.targets != IGNORE
    model.zero_grad(set_to_none=True)
    with autocast(precision, ids.device):
        if who == "ours": loss = model(input_ids=ids, seq_idx=batch.seq_idx, targets=batch.targets).loss
        else: loss = model(input_ids=ids, labels=ids.masked_fill(~scored, IGNORE), attention_mask=scored.long(), use_cache=False).loss
    loss.backward()


def packing(quick: bool) -> Found:
    "Forward passes as training makes them, other documents each time; a pass's rate times the documents that it holds. Packed documents take the tokens of two and a half rows at a time, padded ones two rows, each its fastest on two cores; stock has room for one."
    from benchmarks.limits import flops_per_token, matrix_peak
    from benchmarks.models import DTYPES, models, shape
    steps, data, untargeted = step_sequences(quick)
    chosen, length = shape(quick), 128 if quick else TOKENS
    step = [s[: length + 1] % chosen.vocabulary for s in steps[0]]
    packed, alone, single = micro_batches(step, 5 * length // 2, 5 * length // 2), padded_batches(step, length, 2 * length), padded_batches(step, length, length)
    (ours, stock), tokens, peak = models(chosen), sum(len(s) - 1 for s in step), matrix_peak(DTYPES["bf16"], quick)
    def one(model, who, precision, made):
        turns = itertools.cycle(made[:: max(1, len(made) // (ROUNDS + 1))])   # spread over the step
        return lambda: rate(len(step) / len(made), lambda: row_step(model, who, precision, next(turns)))
    theirs = {f"stock padded {name}": one(stock, "stock", name, single) for name in DTYPES if name == "fp32" or quick or not no_bf16()}  # a pass in bf16 would take minutes
    values = alternate({"packed": one(ours, "ours", "bf16", packed), "padded": one(ours, "ours", "bf16", alone), **theirs}, quick)
    peak = max(peak, matrix_peak(DTYPES["bf16"], quick))
    values["stock padded, faster"] = max((values[name] for name in theirs), key=middle)
    return Found(values, {"packed": peak / flops_per_token(chosen) / tokens * len(step)}, f"the {len(step)} documents of a step from {data}, {len(step) / len(packed):.2f} a pass",
                 untargeted or no_bf16(), {"passes_packed": len(packed), "passes_padded": len(alone), "peak_tflops": peak / 1e12})
