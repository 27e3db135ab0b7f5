"Training: packed equals padded, several processes equal one, a killed run goes on as if it had not been."
import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from biomamba.checkpoints import save_model
from biomamba.corpus import Corpus, open_collection, sample_source
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.packing import fill, micro_batches
from biomamba.runs import Run, UserError, recipe
from biomamba.training import checkpoint_steps, identity_of, pretrain

SMALL = recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400, max_tokens=128, steps=8, sequences_per_step=6, seed=1,
               evaluations=4, validation_documents=4, micro_batch_tokens=256, learning_rate=1e-2)


@pytest.fixture(scope="module")
def collection():
    sizes = {"pubmed": 120, "c4": 60, "wikipedia": 30}
    return open_collection({name: sample_source(name, n) for name, n in sizes.items()}, SMALL)


@pytest.fixture(scope="module")
def base(collection, tmp_path_factory):
    from biomamba.checkpoints import load_tokenizer
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


def test_a_mistake_in_several_processes_is_one_sentence(collection, base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    with pytest.raises(UserError, match="not finite|validation loss"):
        start(tmp_path / "wild", wild, collection, base, processes=2)


def losses(run):
    return [line["loss"] for line in run.metrics if "loss" in line]


@pytest.mark.parametrize("lengths", [[1, 2, 40, 128, 127, 5, 5, 90], list(range(1, 30)), [128] * 3])
def test_a_packed_step_equals_the_padded_one(lengths):
    model, rng = new_model(mamba2_config(SMALL), seed=3), np.random.RandomState(0)
    sequences = [rng.randint(2, 400, size=n + 1) for n in lengths]
    found = []
    for batches in ([fill(sequences, [[i] for i in range(len(sequences))])], micro_batches(sequences, 128, 256)):
        model.zero_grad()
        total = sum(model(input_ids=b.input_ids, seq_idx=b.seq_idx, targets=b.targets, reduction="sum").loss for b in batches) / sum(lengths)
        total.backward()
        found.append((total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (padded, padded_grads), (packed, packed_grads) = found
    assert abs(padded - packed) < 1e-5
    for name, grad in padded_grads.items():
        assert (grad - packed_grads[name]).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


def test_two_processes_equal_one(collection, base, tmp_path):
    one, _ = start(tmp_path / "one", SMALL, collection, base)
    two, summary = start(tmp_path / "two", SMALL, collection, base, processes=2)
    assert np.allclose(losses(one), losses(two), rtol=1e-5)
    assert summary["documents"] == 48
    a, b = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert all((a[name] - b[name]).abs().max() < 1e-3 for name in a)


def test_a_killed_run_goes_on_to_the_last_bit(collection, base, tmp_path):
    whole, _ = start(tmp_path / "whole", SMALL, collection, base)
    corpus = Corpus(collection, SMALL)
    killed = Run(tmp_path / "killed", identity_of(SMALL, corpus, "base", base, 1))
    command = [sys.executable, "-m", "biomamba.training", str(killed.folder), str(base), str(collection.folder), "train"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(step >= 2 for step in checkpoint_steps(killed)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL); process.wait()
    if (killed / "training.json").exists(): pytest.fail("the run was over before it could be killed")
    assert not (killed / "model").exists()
    again, _ = start(tmp_path / "killed", SMALL, collection, base)
    assert losses(again) == losses(whole)
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_steps_that_are_not_finite_are_counted_and_end_the_run(collection, base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    with pytest.raises(UserError, match="not finite|validation loss"):
        start(tmp_path / "wild", wild, collection, base)
    lines = [json.loads(line) for line in (tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()]
    assert [line["non_finite"] for line in lines if "non_finite" in line] == [1, 2, 3]
    assert not (tmp_path / "wild" / "model").exists()


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


def test_held_out_documents_are_never_trained_on(collection):
    for part in ("base", "train"):
        for source in SMALL.mixture:
            mine = set(collection.documents(part, source).ids)
            for other in {"base", "train", "validation", "test"} - {part}:
                assert not mine & set(collection.documents(other, source).ids)


