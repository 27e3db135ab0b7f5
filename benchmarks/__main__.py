"""Measure rows of the benchmark, or show what was measured.

    python -m benchmarks                      every row; about a quarter of an hour on two cores, longer where stock's bf16 has no instructions
    python -m benchmarks step-fp32 tokenizing these rows; the others keep their results
    python -m benchmarks --show               the table of what is stored, nothing measured
    python -m benchmarks --quick              a smoke run of tiny sizes, which writes nothing unless --results names a file

Real text: BIOMAMBA_DATA names a folder with pubmed/ and tokenizer/. The comparison of MEDLINE readers wants pubmed-parser==0.5.1.
"""
import argparse, sys
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, read_results, run_row, save_results, with_row
from benchmarks.rows import LIST, ROWS
from benchmarks.table import draw, grid
from biomamba.recipe import did_you_mean


def options() -> argparse.Namespace:
    "What the command line says."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"all where none is named: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in this process")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, help="the file of the results; benchmarks/results.json, and none with --quick")
    found = parser.parse_args()
    for name in found.rows:
        if name not in ROWS: parser.error(f"there is no row {name!r}{did_you_mean(name, ROWS)}; {', '.join(ROWS)} are accepted")
    return found


def main() -> None:
    "Measure, write after every row, print the table."
    asked = options()
    path = asked.results or (None if asked.quick else RESULTS)
    chosen = tuple(row for row in LIST if not asked.rows or row.name in asked.rows)
    results = read_results(path)
    for row in () if asked.show else chosen:
        print(f"{row.name} …", file=sys.stderr, flush=True)
        results = with_row(results, row.name, run_row(row, asked.quick))
        if path: save_results(results, path)
    if path == RESULTS and "values" in results["rows"].get("length", {}): draw(results, ROOT / "figures")
    print(grid(results, chosen))


if __name__ == "__main__": main()
