"""The notebooks are the source: this executes them, exports and checks what is made from them.

    python .ci/notebooks.py outputs [NAME ...]   execute in place, clean, mark with the hash of the code cells
    python .ci/notebooks.py export [--check]     write the library's modules
    python .ci/notebooks.py clean [--check]      remove what is not worth storing
    python .ci/notebooks.py readme [--check]     write README.md from nbs/index.ipynb
    python .ci/notebooks.py check                stored outputs belong to the code cells and are fit to publish
    python .ci/notebooks.py gate                 all checks; changes nothing
    python .ci/notebooks.py library              a pattern that matches the library notebooks, for nbdev_test
"""
import argparse
import hashlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from execnb.nbio import loads, nb2str
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
HASH_KEY = "code_sha256"
CELL_SECONDS = 1800  # the longest that one cell may run under `outputs`
MACHINE_PATH = re.compile(r"(?<![\w.:/+=<-])/(?:home|root|Users|tmp|var|opt|mnt|srv|usr|work|workspace|private)/[\w.-]+")
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[\w+/=\s]+")
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s]+)')
# What a cell shows in the README when it offers several forms; html comes last because GitHub strips its styles.
README_FORMS = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain", "text/html"]


# ---------------------------------------------------------------- reading and writing

def notebook_paths(folder: Path) -> list[Path]:
    "The notebooks of a folder in the order of their numbers."
    return sorted(folder.glob("[!_.]*.ipynb"))


def code_sources(nb) -> list[str]:
    "The source of each code cell."
    return [cell.source for cell in nb.cells if cell.cell_type == "code"]


def code_hash(nb) -> str:
    "sha256 over the sources of the code cells: prose may change without a new execution."
    return hashlib.sha256(json.dumps(code_sources(nb)).encode()).hexdigest()


def is_library(nb) -> bool:
    "Whether the notebook exports a module."
    return any(re.search(r"^#\|\s*default_exp\b", source, re.M) for source in code_sources(nb))


def write(path: Path, content: str | bytes) -> bool:
    "Replace the file in one step where its content differs; says whether it did."
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return True


def relative(path: Path) -> str:
    "The path as a message names it."
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def stale(path: Path, content: str | bytes) -> bool:
    "Whether the file differs from what it should hold."
    data = content.encode() if isinstance(content, str) else content
    return not path.exists() or path.read_bytes() != data


# ---------------------------------------------------------------- cleaning and execution

def cleaned(text: str) -> str:
    "The notebook as nbdev_clean would write it, by the keys that settings.ini allows."
    cfg, nb = get_config(path=ROOT), loads(text)
    keys, cell_keys = cfg.get("allowed_metadata_keys").split(), cfg.get("allowed_cell_metadata_keys").split()
    clean_nb(nb, cfg.clear_all, keys, cell_keys, cfg.clean_ids)
    return nb2str(nb)


def clean_problems(folder: Path) -> list[str]:
    "Notebooks that hold what should not be stored."
    return [f"{relative(path)} is not clean: run `python .ci/notebooks.py clean`"
            for path in notebook_paths(folder) if stale(path, cleaned(path.read_text(encoding="utf-8")))]


def clean(folder: Path) -> None:
    "Clean the notebooks in place."
    for path in notebook_paths(folder):
        if write(path, cleaned(path.read_text(encoding="utf-8"))):
            print(f"cleaned {relative(path)}")


def execute(path: Path) -> None:
    "Execute one notebook in its folder and store its outputs; where a cell fails nothing is written."
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    quiet = ["--log-level=ERROR"]  # the kernel's warning about its local sockets is not the reader's business
    NotebookClient(
        nb, timeout=CELL_SECONDS, kernel_name="python3", resources=resources, extra_arguments=quiet
    ).execute()
    nb.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        HASH_KEY: code_hash(nb),
    }
    write(path, cleaned(nbformat.writes(nb)))


