"""Build the documentation site in _docs: python .ci/docs.py [--smalldocs]

The notebooks as nbdev processes them, the pages of nbs/guides, the API reference, the findings on the paper and the
benchmarks are gathered in _proc, with links that hold there, and rendered by Quarto, or by smalldocs where there is none.
Nothing else writes in either folder.
"""
import argparse
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from html import unescape

from notebooks import LINK, ROOT

STAGE, SITE = ROOT / "_proc", ROOT / "_docs"
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # of the root, and what they are called on the site
TITLE = re.compile(r"\A# (.*)\n\n> (.*)\n")  # of a guide
SYMBOL = re.compile(r"\[(`[^`]+`)\]\((https?://[^)\s]+)\)")  # a name that nbdev has linked
WITHIN = re.compile(r"(\[[^\[\]]*)\[(`[^`]+`)\]\(https?://[^)\s]+\)(?=[^\[\]]*\]\()")  # and one in the text of a link, which Markdown does not allow
FENCED = re.compile(r"(^ {0,3}(```+|~~~+).*?^ {0,3}\2[ \t]*$)", re.M | re.S)
TEX = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r"<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?")
CELL, INSEPARABLE = re.compile(r"<t[dh][^>]*>[^<]*</t[dh]>"), re.compile(r"\[[^\[\]]{3,24}\]|[−+\d.]+ %|[\d.]+ → [\d.]+|\b(?:R|real|sample)-[\dL]\b|-p \w+")
WORDS = re.compile(r'(<td style="text-align: ?)right(?=;?">(?:[^<]*?[a-z]{3,}\b){4})')  # a cell of a column of figures that holds a sentence or a command
# smalldocs writes MathML below; Quarto does so itself, by a key that smalldocs does not read.
KNOWN_WARNINGS = {"format.html.html-math-method is ignored"}


# ---------------------------------------------------------------- links

def settings() -> dict[str, str]:
    "What settings.ini says of the site and of the repository."
    from nbdev.config import get_config
    return get_config(path=ROOT).d


def on_site(path: str) -> str:
    "Where a file of the repository stands: on the site, or in the repository on the web."
    if path.startswith("nbs/"): return path.removeprefix("nbs/")
    if path in PAGES or path.startswith("figures/"): return PAGES.get(path, path)
    cfg = settings()
    return f"{cfg['git_url']}/blob/{cfg['branch']}/{path}"


def meant(name: str, target: str, source: str) -> bool:
    "Whether a name in prose is that of the library: a common word such as `total` is one in its own room alone."
    module = posixpath.basename(target).split(".")[0]
    return not re.fullmatch("`[a-z]+`", name) or posixpath.basename(source).endswith(f"_{module}.ipynb")


def relinked(text: str, source: str, symbols: dict[str, str]) -> str:
    "Markdown of a file of the repository with the links that it has on the site; code has none."
    page = on_site(source)

    def symbol(match: re.Match) -> str:
        name, address = match.groups()
        target = symbols.get(address.lower())
        return match[0] if target is None or meant(name, target, source) else name

    def link(match: re.Match) -> str:
        prefix, target = match.groups()
        path, hash_, fragment = target.partition("#")
        if target.lower() in symbols: path, hash_, fragment = symbols[target.lower()].partition("#")
        elif re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target, re.I): return match[0]
        else: path = on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if not path.startswith("http"): path = posixpath.relpath(path, posixpath.dirname(page) or ".")
        return prefix + path + hash_ + fragment

    def plain(match: re.Match) -> str: return match[1] if match[2].lower() in symbols else match[0]

    pieces = FENCED.split(text)  # text, a fenced block, its fence, text, …
    return "".join(LINK.sub(link, SYMBOL.sub(symbol, WITHIN.sub(r"\1\2", piece))) if i % 3 == 0 else SYMBOL.sub(plain, piece)
                   for i, piece in enumerate(pieces) if i % 3 != 2)


def symbol_links(index: dict[str, str]) -> dict[str, str]:
    "The address that nbdev gives a name of the library, and the page of the API reference that has it."
    from biomamba._modidx import d
    cfg, found = settings(), {}
    for module, names in d["syms"].items():
        page = f"api/{module.split('.')[1]}.qmd"
        for name, (place, _) in names.items():
            parts = name.split(".")
            known = [index[".".join(parts[:n])] for n in range(len(parts), 2, -1) if ".".join(parts[:n]) in index]
            found[f"{cfg['doc_host']}{cfg['doc_baseurl']}/{place}".lower()] = known[0].lstrip("/") if known else page
    return found


# ---------------------------------------------------------------- what is gathered

def api_reference() -> dict[str, str]:
    "A page for each module, from signatures and docments, and a page of them all; returns where each name stands."
    from smalldocs.api import Settings, build
    cfg = settings()
    build(Settings(STAGE, [cfg["lib_name"]], out="api", root=ROOT, source=f"{cfg['git_url']}/blob/{cfg['branch']}"))
    rooms = {path.stem.split("_", 1)[1]: path.name for path in sorted((ROOT / cfg["nbs_path"]).glob("[0-9]*_*.ipynb"))}
    lines = ["---\ntitle: API reference\n---\n", "Every public name, by module. The room of a module explains it, with examples.\n", "| module | room | what it does |\n|---|---|---|"]
    for page in sorted((STAGE / "api").glob("*.qmd")):
        text, room = page.read_text(encoding="utf-8"), rooms[page.stem]
        _, front, body = text.split("---\n", 2)
        page.write_text(f"---\n{front}---\n\nExplained in [{room.removesuffix('.ipynb')}](../{room}).\n{body}", encoding="utf-8")
        about = re.search(r'^description: "(.*)"$', front, re.M)[1]
        lines.append(f"| [{page.stem}]({page.name}) | [{room.removesuffix('.ipynb')}](../{room}) | {about} |".replace("\\", ""))
    (STAGE / "api" / "index.qmd").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return json.loads((STAGE / "_symbols.json").read_text(encoding="utf-8"))


