"""Training processes that are forked from one that has imported everything: python tests/worlds.py

Reads jobs, one a line, as JSON. Each starts `processes` copies of the entry of a training process with `arguments`, within
`limit` seconds. `stop` sends a signal to the process itself after that optimizer step; `kill` ends it by SIGKILL around
the nth call of a function; `kill_after` does so after that many seconds; `file_limit` is the largest file that it may
write. Answers each line with one of its own: exit codes, standard errors and seconds.
"""
import importlib
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def after_step(step: int, number: int) -> None:
    "Send this process a signal when it has logged an optimizer step."
    from biomamba.runs import Run
    log = Run.log

    def logged(self, **line):
        log(self, **line)
        if line["step"] == step and "loss" in line:
            os.kill(os.getpid(), number)
    Run.log = logged


def killed_at(place: str, nth: int, before: bool) -> None:
    "End this process by SIGKILL before or after the nth call of `module.function`."
    name, function = place.rsplit(".", 1)
    module, left = importlib.import_module(name), [nth]
    inner = getattr(module, function)

    def counted(*args, **kwargs):
        left[0] -= 1
        if before and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, function, counted)


def child(job: dict, rank: int, port: int, parent: int, errors: Path) -> None:
    "What one process of a job does; never returns."
    code = 1
    try:
        os.dup2(os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2), 1)
        n = job["processes"]
        os.environ["BIOMAMBA_PARENT"] = str(parent)
        if n > 1:
            importlib.import_module("torch").set_num_threads(1)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if job.get("stop") and rank == 0:
            after_step(*job["stop"])
        if job.get("kill"):
            killed_at(*job["kill"])
        if job.get("file_limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        if job.get("note_kinds"):
            note_kinds(Path(job["arguments"][0]) / f"kinds-{rank}.json")
        from biomamba.training import main
        main(job["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def note_kinds(path: Path) -> None:
    "Write down the classes of the parameters that a process trains."
    from biomamba import training
    inner = training.prepare_state

    def noted(*args):
        state = inner(*args)
        path.write_text(json.dumps(sorted({type(p).__name__ for p in state.model.parameters()})))
        return state
    training.prepare_state = noted


def run(job: dict) -> dict:  # codes (negative: a signal), errors, seconds
    "Run one job to its end or its time limit."
    port, began, folder = free_port(), time.monotonic(), Path(tempfile.mkdtemp())
    files = [folder / str(rank) for rank in range(job["processes"])]
    children, parent, codes = {}, os.getpid(), {}
    for rank, errors in enumerate(files):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port, parent, errors)
        children[pid] = rank
    if job.get("kill_after") is not None:
        time.sleep(job["kill_after"])
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    while children and time.monotonic() - began < job.get("limit", 120):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for pid, rank in children.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[rank] = "time limit"
    return {"codes": [codes[rank] for rank in sorted(codes)], "errors": [path.read_text() for path in files], "seconds": time.monotonic() - began}


def prepare() -> None:
    "Import what every child needs, before the first fork and without starting a thread."
    import biomamba.training  # noqa: F401


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