def outputs(folder: Path, names: list[str]) -> int:
    "Execute the named notebooks, or all, in their order; stops at the first that fails."
    from nbclient.exceptions import CellExecutionError

    paths = {path.stem: path for path in notebook_paths(folder)}
    unknown = [name for name in names if name.removesuffix(".ipynb") not in paths]
    if unknown:
        print(f"no notebook {', '.join(unknown)} in {relative(folder)}; there are: {', '.join(paths)}", file=sys.stderr)
        return 1
    wanted = {name.removesuffix(".ipynb") for name in names} or set(paths)
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # the kernels inherit it: a progress bar is no output worth storing
    for stem in [stem for stem in paths if stem in wanted]:
        print(f"executing {relative(paths[stem])}", flush=True)
        try:
            execute(paths[stem])
        except CellExecutionError as error:
            print(f"{relative(paths[stem])} failed and was left as it was\n{error}", file=sys.stderr)
            return 1
    return 0


# ---------------------------------------------------------------- stored outputs

def output_text(output) -> str:
    "What an output says, without pictures."
    data = output.get("data", {})
    shown = [value for form, value in data.items() if not form.startswith("image/") or "svg" in form]
    return DATA_URI.sub("", json.dumps([output.get("text", ""), output.get("traceback", ""), shown], ensure_ascii=False))


def output_problems(nb) -> list[str]:
    "Outputs that must not be published."
    found = []
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            where = f"the output of cell {cell.get('id', '?')}"
            if output.output_type == "error":
                found.append(f"{where} is an error, {output.get('ename')}")
            if output.get("name") == "stderr":
                found.append(f"{where} holds text from stderr")
            if path := MACHINE_PATH.search(output_text(output)):
                found.append(f"{where} names a path of the machine it ran on, {path[0]}")
    return found


def check_problems(folder: Path) -> list[str]:
    "Notebooks whose stored outputs are not those of their code cells, or are not fit to publish."
    found = []
    for path in notebook_paths(folder):
        nb = nbformat.read(path, as_version=4)
        if nb.metadata.get(HASH_KEY) != code_hash(nb):
            found.append(f"{relative(path)} stores outputs of other code cells than it has: run `make outputs NB={path.stem}`")
        if not is_library(nb) and not any(cell.get("outputs") for cell in nb.cells):
            found.append(f"{relative(path)} is a run and stores no outputs: run `make outputs NB={path.stem}`")
        found += [f"{relative(path)}: {problem}" for problem in output_problems(nb)]
    return found


# ---------------------------------------------------------------- export

def fresh_export(target: Path) -> Path:
    "Export every notebook into an empty project beside the working tree; returns the library folder."
    lib, nbs = get_config(path=ROOT).lib_path.name, get_config(path=ROOT).nbs_path.name
    (target / lib).mkdir()
    shutil.copy(ROOT / "settings.ini", target)
    shutil.copy(ROOT / lib / "__init__.py", target / lib)
    shutil.copytree(ROOT / nbs, target / nbs, ignore=shutil.ignore_patterns(".*"))
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    subprocess.run(command, cwd=target, env=environment, check=True)
    return target / lib


def modules(folder: Path) -> dict[str, bytes]:
    "Name and content of each module in a folder."
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}


def export_problems() -> list[str]:
    "Modules that are not what their notebooks export."
    library = get_config(path=ROOT).lib_path
    with tempfile.TemporaryDirectory() as folder:
        fresh, stored = modules(fresh_export(Path(folder))), modules(library)
    changed = [name for name in sorted(fresh | stored) if fresh.get(name) != stored.get(name)]
    return [f"{library.name}/{name} is not what the notebooks export: run `make export`" for name in changed]


def export() -> None:
    "Write the modules that the notebooks export, and remove those that none exports any more."
    library = get_config(path=ROOT).lib_path
    with tempfile.TemporaryDirectory() as folder:
        fresh = modules(fresh_export(Path(folder)))
    for name, content in fresh.items():
        if write(library / name, content):
            print(f"wrote {library.name}/{name}")
    for name in modules(library).keys() - fresh.keys():
        (library / name).unlink()
        print(f"removed {library.name}/{name}")


