"The package as somebody installs it: built, fetched with what it needs, installed without a network in an empty environment, used without nbdev."
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_project import RUNS, published_files, settings

from biomamba.cli import FUNCTIONS, VERBS

ROOT = Path(__file__).resolve().parent.parent
FAMILY = {"nbdev", "execnb", "ghapi", "fastcore", "pytest", "jupyterlab"}  # what development needs and the library does not
pytestmark = pytest.mark.slow


def run(*command, cwd: Path, **environment) -> str:
    "What a command prints; it must end well."
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"TQDM_DISABLE": "1"} | environment
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    "The source distribution, and the wheel that was built from it."
    clone = tmp_path_factory.mktemp("build") / "clone"
    for path in published_files():
        target = clone / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "build", cwd=clone)
    [sdist], [wheel] = (clone / "dist").glob("*.tar.gz"), (clone / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    "The folder of the programs of an environment that has the wheel and what it asks for."
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "-w", folder / "wheels", "-c", ROOT / ".ci" / "constraints.txt", built[1], cwd=folder)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    run(programs / "pip", "install", "--quiet", "--no-compile", "--no-index", "-f", folder / "wheels", "biomamba", cwd=folder)
    return programs


@pytest.fixture
def empty(tmp_path) -> Path:
    "A folder that is in no checkout."
    return tmp_path


def test_the_archives_hold_the_library_and_the_notebooks(built):
    sdist, wheel = built
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"biomamba/{path.name}" for path in (ROOT / "biomamba").glob("*.py")} <= held
    assert {f"biomamba/notebooks/{path.name}" for path in RUNS} <= held
    with tarfile.open(sdist) as archive: sources = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "biomamba/cli.py", "nbs/10_cpt.ipynb"} <= sources


def test_the_metadata_have_the_extras(built):
    with zipfile.ZipFile(built[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(name).decode().splitlines()
    assert {"cuda", "track", "docs", "dev"} <= {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert f"Version: {settings()['version']}" in lines and {"License: Apache-2.0", "License-Expression: Apache-2.0"} & set(lines)


def test_nothing_of_the_development_set_is_installed(installed, empty):
    names = {package["name"].lower() for package in json.loads(run(installed / "pip", "list", "--format", "json", cwd=empty))}
    assert "biomamba" in names and not names & FAMILY


def test_the_library_comes_from_the_environment_and_is_light(installed, empty):
    source = "import biomamba, sys; print(biomamba.__file__); print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    place, loaded = run(installed / "python", "-c", source, cwd=empty).splitlines()
    assert Path(place).is_relative_to(installed.parent) and loaded == "set()"
    modules = [path.stem for path in (ROOT / "biomamba").glob("[!_]*.py")]
    run(installed / "python", "-c", "import " + ", ".join(f"biomamba.{module}" for module in modules), cwd=empty)


def test_every_verb_explains_itself(installed, empty):
    said = run(installed / "biomamba", "--help", cwd=empty)
    for verb in (*VERBS, *FUNCTIONS):
        assert verb in said
        shown = run(installed / "biomamba", verb, "--help", cwd=empty)
        assert shown.startswith(f"usage: biomamba {verb}") and shown.count("--") > 2


def test_a_plan_and_a_run_of_a_few_steps(installed, empty):
    assert "optimizer steps" in run(installed / "biomamba", "plan", "--scale", "tiny", cwd=empty)
    source = "from biomamba.sample import write_sample; write_sample('texts', documents=120, questions=1, notes=0)"
    run(installed / "python", "-c", source, cwd=empty)
    small = {"d_model": 32, "layers": 2, "state": 8, "head_dim": 16, "vocabulary": 512, "max_tokens": 128, "base_steps": 2, "sequences_per_step": 4,
             "evaluations": 1, "validation_documents": 4}
    said = run(installed / "biomamba", "cpt", "--corpus", "texts", "--steps", "2", "--overrides", json.dumps(small), "--run-dir", "run", cwd=empty)
    assert "| PubMed (small source) |" in said or "PubMed (small source)" in said
    assert (empty / "run" / "model" / "model.safetensors").exists()


def test_a_mistake_is_one_sentence(installed, empty):
    done = subprocess.run([installed / "biomamba", "eval", "nowhere/at/all"], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.startswith("biomamba: there is no folder nowhere/at/all")