def notebooks(symbols: dict[str, str]) -> None:
    "The notebooks, processed by nbdev."
    from nbdev.serve import proc_nbs
    proc_nbs()
    for path in sorted(STAGE.glob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "raw": text = re.sub(r"^output-file:.*\n", "", text, flags=re.M)  # Quarto would name the page without its number
            cell["source"] = relinked(text, f"nbs/{path.name}", symbols) if cell["cell_type"] == "markdown" else text
            for output in cell.get("outputs", []):
                shown = output.get("data", {}).get("text/markdown")
                if shown: output["data"]["text/markdown"] = relinked("".join(shown).replace("__main__.", ""), f"nbs/{path.name}", symbols)
        path.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


def findings() -> str:
    "What does not hold in the paper's own tables, and what they cannot decide: computed from them now."
    from biomamba.claims import all_findings
    found, parts = all_findings(), []
    for verdict, heading in ((False, "What does not hold"), (None, "What cannot be decided")):
        some = [f for f in found if f.holds is verdict]
        parts.append(f"### {heading}\n\n{len(some)} of {len(found)} statements.\n")
        parts += [f"- **{f.claim}** ({f.where}). {f.computation}." + (f" *{f.consequence}.*" if f.consequence else "") for f in some]
        parts.append("")
    return "\n".join(parts)


def benchmarks() -> str:
    "The table of what was measured."
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import RESULTS
    from benchmarks.table import page
    if not RESULTS.exists(): return "No measurement is stored in this checkout: `make bench` takes them, writes `benchmarks/results.json`, and this page shows them when the site is built again."
    picture = "figures/time_against_length.svg"
    return page(RESULTS) + (f"\n\n![Seconds of a training step against the length of the row](../../{picture})\n" if (ROOT / picture).exists() else "")


def benchmarks_avx2() -> str:
    "The same of a processor without bf16 instructions, as far as it was measured."
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import RESULTS
    from benchmarks.table import page
    return page(RESULTS.with_name("results-avx2.json"), measured=True)


COMPUTED = {"<!-- findings -->": findings, "<!-- benchmarks -->": benchmarks, "<!-- benchmarks avx2 -->": benchmarks_avx2}  # what stands for what in a page


def pages(symbols: dict[str, str]) -> None:
    "The pages beside the notebooks, with what is computed for them."
    from nbdev.doclinks import NbdevLookup
    lookup = NbdevLookup()
    for path in [ROOT / name for name in PAGES] + sorted((ROOT / "nbs" / "guides").glob("*.md")):
        text, source = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        text = TITLE.sub(lambda m: f"---\ntitle: {json.dumps(m[1])}\ndescription: {json.dumps(m[2])}\n---\n", text)
        for mark, make in COMPUTED.items():
            if mark in text: text = text.replace(mark, make())
        target = STAGE / on_site(source)
        target.parent.mkdir(exist_ok=True)
        target.write_text(relinked(lookup.linkify(text), source, symbols), encoding="utf-8")


def gather() -> None:
    "All sources of the site, in _proc."
    for folder in (STAGE, SITE): shutil.rmtree(folder, ignore_errors=True)
    STAGE.mkdir()
    symbols = symbol_links(api_reference())
    notebooks(symbols)
    pages(symbols)
    shutil.copy(ROOT / "_quarto.yml", STAGE)
    shutil.copytree(ROOT / "figures", STAGE / "figures", dirs_exist_ok=True)
    (STAGE / "_symbols.json").unlink()


# ---------------------------------------------------------------- rendering

def finished(page: str) -> str:
    "A page with its formulas as MathML, which browsers show without a script from elsewhere, with figures in one piece and words from the left."
    from latex2mathml.converter import convert
    page = TEX.sub(lambda m: convert(unescape(m[2]), display="block" if m[1] == "display" else "inline"), KATEX.sub("", page))
    page = WORDS.sub(r"\1left", page)
    return CELL.sub(lambda m: INSEPARABLE.sub(r'<span class="whole">\g<0></span>', m[0]), page)


def render_smalldocs() -> list[str]:
    "Render with smalldocs; returns what it complains of."
    from smalldocs.site import build
    site = build(STAGE)
    for path in SITE.rglob("*.html"):
        path.write_text(finished(path.read_text(encoding="utf-8")), encoding="utf-8")
    return [warning for warning in site.warnings if warning not in KNOWN_WARNINGS]


def main() -> int:
    "Build; returns the exit code."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smalldocs", action="store_true", help="render with smalldocs even where Quarto is installed")
    args = parser.parse_args()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here
    gather()
    if shutil.which("quarto") and not args.smalldocs: return subprocess.run(["quarto", "render", str(STAGE)]).returncode
    problems = render_smalldocs()
    for problem in problems: print(problem, file=sys.stderr)
    print(f"docs: {len(problems)} problems" if problems else f"docs: ok, {len(list(SITE.rglob('*.html')))} pages in {SITE.name}", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