# ---------------------------------------------------------------- README

def from_root(match: re.Match) -> str:
    "A link written relative to the notebooks, as it reads from the root."
    prefix, target = match.groups()
    if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target, re.I):
        return match[0]
    path, *fragment = target.split("#", 1)
    return prefix + "#".join([posixpath.normpath(posixpath.join("nbs", path)), *fragment])


def readme_cell(cell):
    "The cell as the README shows it, or None: nbdev's directives are obeyed and not shown."
    directives = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M) if cell.cell_type == "code" else []
    if {"hide", "default_exp"} & {directive.split()[0] for directive in directives}:
        return None
    if cell.cell_type == "markdown":
        cell.source = LINK.sub(from_root, cell.source)
    else:
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    if "echo: false" in directives:
        cell.metadata["tags"] = ["remove-input"]
    return cell


def render_readme(index: Path) -> tuple[str, dict[str, bytes]]:
    "README.md and the pictures that it shows, by their paths from the root."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    config = Config()
    config.NbConvertBase.display_data_priority = README_FORMS
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input"}
    nb = nbformat.read(index, as_version=4)
    nb.cells = [cell for cell in map(readme_cell, nb.cells) if cell is not None]
    resources = {"output_files_dir": "figures", "unique_key": index.stem}
    body, resources = MarkdownExporter(config=config).from_notebook_node(nb, resources=resources)
    body = re.sub(r"[ \t]+$", "", body, flags=re.M)
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"<!-- made from nbs/{index.name} by `make readme` -->\n\n{body}\n", resources.get("outputs", {})


def readme_files() -> dict[Path, str | bytes]:
    "Each file that the front page makes, with its content."
    cfg = get_config(path=ROOT)
    text, pictures = render_readme(cfg.nbs_path / cfg.readme_nb)
    return {ROOT / "README.md": text, **{ROOT / name: data for name, data in pictures.items()}}


def readme_problems() -> list[str]:
    "Files of the front page that are stale."
    return [f"{relative(path)} is not what nbs/index.ipynb makes: run `make readme`"
            for path, content in readme_files().items() if stale(path, content)]


def readme() -> None:
    "Write README.md and its pictures."
    for path, content in readme_files().items():
        if write(path, content):
            print(f"wrote {relative(path)}")


# ---------------------------------------------------------------- the rest

def library_pattern(folder: Path) -> str:
    "A regular expression of the file names of the library notebooks."
    names = [path.stem for path in notebook_paths(folder) if is_library(nbformat.read(path, as_version=4))]
    return rf"^({'|'.join(map(re.escape, names))})\.ipynb$"


def report(problems: list[str], what: str) -> int:
    "Print the problems, or that there are none; returns the exit code."
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{what}: {len(problems)} problems" if problems else f"{what}: ok", flush=True)
    return int(bool(problems))


def arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbs", type=Path, default=ROOT / "nbs", help="the folder of notebooks")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("outputs").add_argument("names", nargs="*")
    for verb in ("export", "clean", "readme"):
        verbs.add_parser(verb).add_argument("--check", action="store_true", help="change nothing; fail where something would change")
    for verb in ("check", "gate", "library"):
        verbs.add_parser(verb)
    return parser.parse_args()


def main() -> int:
    "Run one verb; returns the exit code."
    args = arguments()
    checks = {
        "export": export_problems,
        "clean": lambda: clean_problems(args.nbs),
        "readme": readme_problems,
        "check": lambda: check_problems(args.nbs),
    }
    actions = {
        "export": export,
        "clean": lambda: clean(args.nbs),
        "readme": readme,
        "outputs": lambda: outputs(args.nbs, args.names),
        "library": lambda: print(library_pattern(args.nbs)),
    }
    if args.verb == "gate":
        return max([report(problems(), name) for name, problems in checks.items()])
    if args.verb == "check" or getattr(args, "check", False):
        return report(checks[args.verb](), args.verb)
    return actions[args.verb]() or 0


if __name__ == "__main__":
    sys.exit(main())
