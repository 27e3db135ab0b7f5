"The command: a run with its table, the same again at once, and one sentence for a mistake."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from biomamba.sample import sample_documents

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 400, "max_tokens": 128, "sequences_per_step": 4,
         "evaluations": 2, "validation_documents": 4, "base_steps": 4, "micro_batch_tokens": 512}
MEDLINE = """<?xml version="1.0"?><PubmedArticleSet>{}</PubmedArticleSet>"""
RECORD = """<PubmedArticle><MedlineCitation><PMID Version="1">{}</PMID><Article><ArticleTitle>{}</ArticleTitle>
<Abstract><AbstractText>{}</AbstractText></Abstract></Article></MedlineCitation></PubmedArticle>"""


def biomamba(*arguments, cwd=ROOT):
    command = [sys.executable, "-c", "import sys; from biomamba.cli import main; sys.exit(main())", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    "A corpus of three formats: MEDLINE XML, Parquet, JSONL."
    import gzip
    from html import escape

    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = tmp_path_factory.mktemp("texts")
    for name in ("pubmed", "c4", "wikipedia"): (folder / name).mkdir()
    parts = [d.text.split("\n", 1) for d in sample_documents("pubmed", 120)]
    records = "".join(RECORD.format(1000 + i, escape(title), escape(abstract)) for i, (title, abstract) in enumerate(parts))
    (folder / "pubmed" / "pubmed24n0001.xml.gz").write_bytes(gzip.compress(MEDLINE.format(records).encode()))
    pages = list(sample_documents("c4", 60))
    pq.write_table(pa.table({"url": [f"https://example.org/{d.id}" for d in pages], "text": [d.text for d in pages]}), folder / "c4" / "pages.parquet")
    (folder / "wikipedia" / "articles.jsonl").write_text("".join(json.dumps({"title": d.id, "text": d.text}) + "\n" for d in sample_documents("wikipedia", 30)))
    return folder


def test_a_run_prints_its_table_and_a_second_one_finds_it(texts, tmp_path):
    arguments = ["cpt", "--corpus", texts, "--run-dir", tmp_path / "run", "--steps", 4, "--overrides", json.dumps(SMALL)]
    first = biomamba(*arguments)
    assert first.returncode == 0, first.stderr
    assert "PubMed (small source)" in first.stdout and "validation loss" in first.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["perplexity"]["base"]["pubmed"]["documents"] == 12 and results["perplexity"]["base"]["c4"]["documents"] == 6
    assert (tmp_path / "run" / "10_cpt.ipynb").exists()
    written = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    again = biomamba(*arguments, cwd=ROOT / "nbs")
    assert again.returncode == 0 and again.stdout == first.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_a_mistake_is_one_sentence(texts, tmp_path):
    done = biomamba("cpt", "--corpus", tmp_path / "nowhere", "--run-dir", tmp_path / "run")
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("biomamba: corpus") and "nowhere" in lines[-1] and "Traceback" not in done.stderr


def test_a_plan_is_printed_for_every_scale():
    from biomamba.cli import parse
    from biomamba.paper import SCALES
    for scale in ("tiny", *SCALES):
        assert parse(["plan", "--scale", scale]) == ("plan", {"scale": scale})
    done = biomamba("cpt", "--scale", "2.7b", "--plan-only")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("optimizer steps", "7,953", "tokens", "FLOPs", "memory in all", " h"))


def test_an_unknown_option_is_refused():
    done = biomamba("cpt", "--lerning-rate", "1")
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr
