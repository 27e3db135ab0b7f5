"The engine: the same corpus from any number of workers, from Ray, and after any number of kills."
import contextlib
import functools
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biomamba.collection import Collection, build_collection
from biomamba.contamination import EvaluationSet
from biomamba.pipeline import Do, Engine, run_stage
from biomamba.records import Document
from biomamba.runs import UserError
from biomamba.sample import sample_documents
from biomamba.sources import sample_source
from biomamba.stages import Work
from biomamba.steps import Steps

SIZES = {"pubmed": 1_040, "c4": 60, "wikipedia": 30}     # four shards


def sources():
    return {name: sample_source(name, n) for name, n in SIZES.items()}


def exam() -> list[EvaluationSet]:
    "An evaluation set that meets documents of two shards."
    meets = [next(sample_documents("pubmed", 1, start=i)) for i in (3, 1_010)]
    return [EvaluationSet("exam", [Document(f"q{i}", " ".join(d.text.split()[20:60]), "exam") for i, d in enumerate(meets)])]


def make(folder: Path, engine=Engine()) -> Collection:
    build_collection(Work(folder / "work", sources(), Steps(language=None), True, engine), folder / "corpus", None, 600, exam())
    return Collection(folder / "corpus")


def content(collection: Collection) -> dict:
    "The hash of every file that holds documents."
    return {name: about["sha256"] for name, about in collection.manifest["files"].items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one"))


def test_two_workers_make_the_same_corpus(one, tmp_path):
    other = make(tmp_path, Engine(2))
    assert other.fingerprint == one.fingerprint
    assert content(other) == content(one) and len(content(one)) > 20
    assert [row["step"] for row in one.removed("pubmed").to_pylist()] == ["decontamination"] * 2


@pytest.mark.slow
def test_ray_makes_the_same_corpus(one, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: the extra `ray` brings it, and so does `make oracles`")
    command = [sys.executable, __file__, str(tmp_path), "ray", "2"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_memory_monitor_refresh_ms": "0"}, timeout=300)
    other = Collection(tmp_path / "corpus")
    assert other.fingerprint == one.fingerprint and content(other) == content(one)


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
first, last = re.search(r"#SBATCH --array=(\\d+)-(\\d+)", script).groups()
for task in range(int(first), int(last) + 1):
    subprocess.run(["bash", sys.argv[-1]], env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}}, check=True)
print("Submitted batch job 1")
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(one, tmp_path):
    "SIGKILL at several moments, among them the middle of a stage and the last seconds."
    command = [sys.executable, __file__, str(tmp_path), "local", "1"]
    environment, chance = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, random.Random(0)

    def marks(): return len(list((tmp_path / "work").glob("stages/*/completions/*")))
    killed_at = []
    for wanted in (0, 1, 3, 5, 9, 12, 16):       # complete tasks, of 17: in the middle of reading, of each stage, of the last seconds
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not ((tmp_path / "work").exists() and marks() >= wanted): time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        if process.poll() is not None: break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(marks())
    assert len(killed_at) >= 5 and killed_at == sorted(killed_at), "completed tasks were lost, or nothing was killed"
    subprocess.run(command, env=environment, check=True)
    other = Collection(tmp_path / "corpus")
    assert other.fingerprint == one.fingerprint and content(other) == content(one)
    assert not list(tmp_path.glob(".corpus.*/")) and not (tmp_path / "work").exists()


def sleep(folder, rank):
    (folder / f"{rank}-{os.getpid()}").touch()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="whether a process is there is read from /proc")
def test_workers_end_with_a_build_that_is_killed(tmp_path):
    "A worker that went on would write where the next build works."
    code = f"from pathlib import Path; import functools, test_pipeline as t; t.run_stage(t.Engine(2), Path({str(tmp_path)!r}) / 'stage', 2, t.Do(functools.partial(t.sleep, Path({str(tmp_path)!r}))))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {code}"], env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(found := list(tmp_path.glob("[01]-*"))) < 2: assert process.poll() is None; time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers, began = [Path("/proc") / p.name.split("-")[1] for p in found], time.monotonic()
    while any(p.exists() and "Z" not in (p / "stat").read_text().rsplit(")", 1)[1].split()[0] for p in workers):
        assert time.monotonic() - began < 30, "a worker outlived its build"
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)      # datatrove's idle manager


def test_a_task_that_is_run_twice_changes_nothing(one, tmp_path, monkeypatch):
    "Killed between its last byte and its mark, a task is run again over its own files, and those behind it over theirs."
    work = Work(tmp_path / "work", sources(), Steps(language=None), True)
    with monkeypatch.context() as patch:
        def broken(*_): raise OSError("the disk is full")
        patch.setattr("biomamba.collection.write_collection", broken)
        with pytest.raises(OSError, match="disk is full"):
            build_collection(work, tmp_path / "corpus", None, 600, exam())
    for stage in ("read", "exact", "near", "decontaminate", "tokenize"):
        marks = sorted((work.folder / "stages" / stage / "completions").iterdir())
        for mark in marks[::2]: mark.unlink()
    build_collection(work, tmp_path / "corpus", None, 600, exam())
    assert content(Collection(tmp_path / "corpus")) == content(one)


def refuse(rank): raise UserError(f"shard {rank} is broken; another one is accepted")


def crash(rank): return 1 // rank


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_is_one_sentence_from_any_process(workers, tmp_path):
    with pytest.raises(UserError, match=r"^shard \d is broken; another one is accepted$"):
        run_stage(Engine(workers), tmp_path, 3, Do(refuse))
    with pytest.raises(ZeroDivisionError):
        run_stage(Engine(workers), tmp_path / "other", 2, Do(crash))
    assert (tmp_path / "other" / "failed" / "00000.json").exists()


@pytest.mark.parametrize("call", ["build('sample', 'corpus', mixture={'c4': 1.0}, workers=2, vocabulary=600)", "run_stage(Engine(2), Path('stage'), 2, Do(str))"])
def test_a_script_that_its_workers_cannot_import_is_one_sentence(call, tmp_path):
    "It hung: each worker began the build again and waited for the lock that the first one held."
    script = tmp_path / "script.py"
    script.write_text(f"from pathlib import Path\nfrom biomamba.building import build\nfrom biomamba.pipeline import Do, Engine, run_stage\n{call}\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120)
    assert done.returncode and 'under `if __name__ == "__main__":`, or workers=1, is accepted' in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1 and [p.name for p in tmp_path.iterdir()] == ["script.py"]


def test_nothing_is_announced(tmp_path, capfd):
    run_stage(Engine(2), tmp_path, 2, Do(str))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_slurm_is_asked_for_the_same_tasks(tmp_path, monkeypatch):
    "A stand-in for sbatch that runs the array job on this machine."
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable))
    sbatch.chmod(0o755)
    for name, script in (("srun", 'while [[ "$1" != launch_* ]]; do shift; done\nexec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    options = {"time": "1:00:00", "partition": "cpu", "slurm_logs_folder": str(tmp_path / "slurm"), "mail_user": None}
    run_stage(Engine(2, "slurm", options), tmp_path / "stage", 3, Do(functools.partial(touch, tmp_path / "out")))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "1", "2"]


def touch(folder, rank): (folder / str(rank)).touch()


if __name__ == "__main__":
    folder, executor, workers = sys.argv[1:]
    make(Path(folder), Engine(int(workers), executor))
