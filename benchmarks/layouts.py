"""What the three layouts of a step cost and give on real text: python -m benchmarks.layouts CORPUS TOKENIZER

CORPUS is a folder with a folder per source, TOKENIZER a tokenizer.json with the vocabulary of the published checkpoints.
Costs are counted: the positions that a step of the 130m recipe computes, its text, the documents that it cuts, and the
text that is predicted with another document in sight. What they give is trained: scale tiny, one seed, one base, the same
documents in the same order; the change of each validation set's perplexity. The test sets are not read. The padded layout
is not trained: its loss and gradients are those of whole documents, as tests/test_packing.py holds.
Writes benchmarks/layouts.json, numbers without text, which 05_packing shows.
"""
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.tiny_recipe import SEED, measure
from biomamba.corpus import Corpus, open_collection, sources_of, with_ends
from biomamba.packing import step_batches, step_indices
from biomamba.recipe import Recipe
from biomamba.runs import recipe, resolve, write_atomic
from biomamba.training import evaluate, make_base

STEPS = 60  # optimizer steps of each training
WAYS = {"padded, as published": {"padding": "paper"}, "stream": {"packing": "stream"}, "whole documents": {}}


def abstracts(corpus: str, tokenizer: str) -> list[np.ndarray]:  # ids, at most 1,025 each
    "The abstracts of a corpus as sequences of the published vocabulary."
    from tokenizers import Tokenizer
    texts = [d.text for d in sources_of(corpus, recipe("130m", mixture={"pubmed": 1.0}))["pubmed"].read()]
    return [with_ends(np.array(e.ids))[:1025] for e in Tokenizer.from_file(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def foreign(lengths: np.ndarray, row_tokens: int) -> tuple[int, float]:  # documents cut; share of the text with another document in sight
    "What joining a step's documents end to end does to them."
    ends = np.cumsum(lengths)
    begins = ends - lengths
    seen = sum(max(0, min(e, (b // row_tokens + 1) * row_tokens) - b) for b, e in zip(begins, ends) if b % row_tokens)
    return int((begins // row_tokens != (ends - 1) // row_tokens).sum()), seen / ends[-1]


def cost(sequences: list[np.ndarray], chosen: Recipe, step: int = 0) -> dict:
    "One optimizer step, counted."
    batches = step_batches(sequences, chosen, step)
    lengths = np.array([len(sequences[i]) - 1 for i in step_indices(len(sequences), chosen.sequences_per_step, chosen.seed, step)])
    cut, seen = foreign(lengths, chosen.max_tokens) if chosen.packing == "stream" else (0, 0.0)
    return {"computed": sum(b.input_ids.numel() for b in batches), "text": sum(b.tokens for b in batches), "rows": sum(len(b.input_ids) for b in batches),
            "documents cut": cut, "in sight of another": round(seen, 4)}


def main(corpus: str, tokenizer: str) -> None:
    texts, plain = abstracts(corpus, tokenizer), recipe("tiny", seed=SEED)
    costs = {name: cost(texts, recipe("130m", **fields)) for name, fields in WAYS.items()}
    collection = open_collection(sources_of(corpus, plain), plain)
    base, folder = make_base(plain, collection), resolve("runs/layouts")
    scores = evaluate(base, Corpus(collection, plain), plain, "base", part="validation")
    gives = {}
    for name in ("whole documents", "stream"): gives[name] = measure(folder, scores, base, collection, steps=STEPS, **WAYS[name])
    found = {"abstracts": len(texts), "costs": costs, "seed": SEED, "steps": STEPS, "base_loss": {source: s.loss for source, s in scores.items()}, "gives": gives}
    write_atomic(Path(__file__).with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
