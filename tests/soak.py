"""Whether a run that is killed anywhere ends as if it had not been: python tests/soak.py [KILLS] [SEED]

Each of KILLS runs of a tiny model is ended by SIGKILL at a random moment, started again, and compared with one that was
never killed: the exported weights, the last checkpoint (weights, average and both moments) and the metrics, times aside.
Half of the moments are drawn from the clock, half lie in a step, an evaluation, the writing of a checkpoint or the export;
twenty kills meet each of these places.
"""
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLACES = {  # function → how often a run calls it, at least
    "biomamba.optimizer_step.accumulate": 8, "biomamba.optimizer_step.loss_of": 8, "biomamba.perplexity.piecewise_losses": 12,
    "biomamba.checkpointing.save_file": 5, "biomamba.checkpointing.checksum": 10, "biomamba.runs.sync": 15, "biomamba.checkpointing.forget": 5,
    "biomamba.training.save_checkpoint": 5, "biomamba.training.save_model": 1, "biomamba.training.summary_of": 1}
TIMES = ("seconds", "tokens_per_second")


def found(folder: Path) -> dict:
    "What a finished run left, times aside."
    last = max((folder / "checkpoints").glob("step-*"))
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in
             (("model", folder / "model" / "model.safetensors"), ("state", last / "state.safetensors"))}
    metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = {k: v for k, v in json.loads((folder / "training.json").read_text()).items() if k not in TIMES}
    return files | {"checkpoint": last.name, "metrics": metrics, "summary": summary}


def moments(rng: random.Random, seconds: float) -> Iterator[dict]:
    "When to kill, without end: by the clock and around a call in turns, and around a call of each place before any comes twice."
    while True:
        for place in rng.sample(list(PLACES), len(PLACES)):
            yield {"kill_after": rng.uniform(0.1, 1.0) * seconds}
            yield {"kill": [place, rng.randint(1, PLACES[place]), rng.random() < 0.5]}


def soak(folder: Path, arguments: list[str], kills: int, seed: int = 0) -> list[dict]:  # per kill: moment, identical
    "Kill so many runs; `arguments` are those of a training process without its run folder, which `folder`/recipe.json describes."
    import worlds
    recipe, rng, results = (folder / "recipe.json").read_text(), random.Random(seed), []

    def job(name: str, **how) -> dict:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "recipe.json").write_text(recipe)
        return worlds.run({"processes": 1, "arguments": [str(folder / name), *arguments], **how})
    undisturbed = job("whole")
    assert undisturbed["codes"] == [0], undisturbed["errors"]
    whole = found(folder / "whole")
    for when in moments(rng, undisturbed["seconds"]):
        name = f"run-{len(results)}-{rng.randrange(10**6)}"
        if job(name, **when)["codes"] == [0]:
            continue                                    # it was over before that moment: another one
        again = job(name)
        assert again["codes"] == [0], again["errors"]
        results.append({"moment": when, "identical": found(folder / name) == whole})
        if len(results) == kills:
            return results


def small_run(folder: Path) -> list[str]:  # the arguments of a training process after its run folder
    "A tiny corpus, base and recipe, in a folder; they are made in a process of their own, so that this one starts no threads."
    pid = os.fork()
    if pid == 0:
        os.environ["BIOMAMBA_CACHE"] = str(folder / "cache")
        import test_training as t
        from biomamba.checkpoints import load_tokenizer, save_model
        collection = t.small_collection()
        save_model(t.new_model(t.mamba2_config(t.SMALL), seed=0), folder / "base", load_tokenizer(collection.tokenizer_folder))
        identity = t.identity_of(t.SMALL, t.Corpus(collection, t.SMALL), "base", folder / "base", 1)
        (folder / "recipe.json").write_text(json.dumps(identity))
        (folder / "collection").symlink_to(collection.folder)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return [str(folder / "base"), str((folder / "collection").resolve()), "train"]


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    kills, seed = (int(value) for value in (*sys.argv[1:3], *("20", "0")[len(sys.argv) - 1:]))
    sys.path.insert(0, str(Path(__file__).parent))
    import worlds
    worlds.prepare()
    with tempfile.TemporaryDirectory() as name:
        os.environ["BIOMAMBA_CACHE"] = str(Path(name) / "cache")
        results = soak(Path(name), small_run(Path(name)), kills, seed)
    same = sum(r["identical"] for r in results)
    for r in results:
        print(json.dumps(r["moment"]), "identical" if r["identical"] else "DIFFERENT")
    print(f"{len(results)} kills, {same} identical")
    sys.exit(same != len(results))
