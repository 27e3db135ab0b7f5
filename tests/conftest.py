"What the tests share: where things are, and real data where this machine has it."
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than half a minute; `make test-slow` runs it")


def named_folder(variable: str) -> Path:
    "The path that an environment variable names; the test is skipped where it is not set."
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: this test reads real data, which is not part of the project")
    assert Path(value).exists(), f"{variable} names {value}, which does not exist"
    return Path(value)


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder of real data."
    return named_folder("BIOMAMBA_DATA")


@pytest.fixture(scope="session")
def paper() -> Path:
    "The text of the paper."
    return named_folder("BIOMAMBA_PAPER")


@pytest.fixture(scope="session")
def notebooks():
    "The module .ci/notebooks.py."
    spec = importlib.util.spec_from_file_location("ci_notebooks", ROOT / ".ci" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "The tests neither use nor fill the checkout's cache of base models."
    before = os.environ.get("BIOMAMBA_CACHE")
    os.environ["BIOMAMBA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("BIOMAMBA_CACHE") if before is None else os.environ.update(BIOMAMBA_CACHE=before)
