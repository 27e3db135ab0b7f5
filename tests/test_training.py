"Training: nothing is lost, several processes equal one, a killed run goes on as if it had not been."
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import biomamba.checkpointing as checkpointing
from biomamba.checkpoints import load_tokenizer, save_model
from biomamba.corpus import Corpus, open_collection, sample_source
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.plan import memory_parts
from biomamba.processes import start_accelerator
from biomamba.recipe import recipe
from biomamba.runs import Recipe, Run, UserError, mark_restricted, read_metrics, wordless
from biomamba.training import checkpoint_steps, identity_of, prepare_state, pretrain, tidy, with_device_batch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from worlds import free_port  # noqa: E402

SMALL = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400, max_tokens=128, steps=8, sequences_per_step=6, seed=1,
               evaluations=4, validation_documents=4, micro_batch_tokens=256, learning_rate=1e-2)


def small_collection():
    sizes = {"pubmed": 120, "c4": 60, "wikipedia": 30}
    return open_collection({name: sample_source(name, n) for name, n in sizes.items()}, SMALL)


@pytest.fixture(scope="module")
def collection():
    return small_collection()


@pytest.fixture(scope="module")
def base(collection, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(new_model(mamba2_config(SMALL), seed=0), folder, load_tokenizer(collection.tokenizer_folder))
    return folder


def start(folder, r, collection, base, processes=1):
    corpus = Corpus(collection, r)
    run = Run(folder, identity_of(r, corpus, "base", base, processes))
    return run, pretrain(run, base, corpus, processes)


def test_a_run_stopped_before_its_first_validation_step_logs_step_0_once(collection, base, tmp_path):
    corpus = Corpus(collection, SMALL)
    run = Run(tmp_path / "r", identity_of(SMALL, corpus, "base", base, 1))
    write = run.log
    def stop(**line):
        if line["step"] == 1: raise KeyboardInterrupt
        write(**line)
    run.log = stop
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, base, corpus)
    again, _ = start(tmp_path / "r", SMALL, collection, base)
    assert [line["step"] for line in again.metrics if "validation_loss" in line] == [0, 2, 4, 6, 8]


def losses(run):
    return [line["loss"] for line in run.metrics if "loss" in line]


def test_a_folder_in_use_is_refused(collection, base, tmp_path):
    corpus = Corpus(collection, SMALL)
    run = Run(tmp_path / "held", identity_of(SMALL, corpus, "base", base, 1))
    code = f"import time; from biomamba.runs import Run; import json\nr = Run({str(run.folder)!r}, json.load(open({str(run / 'recipe.json')!r})))\nwith r.lock(): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use by another process"):
        pretrain(run, base, corpus)
    holder.kill(); holder.wait()
    assert pretrain(run, base, corpus)["steps"] == 8       # a dead process holds nothing


def test_a_base_model_is_its_weights_however_it_is_called(collection, base, whole, tmp_path):
    corpus, other = Corpus(collection, SMALL), tmp_path / "other"
    said = lambda model, folder: Run(whole, identity_of(SMALL, corpus, model, folder, 1))
    assert said("base", base).folder == said(str(base), base).folder == said(os.path.relpath(base), base).folder == whole
    save_model(new_model(mamba2_config(SMALL), seed=7), other, load_tokenizer(collection.tokenizer_folder))
    with pytest.raises(UserError, match="belongs to another run: weights_sha256"):
        said("base", other)


def test_a_lost_best_checkpoint_is_said_and_costs_no_other(collection, base, tmp_path, caplog):
    hasty = dataclasses.replace(SMALL, learning_rate=5.0, warmup_ratio=0.0, steps=12, evaluations=6, keep_checkpoints=1)
    run, summary = start(tmp_path / "run", hasty, collection, base)
    assert summary["best_step"] == 0 and checkpoint_steps(run) == [0, 12]
    for name in ("training.json", "checkpoints/step-0000000/state.safetensors"): (run / name).unlink()
    _, again = start(tmp_path / "run", hasty, collection, base)
    said = [record.getMessage() for record in caplog.records]
    assert "step 0 is set aside: step-0000000 lacks state.safetensors" in said[0] and "the best of those that stand takes its place" in said[1]
    assert again["best_step"] == again["steps"] == 12 and again["best_validation_loss"] == [line for line in run.metrics if "validation_loss" in line][-1]["validation_loss"]


