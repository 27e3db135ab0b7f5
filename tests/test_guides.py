"Every command of the how-tos runs as it stands, or says that it was not tried."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import SMALL_MODEL, SMALLEST

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "nbs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
EXCUSES = ("# not tried here: ", "# run by tests/")
SIZES = {"documents=300": "documents=120, questions=20", "notes=120": "notes=60"}
SMALL = {name: value for name, value in SMALL_MODEL.items() if name != "vocabulary"}
IDS = {"ids": lambda path: path.stem}


def blocks(path: Path) -> list[str]:
    "The shell commands of a page, block by block."
    return [text for language, text in BLOCK.findall(path.read_text(encoding="utf-8")) if language == "bash"]


def excused(block: str) -> bool:
    return block.startswith(EXCUSES)


def small(command: str) -> str:
    "The command at the smallest sizes: what is appended here decides how long it takes and nothing else."
    for full, less in SIZES.items(): command = command.replace(full, less)
    if command.startswith("HF_HUB_OFFLINE=1 "): return "HF_HUB_OFFLINE=1 " + small(command.removeprefix("HF_HUB_OFFLINE=1 "))
    if command.startswith("biomamba cpt") and "--scale" not in command:
        own = SMALL | ({} if "--corpus my/corpus" in command else {"vocabulary": 512})
        return f"{command} --steps 2 --overrides '{json.dumps(own)}'"
    if command.startswith("papermill nbs/"):
        name = Path(command.split()[1]).stem
        given = {k: v for k, v in SMALLEST[name].items() if k not in ("adapted", "run_dir", "notes", "corpus")}
        return " ".join([command, "-k python3", *(f"-p {k} '{v if isinstance(v, str) else json.dumps(v)}'" for k, v in given.items())])
    return command


@pytest.mark.parametrize("path", GUIDES, **IDS)
def test_a_page_has_title_and_subtitle(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0].startswith("# ") and lines[1].startswith("> ")


def test_every_block_of_a_shell_is_marked_as_one():
    for path in GUIDES:
        languages = {language for language, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
        assert languages <= {"bash"}, f"{path.name} has blocks in {languages - {'bash'}}: this test would not run them"


def test_what_was_not_tried_says_why():
    for path in GUIDES:
        for block in blocks(path):
            first = block.splitlines()[0]
            if not first.startswith("#"): continue
            assert excused(block), f"{path.name}: {first}"
            if first.startswith("# run by "): assert (ROOT / first.removeprefix("# run by ").split(",")[0].split()[0]).exists(), first


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in GUIDES if any(not excused(b) for b in blocks(path))], **IDS)
def test_the_commands_of_a_page_run_in_their_order(path, tmp_path):
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    environment = os.environ | {"BIOMAMBA_CACHE": str(tmp_path / "cache"), "TQDM_DISABLE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for block in blocks(path):
        if excused(block): continue
        commands = [block] if "<<'END'" in block else block.splitlines()
        for command in commands:
            done = subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", small(command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{path.name}: {command}\n{small(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            ran += 1
    assert ran
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
