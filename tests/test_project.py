"The house rules that no single room can check."
import ast
import fnmatch
import importlib.metadata
import json
import re
import subprocess
import sys
import time
import warnings
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

import biomamba

ROOT = Path(__file__).resolve().parent.parent
LINES, MOST_LINES = 400, 450  # exported lines of a room: a warning, an error
# Name of a distribution where it is not the name of the module that it installs.
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
# Requirements that no module imports, and why they are needed all the same.
UNIMPORTED = {"ipykernel": "papermill starts it", "ipywidgets": "tqdm warns in every notebook without it"}


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(nb) -> list[str]:
    return [cell.source for cell in nb.cells if cell.cell_type == "code"]


def default_exp(nb) -> str | None:
    "The module that a notebook exports."
    found = [match[1] for source in code(nb) if (match := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M))]
    assert len(found) <= 1, found
    return found[0] if found else None


NOTEBOOKS = {path: read(path) for path in sorted((ROOT / "nbs").glob("[!_.]*.ipynb"))}
ROOMS = {path: module for path, nb in NOTEBOOKS.items() if (module := default_exp(nb))}
MODULES = list(ROOMS.values())
RUNS = [path for path in NOTEBOOKS if path not in ROOMS and path.stem != "index"]
IDS = {"ids": lambda value: value.stem if isinstance(value, Path) else str(value)}


def parsed(source: str) -> ast.Module:
    "A cell without IPython's own lines, as Python."
    return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M))


def imports(tree: ast.AST) -> set[str]:
    "Dotted names of everything that is imported, relative ones as biomamba.x."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["biomamba" if node.level else "", node.module]))
            inner = [f"{module}.{alias.name}" for alias in node.names] if module == "biomamba" else [module]
            found |= set(inner)
    return found


def rooms_used(names: set[str]) -> set[str]:
    "The rooms among imported names."
    return {name.split(".")[1] for name in names if name.startswith("biomamba.") and name.split(".")[1] in MODULES}


def in_a_process(source: str) -> dict:
    "What a fresh interpreter prints, as JSON."
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- importing

def test_import_is_light():
    started = time.perf_counter()
    loaded = in_a_process("import biomamba, sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    print(f"a fresh interpreter imports biomamba in {time.perf_counter() - started:.2f} s")
    assert not {"torch", "transformers", "datasets", "pandas", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("module", [m for m in ("paper", "runs", "documents", "sample", "corpus", "plan") if m in MODULES])
def test_the_first_rooms_are_light(module):
    loaded = in_a_process(f"import biomamba.{module}, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "transformers", "datasets"} & set(loaded)


def test_the_standard_library_is_not_shadowed():
    inside = [path for folder in (ROOT, ROOT / "nbs", ROOT / "tests") for path in folder.iterdir()]
    importable = {path.stem for path in inside if path.suffix == ".py" or path.is_dir()}
    assert not importable & set(sys.stdlib_module_names)
    for module in set(MODULES) & set(sys.stdlib_module_names):
        source = f"import biomamba.{module}, {module}, json; print(json.dumps({module}.__file__ or ''))"
        assert str(ROOT) not in in_a_process(source)


def test_one_version():
    version = settings()["version"]
    assert biomamba.__version__ == version
    assert importlib.metadata.version("biomamba") == version, "the installed metadata is stale: make setup"
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


# ---------------------------------------------------------------- rooms

def test_every_module_is_a_room():
    assert len(set(MODULES)) == len(MODULES)
    assert {path.stem for path in (ROOT / "biomamba").glob("[!_]*.py")} == set(MODULES)
    for path, module in ROOMS.items():
        assert re.fullmatch(rf"\d\d[a-z]?_{module}", path.stem), f"{path.name} exports {module}"


@pytest.mark.parametrize("path, module", ROOMS.items(), **IDS)
def test_a_room_imports_only_rooms_above_it(path, module):
    above = set(MODULES[:MODULES.index(module)])
    exported = rooms_used(imports(ast.parse((ROOT / "biomamba" / f"{module}.py").read_text())))
    assert exported <= above, f"{path.name} imports {exported - above}"
    shown = set().union(*[rooms_used(imports(parsed(source))) for source in code(NOTEBOOKS[path])])
    assert shown <= above | {module}, f"a cell of {path.name} imports {shown - above - {module}}"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_is_small_and_names_what_it_offers(module):
    text = (ROOT / "biomamba" / f"{module}.py").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# %%")]
    assert "\n__all__ = [" in text
    assert len(lines) <= MOST_LINES, f"{module} exports {len(lines)} lines: it is two rooms"
    if len(lines) > LINES:
        warnings.warn(f"{module} exports {len(lines)} lines, more than {LINES}")


@pytest.mark.parametrize("path", NOTEBOOKS, **IDS)
def test_the_first_cell_is_title_and_subtitle(path):
    first = NOTEBOOKS[path].cells[0]
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert first.cell_type == "markdown" and len(lines) == 2, f"{path.name}: nbdev drops what else its first cell holds"
    assert lines[0].startswith("# ") and lines[1].startswith("> ")


@pytest.mark.parametrize("path", ROOMS, **IDS)
def test_imports_stand_in_cells_of_their_own(path):
    kinds = (ast.Import, ast.ImportFrom)
    bodies = [(source, [isinstance(node, kinds) for node in parsed(source).body]) for source in code(NOTEBOOKS[path])]
    mixed = [source for source, imported in bodies if any(imported) and not all(imported)]
    assert not mixed, f"{path.name}: the documentation would run only cells with imports, and these want others:\n" + "\n---\n".join(mixed)


@pytest.mark.parametrize("path", RUNS, **IDS)
def test_a_run_notebook_defines_nothing(path):
    sources = code(NOTEBOOKS[path])
    assert not any(re.search(r"^#\|\s*export", source, re.M) for source in sources)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = [node.lineno for source in sources for node in ast.walk(parsed(source)) if isinstance(node, kinds)]
    assert not defined, f"{path.name} defines functions; they belong in a room"


def test_a_run_without_outputs_is_refused(notebooks, tmp_path):
    run, library = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]) for source in ("1 + 1", "#| default_exp copy"))
    for name, nb in (("10_run", run), ("11_copy", library)):
        nb.metadata[notebooks.HASH_KEY] = notebooks.code_hash(nb)
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    [problem] = notebooks.check_problems(tmp_path)
    assert problem.startswith("10_run.ipynb is a run and stores no outputs")
    run.cells[0].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"})]
    nbformat.write(run, tmp_path / "10_run.ipynb")
    assert notebooks.check_problems(tmp_path) == []


