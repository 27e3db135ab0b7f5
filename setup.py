"Packaging: everything that can be data is read from settings.ini; the run notebooks ship as `biomamba.notebooks`."
import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

STATUSES = {
    "1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta",
    "5": "5 - Production/Stable", "6": "6 - Mature", "7": "7 - Inactive",
}
PYTHONS = ["3.11", "3.12", "3.13"]
ROOT = Path(__file__).resolve().parent


def settings() -> dict[str, str]:
    "The one section of settings.ini."
    parser = ConfigParser(delimiters=["="], interpolation=None)
    with open(ROOT / "settings.ini", encoding="utf-8") as file:
        parser.read_file(file)
    return dict(parser["DEFAULT"])


def is_run_notebook(path: Path) -> bool:
    "Whether the notebook is one that `biomamba` can run: it exports no module and is not the front page."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    exports = any("#| default_exp" in "".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return not exports and path.stem != "index"


class CompleteSdist(sdist):
    "A source distribution from which the wheel can be built again: it needs settings.ini."

    def make_distribution(self):
        self.filelist.append("settings.ini")
        super().make_distribution()


cfg = settings()
notebooks = sorted(p.name for p in (ROOT / cfg["nbs_path"]).glob("[!_.]*.ipynb") if is_run_notebook(p))
suffix = "_requirements"
extras = {key.removesuffix(suffix): value.split() for key, value in cfg.items() if key.endswith(suffix)}
readme = ROOT / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *[f"Programming Language :: Python :: {version}" for version in PYTHONS],
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]), "biomamba.notebooks"],
    package_dir={"biomamba.notebooks": cfg["nbs_path"]},
    package_data={"biomamba.notebooks": notebooks},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
    cmdclass={"sdist": CompleteSdist},
)
