"""Whether a run folder holds what later work relies on: python .ci/results.py RUN"""
import json
import sys
from pathlib import Path

SOURCES = ["pubmed", "c4", "wikipedia"]
PERPLEXITY = ["ppl", "ci95", "tokens", "documents", "bits_per_byte"]
WANTED = {
    "": ["scale", "seed", "recipe", "corpus_fingerprint", "versions"],
    "training": ["steps", "documents", "tokens", "best_step", "seconds", "tokens_per_second"],
    "training.best_validation_loss": ["selection", *SOURCES],
    "environment": ["gpu", "driver", "cuda", "os", "python", "torch", "mamba_ssm", "transformers", "datasets"],
    **{f"perplexity.{model}.{source}": PERPLEXITY for model in ("base", "adapted") for source in SOURCES},
    **{f"change.{source}": ["relative", "ci95"] for source in SOURCES},
}
FILES = ["recipe.json", "manifest.json", "metrics.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json"]


def missing(results: dict, prefix: str, keys: list[str]) -> list[str]:
    "The dotted names of wanted keys that the results do not have."
    part = results
    for name in filter(None, prefix.split(".")):
        part = part.get(name, {})
    return [f"{prefix}.{key}".lstrip(".") for key in keys if key not in part]


def main(run: Path) -> int:
    "Print what is missing; returns the exit code."
    if not (run / "results.json").exists():
        print(f"{run}/results.json is missing: the run is not finished", file=sys.stderr)
        return 1
    results = json.loads((run / "results.json").read_text())
    lacking = [name for prefix, keys in WANTED.items() for name in missing(results, prefix, keys)]
    lacking += [name for name in FILES if not (run / name).exists()]
    if lacking:
        print(f"{run} lacks {', '.join(lacking)}", file=sys.stderr)
        return 1
    for source in SOURCES:
        base, adapted = (results["perplexity"][model][source]["ppl"] for model in ("base", "adapted"))
        low, high = results["change"][source]["ci95"]
        print(f"{source}: {base:.1f} -> {adapted:.1f} ({results['change'][source]['relative']:+.1%}, {low:+.1%} to {high:+.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
