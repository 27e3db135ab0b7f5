"""Rows of what a corpus is made by, each on one core, and of opening one."""
import json, os, tempfile, time
from pathlib import Path

import numpy as np

from benchmarks.harness import Found, alternate, fresh, rate
from benchmarks.texts import SYNTHETIC, abstracts
from biomamba.collection import FORMAT, Collection
from biomamba.contamination import ContaminationIndex, EvaluationSet, evaluation_sets
from biomamba.corpus import Corpus
from biomamba.language import foreign
from biomamba.recipe import recipe
from biomamba.runs import fingerprint
from biomamba.sample import sample_documents, sample_notes
from biomamba.storage import describe_files, save_table, write_stream


def languages(quick: bool) -> Found:
    "Whether an abstract is in English."
    documents, _, data = abstracts(quick)
    texts = [d.text for d in documents]
    return Found(alternate({"ours": lambda: rate(len(texts), lambda: [foreign(text) for text in texts])}, quick), data=data, untargeted=SYNTHETIC if "sample" in data else "")


def searched(quick: bool) -> Found:
    "Whether an abstract is in a test set: PubMedQA's and BioASQ's files where BIOMAMBA_DATA names them, else the last of the documents themselves."
    documents, _, data = abstracts(quick)
    folder = os.environ.get("BIOMAMBA_DATA")
    index = ContaminationIndex(evaluation_sets(Path(folder) / "qa") if folder else [EvaluationSet("the last", documents[-10:])])
    values = alternate({"ours": lambda: rate(len(documents), lambda: [index.find(d) for d in documents])}, quick)
    return Found(values, data=f"{data}, against {len(index.documents):,} documents of {len(index.sets)} sets", untargeted="" if folder else SYNTHETIC)


def written(quick: bool) -> Found:
    "The built-in sample."
    work = lambda make, n: lambda: rate(n, lambda: sum(1 for _ in make(n, seed=9)))
    runs = {"abstracts": work(lambda n, seed: sample_documents("pubmed", n, seed), 15 if quick else 1500), "notes": work(sample_notes, 3 if quick else 300)}
    return Found(alternate(runs, quick), data="abstracts and notes that are written anew")


def bare_collection(
    folder: Path,
    n: int = 1_000_000,  # documents, a multiple of 1,000
    each: int = 200,     # tokens of one
) -> Path:
    "A collection without text: random tokens of one source, for training."
    import pyarrow as pa
    rng = np.random.default_rng(0)

    def tables():
        for start in range(0, n, 1000):
            offsets = np.arange(0, 1001 * each, each, dtype=np.int32)
            tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(2, 50_277, 1000 * each, dtype=np.uint16)))
            yield pa.table({"id": [str(10_000_000 + i) for i in range(start, start + 1000)], "tokens": tokens, "bytes": np.full(1000, 900)})
    write_stream(folder / "all.arrow", tables())
    save_table(folder / "train" / "pubmed", [folder / "all.arrow"])
    (folder / "all.arrow").unlink()
    about = {"format": FORMAT, "documents": n, "sources": {}}
    (folder / "manifest.json").write_text(json.dumps(about | {"fingerprint": fingerprint(about), "files": describe_files(folder)}))
    return folder


def opened(
    folder: str,
) -> dict:  # seconds, documents, tokens
    "Open a corpus, count its tokens, and read its first sequence and its last."
    began = time.perf_counter()
    corpus = Corpus(Collection(folder), recipe("tiny", mixture={"pubmed": 1.0}, long_documents="truncate"))
    tokens = sum(int(n.sum()) for n in corpus.lengths.values())
    corpus[0], corpus[len(corpus) - 1]
    return {"seconds": time.perf_counter() - began, "documents": len(corpus), "tokens": tokens}


def opening(quick: bool) -> Found:
    "A process of its own each time; the order of the sequences is drawn once, before."
    with tempfile.TemporaryDirectory() as folder:
        bare_collection(Path(folder) / "corpus", 1000 if quick else 1_000_000)
        once = lambda: fresh("corpora:opened", here=quick, folder=str(Path(folder) / "corpus"))
        found = once()
        return Found(alternate({"ours": lambda: once()["seconds"]}, quick, 5), data=f"{found['documents']:,} documents, {found['tokens']:,} tokens")