# ---------------------------------------------------------------- what is installed

def requirements(key: str = "requirements") -> set[str]:
    return {re.split(r"[<>=!~\[;]", item)[0].lower() for item in settings()[key].split()}


def outside_imports() -> set[str]:
    "Distributions that the library and the shipped notebooks import, by name."
    trees = [ast.parse((ROOT / "biomamba" / f"{module}.py").read_text()) for module in MODULES]
    trees += [parsed(source) for path in RUNS for source in code(NOTEBOOKS[path])]
    names = {name.split(".")[0] for tree in trees for name in imports(tree)}
    names -= set(sys.stdlib_module_names) | {"biomamba"}
    return {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in names}


def test_requirements_are_what_is_imported():
    optional = requirements("cuda_requirements") | requirements("compare_requirements") | {"triton"}
    missing = outside_imports() - requirements() - optional
    assert not missing, f"imported and not in settings.ini: {sorted(missing)}"
    idle = requirements() - outside_imports() - set(UNIMPORTED)
    assert not idle, f"in settings.ini and imported nowhere: {sorted(idle)}"


def test_the_development_set_is_pinned():
    lines = [line for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for key in ("requirements", "dev_requirements", "docs_requirements", "compare_requirements", "ray_requirements", "browser_requirements", "lint_requirements"):
        assert requirements(key) <= set(pins), f"{key}: {sorted(requirements(key) - set(pins))} have no pin"


def test_what_is_installed_accepts_every_python_that_we_do():
    from packaging.specifiers import SpecifierSet
    oldest = settings()["min_python"] + ".0"
    lines = [line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    installed = {d.metadata["Name"].replace("_", "-").lower(): d for d in importlib.metadata.distributions()}
    pinned = {name: installed[name] for name, version in ((n.replace("_", "-").lower(), v) for n, v in lines) if name in installed and installed[name].version.split("+")[0] == version}
    assert len(pinned) > 50     # fewer where the newest are installed
    refuse = {name: d.metadata["Requires-Python"] for name, d in pinned.items() if oldest not in SpecifierSet(d.metadata["Requires-Python"] or "")}
    assert not refuse, f"pinned for Python {oldest} and newer, and refused there: {refuse}"


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_the_run_notebooks(tmp_path):
    clone = tmp_path / "clone"
    for path in published_files():
        target = clone / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--use-pep517", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(clone)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {f"biomamba/{path.name}" for path in (ROOT / "biomamba").glob("*.py")}
    assert held == library | {f"biomamba/notebooks/{path.name}" for path in RUNS}


def targets() -> set[str]:
    "What the Makefile can make."
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, **IDS)
def test_a_workflow_is_whole_and_makes_what_can_be_made(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["name"] == path.stem and flow[True] and flow["permissions"] == {"contents": "read"}   # YAML reads `on` as true
    for job in flow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] and set(job.get("needs", "").split()) <= set(flow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "run" in step: assert re.match(r"make ([a-z-]+)", step["run"])[1] in targets(), step
            else: assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", step["uses"]), step
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_the_front_page_says_what_the_question_run_says():
    [line] = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "22_qa_runs" in line]
    stored = nbformat.writes(NOTEBOOKS[ROOT / "nbs" / "22_qa_runs.ipynb"])
    rows = [re.search(rf"\| {name} \| ([^|\n]*\[[^|\n]*\]) \| [^|\[\n]*(\[[^|\n]*\]) \|", stored).groups() for name in ("BioASQ", "PubMedQA, as published")]
    found = re.findall(r"(?:-?[\d.]+ (?:points )?)?\[-?[\d.]+, -?[\d.]+\]", line.replace("−", "-"))
    assert [one.replace("points ", "") for one in found] == [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]


def test_publishing_is_trusted_and_ships_what_was_built():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["needs"] == "build"
    kept, fetched = jobs["build"]["steps"][-1], jobs["publish"]["steps"][0]
    assert kept["with"]["name"] == fetched["with"]["name"] and kept["with"]["path"] == "dist"


def test_hooks_make_what_can_be_made():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"] for hook in repo["hooks"]]
    assert {hook["id"] for hook in hooks} == {"gate", "ruff"}
    assert all(hook["entry"].removeprefix("make ") in targets() and not hook["pass_filenames"] for hook in hooks)


def test_make_help_names_every_target():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets() - {"help"} <= set(re.findall(r"^make ([a-z-]+) ", told, re.M))


# ---------------------------------------------------------------- the site

def in_sidebar() -> list[str]:
    "Patterns and paths of the sidebar, in order."
    found = []
    def walk(item):
        if isinstance(item, str): found.append(item)
        elif isinstance(item, list): [walk(part) for part in item]
        elif "href" in item: found.append(item["href"])
        else: walk(item["contents"])
    walk(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"])
    return found


def test_the_sidebar_has_every_room_and_guide_once_in_reading_order():
    patterns = in_sidebar()
    names = [path.name for path in NOTEBOOKS] + [f"guides/{path.name}" for path in sorted((ROOT / "nbs" / "guides").glob("*.md"))]
    lost = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    assert not lost, f"_quarto.yml names no section for {lost}"
    order = [min(i for i, pattern in enumerate(patterns) if fnmatch.fnmatchcase(path.name, pattern)) for path in NOTEBOOKS if path.stem != "index"]
    assert order == sorted(order)
    for pattern in patterns:
        if not pattern.startswith(("api/", "contributing", "changelog")): assert list((ROOT / "nbs").glob(pattern)), f"{pattern} in _quarto.yml is nothing"


# ---------------------------------------------------------------- what is published

def published_files() -> list[Path]:
    "Files that git tracks or would track."
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: nothing says which files are published")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    "The text of a file; of a picture, in a notebook too, or another binary file nothing."
    try:
        return re.sub(r'"image/(?:png|jpeg)": (?:"[^"]*"|\[[^\]]*\])', "", path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return ""


HOSTS = r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|download\.pytorch\.org|anaconda\.org|crates\.io|deb\.debian\.org"
OPTIONS = r"--(?:extra-)?index[-]url|--find[-]links"
PLACES = r"(?<![\w.:/<])/(?:work|root|home|Users|tmp|opt)/\w"


@pytest.mark.parametrize("what, pattern", [("a package registry", f"{HOSTS}|{OPTIONS}"), ("a path of one machine", PLACES)])
def test_no_file_names(what, pattern):
    found = [f"{path.relative_to(ROOT)}: {match[0]}" for path in published_files() if (match := re.search(pattern, text_of(path)))]
    assert not found, f"{what} is named in {found}"


def test_only_ci_names_the_folder_beside_the_checkout():
    named = {str(path.relative_to(ROOT)) for path in published_files() if re.search(r"\bshared/", text_of(path))}
    assert named <= {".ci/run"}