def test_held_out_documents_are_never_trained_on(collection):
    for part in ("base", "train"):
        for source in SMALL.mixture:
            mine = set(collection.documents(part, source).ids)
            for other in {"base", "train", "validation", "test"} - {part}:
                assert not mine & set(collection.documents(other, source).ids)


def arguments(run, base, collection, **settings):
    return [str(run.folder), str(base), str(collection.folder), "train", *([json.dumps(settings)] if settings else [])]


def claimed(folder, r, collection, base):
    return Run(folder, identity_of(r, Corpus(collection, r), "base", base, 1))


@pytest.fixture(scope="module")
def forked():
    "Jobs in, what became of them out: training processes are forked from one that has imported everything."
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))}
    server = subprocess.Popen([sys.executable, str(HERE / "worlds.py")], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def run(*jobs):
        found = []
        for job in jobs:
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            found.append(json.loads(server.stdout.readline()))
        return found
    yield run
    server.stdin.close()
    server.wait(timeout=60)


def outcome(folder):
    "Metrics without times, and the tensors of the model and of the last checkpoint."
    lines = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max((folder / "checkpoints").glob("step-*"))
    return lines, load_file(folder / "model" / "model.safetensors"), load_file(last / "state.safetensors")


def assert_identical(one, other):
    (lines, *files), (lines2, *files2) = outcome(one), outcome(other)
    assert lines == lines2
    for tensors, tensors2 in zip(files, files2):
        assert tensors.keys() == tensors2.keys() and all(torch.equal(tensors[name], tensors2[name]) for name in tensors)


@pytest.fixture(scope="module")
def whole(collection, base, tmp_path_factory):
    "The folder of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, SMALL, collection, base)
    return folder


# ---------------------------------------------------------------- killed, stopped

def test_killed_runs_resume_to_the_last_bit(forked, collection, base, whole, tmp_path):
    ways = {"step": {"kill": ["biomamba.optimizer_step.loss_of", 7, False]}, "evaluation": {"kill": ["biomamba.perplexity.piecewise_losses", 8, True]},
            "checkpoint": {"kill": ["biomamba.checkpointing.save_file", 3, False]}, "clock": {"kill_after": 0.6}}
    for name, way in ways.items():
        run = claimed(tmp_path / name, SMALL, collection, base)
        job = {"processes": 1, "arguments": arguments(run, base, collection)}
        killed, again = forked(job | way, job)
        assert killed["codes"] == [-9] and again["codes"] == [0], (name, killed, again)
        assert_identical(whole, run.folder)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stop_saves_within_the_step_says_how_to_go_on_and_resumes(collection, base, whole, tmp_path, number, name):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    write = run.log
    def log(**line):
        write(**line)
        if line["step"] == 3: signal.raise_signal(number)
    run.log = log
    with pytest.raises(UserError, match=f"stopped by {name} after step 3 of 8; its checkpoint is written, and the same command goes on"):
        pretrain(run, base, Corpus(collection, SMALL))
    assert checkpoint_steps(run)[-1] == 3 == run.metrics[-1]["step"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    start(tmp_path / "run", SMALL, collection, base)
    assert_identical(whole, tmp_path / "run")


def test_a_run_stopped_at_a_step_with_a_validation_resumes_with_the_validation(forked, collection, base, whole, tmp_path):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    job = {"processes": 1, "arguments": arguments(run, base, collection)}
    [first] = forked(job | {"stop": [4, signal.SIGTERM]})
    assert first["codes"] == [1] and "after step 4 of 8" in (run / "error.txt").read_text()
    [second] = forked(job)
    assert second["codes"] == [0] and not (run / "error.txt").exists()     # the sentence is that of the last start
    assert_identical(whole, run.folder)


# ---------------------------------------------------------------- disks and files

@pytest.mark.parametrize("times", [1, 2])
def test_a_validation_whose_checkpoint_is_lost_is_logged_once(collection, base, whole, tmp_path, monkeypatch, times):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    write = run.log
    def log(**line):
        write(**line)
        if line["step"] == 4: signal.raise_signal(signal.SIGTERM)        # a step with a validation, which the next start makes
    run.log = log
    with pytest.raises(UserError, match="after step 4 of 8"):
        pretrain(run, base, Corpus(collection, SMALL))
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    for _ in range(times):
        with monkeypatch.context() as disk, pytest.raises(UserError, match="checkpoint of step 4 could not be written"):
            disk.setattr(checkpointing, "save_file", full)
            start(tmp_path / "run", SMALL, collection, base)
    start(tmp_path / "run", SMALL, collection, base)
    assert_identical(whole, tmp_path / "run")


@pytest.fixture
def unfinished(whole, tmp_path):
    "A copy of the run that nothing disturbed, before its export."
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "training.json").unlink()
    return tmp_path / "copy"


@pytest.mark.parametrize("error", [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left on device", "run/model")])
def test_an_export_to_a_full_disk_is_one_sentence(collection, base, unfinished, whole, monkeypatch, error):
    def full(*_, **__): raise error
    with monkeypatch.context() as disk, pytest.raises(UserError, match="model could not be written .No space left on device.; the checkpoint of step 8 stands"):
        disk.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        start(unfinished, SMALL, collection, base)
    start(unfinished, SMALL, collection, base)
    assert_identical(whole, unfinished)


@pytest.mark.parametrize("place", ["biomamba.runs.write_atomic", "biomamba.training.write_atomic", "filelock.FileLock.acquire"])
def test_a_folder_that_may_not_be_written_is_one_sentence(collection, base, tmp_path, monkeypatch, place):
    def closed(*_, **__): raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))
    monkeypatch.setattr(place, closed)
    with pytest.raises(UserError, match="could not be written .Read-only file system."):
        start(tmp_path / "run", SMALL, collection, base)


def test_a_checkpoint_between_two_renames_is_put_back(tmp_path):
    for name in (".step-0000003.ab/old", ".step-0000003.ab/content", ".step-0000002.cd/old", "step-0000002", ".step-0000001.ef/content"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state").write_text(name)
    tidy(tmp_path)
    assert {f.name: (f / "state").read_text() for f in tmp_path.iterdir()} == {"step-0000003": ".step-0000003.ab/old", "step-0000002": "step-0000002"}


def test_what_a_killed_export_left_is_removed(collection, base, unfinished):
    (unfinished / ".model.ab12" / "content").mkdir(parents=True)
    start(unfinished, SMALL, collection, base)
    assert not list(unfinished.glob(".model*")) and (unfinished / "model" / "model.safetensors").is_file()


def test_a_copy_beside_the_checkpoints_is_none(collection, base, unfinished):
    shutil.copytree(unfinished / "checkpoints" / "step-0000008", unfinished / "checkpoints" / "step-0000008-copy")
    run, summary = start(unfinished, SMALL, collection, base)
    assert checkpoint_steps(run) == [6, 8] and summary["steps"] == 8


@pytest.mark.parametrize("sums", ["{}", "[]", '{"state.safetensors": "0"}', "\0"])
def test_sums_that_are_none_are_no_checkpoint(collection, base, unfinished, whole, sums):
    (unfinished / "checkpoints" / "step-0000008" / "checksums.json").write_text(sums)
    run, _ = start(unfinished, SMALL, collection, base)
    assert (run / "checkpoints" / "damaged-step-0000008").is_dir()
    assert_identical(whole, unfinished)


@pytest.mark.parametrize("harm, lost", [(lambda lines: [*lines, b"\0\0\0\n"], 0), (lambda lines: [*lines, b"\n", b"[1]\n", b'{"step": 9, "lo'], 0), (lambda lines: [*lines[:3], b"\xff\xfe\n", *lines[4:]], 0),
                                        (lambda lines: [*lines[:4], b"nothing\n", *lines[5:]], 1), (lambda lines: [], 8)])
def test_a_damaged_log_costs_no_checkpoint_and_is_said(collection, base, unfinished, caplog, harm, lost):
    log = unfinished / "metrics.jsonl"
    log.write_bytes(b"".join(harm(log.read_bytes().splitlines(keepends=True))))
    run, summary = start(unfinished, SMALL, collection, base)
    said = [record.getMessage() for record in caplog.records if "has lost" in record.getMessage()]
    assert summary["steps"] == 8 and len(losses(run)) == 8 - lost and [f"has lost {lost} of 8 steps" in sentence for sentence in said] == [True] * (lost > 0)


@pytest.mark.parametrize("name", ["recipe.json", "training.json", "results.json"])
def test_a_damaged_file_of_a_run_is_named(collection, base, whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text('{"steps": ')
    with pytest.raises(UserError, match=f"{name} is damaged"):
        start(tmp_path / "copy", SMALL, collection, base)[0].results


def test_a_file_that_may_not_grow_is_one_sentence_and_the_run_resumes(forked, collection, base, whole, tmp_path):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    job = {"processes": 1, "arguments": arguments(run, base, collection)}
    [_, full] = forked(job | {"stop": [5, signal.SIGTERM]}, job | {"file_limit": 50_000})
    sentence = (run / "error.txt").read_text()
    assert full["codes"] == [1] and "checkpoint of step 6 could not be written" in sentence and "File too large" in sentence
    assert "the checkpoint of step 5 stands, and the same command goes on from it" in sentence
    [again] = forked(job)
    assert again["codes"] == [0]
    assert_identical(whole, run.folder)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_run_resumes_after_a_disk_that_filled_while_a_checkpoint_was_written(collection, base, whole, tmp_path, monkeypatch, error):
    inner = checkpointing.save_file
    def half(tensors, path):
        inner(tensors, path)
        if path.parent.parent.name.startswith(".step-0000004"):
            path.write_bytes(path.read_bytes()[:1000])
            raise error
    monkeypatch.setattr(checkpointing, "save_file", half)
    run = claimed(tmp_path / "run", SMALL, collection, base)
    with pytest.raises(UserError, match="checkpoint of step 4 could not be written .*No space left on device.*step 2 stands"):
        pretrain(run, base, Corpus(collection, SMALL))
    assert checkpoint_steps(run) == [0, 2] and checkpointing.newest_sound(run) == 2
    monkeypatch.undo()
    start(tmp_path / "run", SMALL, collection, base)
    assert_identical(whole, tmp_path / "run")


def test_a_disk_without_room_is_met_before_anything_is_written(collection, base, tmp_path, monkeypatch):
    usage = checkpointing.shutil.disk_usage
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    run = claimed(tmp_path / "run", SMALL, collection, base)
    with pytest.raises(UserError, match=r"takes 0\.\d MB and 0\.0 MB are free; no checkpoint stands yet"):
        pretrain(run, base, Corpus(collection, SMALL))
    assert checkpoint_steps(run) == []


def test_a_log_on_a_full_disk_is_one_sentence(collection, base, tmp_path):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    write = run.log
    def log(**line):
        if line["step"] == 3: raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(**line)
    run.log = log
    with pytest.raises(UserError, match="metrics.jsonl could not be written .No space left on device.; the checkpoint of step 2 stands"):
        pretrain(run, base, Corpus(collection, SMALL))


@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
def test_a_damaged_checkpoint_is_left_out_and_the_run_resumes_before_it(forked, collection, base, whole, tmp_path, caplog, harm):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    forked({"processes": 1, "arguments": arguments(run, base, collection), "stop": [7, signal.SIGTERM]})
    assert checkpoint_steps(run)[-2:] == [6, 7]
    path = checkpointing.checkpoint_path(run, 7) / "state.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "cut": path.write_bytes(content[:-100])
    if harm == "flip": content[len(content) // 2] ^= 4; path.write_bytes(content)
    if harm == "lose": path.unlink()
    with caplog.at_level(logging.INFO, "biomamba.checkpointing"):
        start(tmp_path / "run", SMALL, collection, base)
    said = [record.getMessage() for record in caplog.records]
    assert "checkpoint of step 7 is set aside" in said[0] and "state.safetensors" in said[0] and "goes on from the checkpoint of step 6" in said[1]
    assert (run / "checkpoints" / "damaged-step-0000007").is_dir()
    assert_identical(whole, tmp_path / "run")


def test_as_many_checkpoints_are_kept_as_asked(collection, base, tmp_path):
    r = dataclasses.replace(SMALL, keep_checkpoints=4)
    run, summary = start(tmp_path / "run", r, collection, base)
    assert checkpoint_steps(run) == [2, 4, 6, 8] and summary["best_step"] == 8
    one, _ = start(tmp_path / "one", dataclasses.replace(SMALL, keep_checkpoints=1), collection, base)
    assert checkpoint_steps(one) == [8]


# ---------------------------------------------------------------- not finite, early, by parameter

def test_steps_that_are_not_finite_name_their_documents(collection, base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    with pytest.raises(UserError, match="3 optimizer steps in a row .* at step 4 with the documents .*; a learning_rate below 1e.18 or a lower clip is accepted") as caught:
        start(tmp_path / "wild", wild, collection, base)
    lines = [json.loads(line) for line in (tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "non_finite" in line]
    assert [line["non_finite"] for line in skipped] == [1, 2, 3] and all(len(line["documents"]) == 6 and line["loss"] is None for line in skipped)
    source, name = skipped[-1]["documents"][0].split(" ", 1)
    assert name in collection.documents("train", source).ids and f"{source} {name}" in str(caught.value)


def test_a_restricted_run_names_them_without_a_blank(collection, base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    mark_restricted(claimed(tmp_path / "wild", wild, collection, base).folder, "ward 7")
    with pytest.raises(UserError, match="3 optimizer steps in a row .* with the documents [a-z0-9]+/[^ ]+, "):
        start(tmp_path / "wild", wild, collection, base)
    named = [name for line in read_metrics(tmp_path / "wild") for name in line.get("documents", [])]
    assert len(named) == 18 and all("/" in name and wordless(name) for name in named)
    assert wordless({"validation_loss": {"ward notes": 1.0}}) and not wordless({"said": "He felt well."})


@pytest.mark.parametrize("step, source, accepted", [(0, "c4", "another base model"), (4, "selection", "a lower learning_rate"), (4, "wikipedia", "a lower learning_rate")])
def test_a_validation_that_is_not_finite_is_named(collection, base, tmp_path, monkeypatch, step, source, accepted):
    steps = iter((0, 2, 4))
    monkeypatch.setattr("biomamba.training.validation_losses", lambda *_: dict.fromkeys(("selection", "pubmed", "c4", "wikipedia"), 5.0) | ({source: float("nan")} if next(steps) == step else {}))
    with pytest.raises(UserError, match=rf"validation loss at step {step} is nan .{source}.; {accepted}"):
        start(tmp_path / "run", SMALL, collection, base)
    assert checkpoint_steps(claimed(tmp_path / "run", SMALL, collection, base)) == [0, 2][: step // 2]


def test_early_stopping_waits_for_so_many_validations(collection, base, tmp_path):
    hasty = dataclasses.replace(SMALL, learning_rate=5.0, warmup_ratio=0.0, steps=30, evaluations=15, early_stopping=3)
    _, summary = start(tmp_path / "run", hasty, collection, base)
    assert summary["stopped_early"] and summary["steps"] == summary["best_step"] + 3 * 2 < 30
    assert "stopped_early" not in start(tmp_path / "patient", dataclasses.replace(SMALL, early_stopping=3), collection, base)[1]


def test_machine_settings_change_no_digit_of_the_identity(collection, base, whole, tmp_path):
    r = dataclasses.replace(SMALL, gradient_checkpointing=True, keep_checkpoints=5)
    assert identity_of(r, Corpus(collection, r), "base", base, 1) == identity_of(SMALL, Corpus(collection, SMALL), "base", base, 1)
    run, summary = start(whole, r, collection, base)     # finished: found again, whatever the machine
    assert summary["steps"] == 8 and checkpoint_steps(run)


def test_recomputed_activations_give_the_same_run(collection, base, whole, tmp_path):
    run, _ = start(tmp_path / "run", dataclasses.replace(SMALL, gradient_checkpointing=True), collection, base)
    kept = {}
    for way in (False, True):
        state = prepare_state(dataclasses.replace(SMALL, gradient_checkpointing=way), base, 8, start_accelerator())
        state.model.train()
        seen = {}
        def keep(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        ids = torch.randint(2, 400, (2, 128))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state.model(input_ids=ids, targets=ids).loss
        weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
        kept[way] = sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in weights)
    assert kept[True] < kept[False] / 2
    assert np.allclose(losses(run), [line["loss"] for line in map(json.loads, (whole / "metrics.jsonl").open()) if "loss" in line], rtol=1e-6)


def test_the_batch_that_fits_keeps_the_step(collection, base, whole, tmp_path):
    r = dataclasses.replace(SMALL, device_batch="auto")
    assert with_device_batch(r, start_accelerator()).device_batch == SMALL.sequences_per_step
    run, _ = start(tmp_path / "run", r, collection, base)
    assert np.allclose(losses(run), [line["loss"] for line in map(json.loads, (whole / "metrics.jsonl").open()) if "loss" in line], rtol=1e-5)
    assert sum(memory_parts(dataclasses.replace(SMALL, device_batch=6), kernels=False).values()) < 1


def test_a_tracker_that_is_not_there_is_one_sentence(collection, base, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard is not installed; `pip install biomamba\[track\]`"):
        start(tmp_path / "run", dataclasses.replace(SMALL, trackers=("tensorboard",)), collection, base)


def test_trackio_is_never_sent_elsewhere(collection, base, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    with pytest.raises(UserError, match="TRACKIO_SPACE_ID is set"):
        start(tmp_path / "run", dataclasses.replace(SMALL, trackers=("trackio",)), collection, base)


def test_trackers_write_beside_the_metrics(collection, base, whole, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: it belongs to the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run, _ = start(tmp_path / "run", dataclasses.replace(SMALL, trackers=("tensorboard",)), collection, base)
    [folder] = {path.parent for path in run.folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert np.allclose([e.value for e in events.Scalars("loss")], losses(run)) and len(events.Scalars("validation_loss/selection")) == 5
    assert_identical(whole, run.folder)


def test_trackio_writes_into_the_run_folder(forked, collection, base, whole, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: it belongs to the extra track")
    run = claimed(tmp_path / "run", SMALL, collection, base)
    [found] = forked({"processes": 1, "arguments": arguments(run, base, collection, trackers=["trackio"]), "limit": 100})
    assert found["codes"] == [0], (found["errors"], list(run.folder.glob("error.txt")) and (run / "error.txt").read_text())
    assert any(path.stat().st_size > 1000 for path in (run / "trackio").rglob("*") if path.is_file())
    assert_identical(whole, run.folder)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(collection, base, tmp_path):
    r = dataclasses.replace(SMALL, steps=3, evaluations=1, validation_documents=1, padding="paper", device_batch=6)     # few shapes: each is compiled
    plain, compiled = (start(tmp_path / str(way), dataclasses.replace(r, compile=way), collection, base)[0] for way in (False, True))
    assert np.allclose(losses(plain), losses(compiled), rtol=1e-4)


def test_the_bar_says_what_is_known(collection, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("biomamba.training.progress", lambda *a, **k: tqdm(*a, **k | {"disable": False}))
    start(tmp_path / "run", SMALL, collection, base)
    shown = capsys.readouterr().err
    assert "tokens/s" in shown and "% of the peak" in shown and "loss 5." in shown
    start(tmp_path / "bf16", dataclasses.replace(SMALL, precision="bf16", steps=2), collection, base)
    assert "of the peak" not in capsys.readouterr().err          # nobody knows a CPU's peak in bf16


# ---------------------------------------------------------------- several processes

THIRTY = dataclasses.replace(SMALL, steps=30, evaluations=2, learning_rate=3e-3)     # so that rounding stays rounding
WORLDS = {"one": (1, "none"), "ddp-2": (2, "none"), "full-2": (2, "full"), "ddp-4": (4, "none"), "full-4": (4, "full")}


@pytest.fixture(scope="module")
def world(forked, collection, base, tmp_path_factory):
    "The run of thirty steps in a world of some size, made when it is first asked for."
    folder = tmp_path_factory.mktemp("worlds")
    def made(name):
        run, (n, way) = claimed(folder / name, THIRTY, collection, base), WORLDS[name]
        if not (run / "training.json").exists():
            [result] = forked({"processes": n, "arguments": arguments(run, base, collection, sharding=way), "note_kinds": True})
            assert (run / "training.json").exists(), result
            assert set(result["codes"]) <= {0, -6}, result     # gloo sometimes aborts when everything is written
        return run
    return made


@pytest.mark.parametrize("name", ["ddp-2", "full-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp-4", "full-4"))])
def test_a_distributed_run_equals_one_process(world, name):
    one, other, (n, way) = world("one"), world(name), WORLDS[name]
    kinds = [json.loads((other / f"kinds-{rank}.json").read_text()) for rank in range(n)]
    assert kinds == [["DTensor" if way == "full" else "Parameter"]] * n
    assert np.allclose(losses(one), losses(other), rtol=0, atol=1e-5) and len(losses(other)) == 30
    validations = [[line["validation_loss"]["selection"] for line in run.metrics if "validation_loss" in line] for run in (one, other)]
    assert len(validations[0]) == 3 and np.allclose(*validations, rtol=0, atol=1e-5)
    documents = [json.loads((run / "training.json").read_text())["documents"] for run in (one, other)]
    assert documents == [180, 180]


@pytest.mark.parametrize("before, after", [("full-2", "one"), pytest.param("one", "full-4", marks=pytest.mark.slow), pytest.param("ddp-4", "full-2", marks=pytest.mark.slow)])
def test_a_distributed_checkpoint_resumes_at_another_world_size(forked, collection, base, world, tmp_path, before, after):
    run = claimed(tmp_path / "run", THIRTY, collection, base)
    jobs = [{"processes": WORLDS[name][0], "arguments": arguments(run, base, collection, sharding=WORLDS[name][1])} for name in (before, after)]
    [first] = forked(jobs[0] | {"stop": [15, signal.SIGTERM]})
    assert set(first["codes"]) == {1} and "after step 15" in (run / "error.txt").read_text()
    forked(jobs[1])
    assert np.allclose(losses(run), losses(world("one")), rtol=0, atol=1e-5) and len(losses(run)) == 30


def children():
    return [int(pid) for pid in Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()]


def test_a_killed_worker_ends_a_distributed_run_that_then_resumes(collection, base, world, tmp_path):
    run, before = claimed(tmp_path / "run", THIRTY, collection, base), set(children())
    def kill():
        deadline = time.monotonic() + 120
        while not any("loss" in line for line in run.metrics) and time.monotonic() < deadline: time.sleep(0.02)
        os.kill(max(set(children()) - before), signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="process 1 of the 2 training processes was ended by SIGKILL, so the others were stopped; the checkpoint of step 0 stands"):
        pretrain(run, base, Corpus(collection, THIRTY), processes=2)
    killer.join()
    assert not set(children()) - before
    pretrain(run, base, Corpus(collection, THIRTY))
    assert np.allclose(losses(run), losses(world("one")), rtol=0, atol=1e-5)


def test_a_new_run_waits_for_the_processes_of_a_killed_launcher(forked, collection, base, whole, tmp_path, monkeypatch):
    run = claimed(tmp_path / "run", SMALL, collection, base)
    monkeypatch.setattr("biomamba.training.GRACE", 0.2)
    with filelock.FileLock(run / ".work.lock"):              # as the first process of such a run holds it
        with pytest.raises(UserError, match="in use by a process that another launcher left behind"):
            pretrain(run, base, Corpus(collection, SMALL))
        assert not (run / "manifest.json").exists() and not run.metrics
    pretrain(run, base, Corpus(collection, SMALL))
    assert_identical(whole, run.folder)


def pretraining(run, base, collection, processes):
    "A process that trains a run, in so many processes of its own."
    code = ("import json, sys; from pathlib import Path; from biomamba.corpus import Collection, Corpus; from biomamba.runs import Recipe, Run; "
            "from biomamba.training import pretrain; folder, base, collection, processes = sys.argv[1:]; identity = json.loads((Path(folder) / 'recipe.json').read_text()); "
            "pretrain(Run(folder, identity), Path(base), Corpus(Collection(Path(collection)), Recipe(**identity['recipe'])), int(processes))")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, (run.folder, base, collection.folder, processes))], stderr=subprocess.DEVNULL)


def wait_for_steps(run, n, process):
    "Until a run has logged so many optimizer steps."
    deadline = time.monotonic() + 240
    while sum("loss" in line for line in run.metrics) < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_workers_of_a_killed_launcher_end_a_distributed_run_that_is_resumed_at_once(collection, base, tmp_path):
    run = claimed(tmp_path / "run", dataclasses.replace(THIRTY, steps=600, evaluations=2), collection, base)
    launcher = pretraining(run, base, collection, processes=2)
    wait_for_steps(run, 1, launcher)
    workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    launcher.kill(); launcher.wait()
    assert len(workers) == 2
    pretrain(run, base, Corpus(collection, Recipe(**run.identity["recipe"])))       # at once, beside them
    assert not any(b"biomamba.training" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers if Path(f"/proc/{pid}/cmdline").exists())
    assert [line["step"] for line in run.metrics if "loss" in line] == list(range(1, 601))       # each once: nobody wrote beside it


SCHEDULER = {"srun": '#!/bin/bash\necho $$ >"$STEP"\nexec "$@"\n', "scontrol": '#!/bin/bash\nif [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$QUEUE"; fi\n'}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash"), reason="the example is a bash script")
def test_the_slurm_example_saves_is_queued_again_and_resumes(collection, base, tmp_path):
    pages = map("".join, (cell["source"] for cell in json.loads((HERE.parent / "nbs" / "09e_training.ipynb").read_text())["cells"]))
    script = next(page for page in pages if "#SBATCH" in page).split("```bash\n")[1].split("```")[0]
    assert script.startswith("#!/bin/bash\n#SBATCH") and "--nproc-per-node=4" in script and ":29500" in script
    (tmp_path / "job").write_text(script.replace("--nproc-per-node=4", "--nproc-per-node=2").replace(":29500", f":{free_port()}"))
    for name, content in SCHEDULER.items():
        (tmp_path / name).write_text(content); (tmp_path / name).chmod(0o755)
    run = claimed(tmp_path / "run", dataclasses.replace(THIRTY, steps=3000, evaluations=1), collection, base)
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"RUN": str(run.folder), "BASE": str(base), "COLLECTION": str(collection.folder), "SLURM_NNODES": "1", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "here", "PATH": path, "STEP": str(tmp_path / "step"), "QUEUE": str(tmp_path / "queue"), "PYTHONPATH": str(HERE.parent)}
    for before in (0, 1):
        job = subprocess.Popen(["bash", str(tmp_path / "job")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = len(losses(run))
        wait_for_steps(run, done + 2, job)
        os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
        job.wait(timeout=120)
        assert (tmp_path / "queue").read_text() == "requeue 7\n" * (before + 1) and (run / "error.txt").read_text().startswith("training was stopped by ")
        assert checkpoint_steps(run)[-1] == run.metrics[-1]["step"] == len(losses(run)) > done


@pytest.mark.slow
def test_a_mistake_in_a_distributed_run_is_one_sentence(collection, base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    with pytest.raises(UserError, match="3 optimizer steps in a row"):
        start(tmp_path / "wild", wild, collection, base, processes=2)


def test_sharding_needs_several_processes(collection, base, tmp_path):
    with pytest.raises(UserError, match="sharding='full' and one process"):
        start(tmp_path / "run", dataclasses.replace(SMALL, sharding="full"), collection, base)


def test_a_run_with_another_corpus_is_refused(collection, base, tmp_path):
    run = Run(tmp_path / "run", identity_of(SMALL, Corpus(collection, SMALL), "base", base, 1) | {"corpus": "0123456789abcdef"})
    with pytest.raises(UserError, match="belongs to the corpus 0123456789abcdef"):
        pretrain(run, base, Corpus(collection, SMALL))
