"The built site in a browser: every page loads cleanly on a phone, every link leads somewhere, pictures show, search finds."
import functools
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import lxml.html
import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE, SHOTS = ROOT / "_docs", ROOT / "_proc" / "screenshots"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SHOWN = ["index.html", "06a_ssd.html", "10_cpt.html", "guides/own_corpus.html", "guides/reproduction.html", "api/index.html", "api/perplexity.html"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REPOSITORY, WEB = "https://github.com/biomamba/biomamba/blob/main/", "https://biomamba.github.io/biomamba"
pytestmark = pytest.mark.slow


def absent(what: str) -> None:
    "Skip; under `make test-docs`, which exists to look, fail."
    (pytest.fail if os.environ.get("BIOMAMBA_SITE") == "must be looked at" else pytest.skip)(what)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words): pass


@pytest.fixture(scope="module")
def pages() -> list[str]:
    "The pages of the site, by their paths."
    if not (SITE / "search.json").exists(): absent("there is no built site in _docs: `make docs` builds it")
    return sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def address(pages):
    "The site, served on this machine."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make test-docs` installs it")
    if CHROMIUM is None: absent("there is no Chromium on this machine")
    with sync.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def watched(browser, size: dict, address: str) -> tuple:
    "A tab of a size, and the list of what goes wrong in it; it reaches no other address."
    tab, wrong = browser.new_page(viewport=size), []
    tab.on("console", lambda message: wrong.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
    tab.on("requestfailed", lambda request: None if request.failure == "net::ERR_ABORTED" else wrong.append(f"failed: {request.url}"))  # aborted: the tab has moved on
    tab.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:")) else wrong.append(f"elsewhere: {request.url}"))
    return tab, wrong


# Pictures that show nothing, and what is wider than the window though it does not scroll in a box of its own.
LOOK = """async () => {
    await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
    const wide = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !(() => { for (let p = e; p; p = p.parentElement) if (/(auto|scroll|hidden|clip)/.test(getComputedStyle(p).overflowX) && p.id !== 'quarto-content') return true })());
    return {blank: [...document.images].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 80)),
            overflow: document.documentElement.scrollWidth - innerWidth, wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
            title: document.title, text: document.querySelector('main').innerText.length}
}"""


def test_every_page_loads_cleanly_on_a_phone(pages, address, browser):
    tab, wrong = watched(browser, PHONE, address)
    found = {}
    for page in pages:
        tab.goto(address + page, wait_until="load")
        seen = tab.evaluate(LOOK)
        problems = [*wrong, *(f"blank picture {src}" for src in seen["blank"]), *(f"cut off: {e}" for e in seen["wide"])]
        if seen["overflow"] > 0: problems.append(f"{seen['overflow']} px wider than the window")
        if not seen["title"] or seen["text"] < 40: problems.append("an empty page")
        if problems: found[page] = problems
        wrong.clear()
    tab.close()
    assert not found, json.dumps(found, indent=1)[:6000]


def links(page: str) -> list[str]:
    "Where a page leads and what it loads."
    tree = lxml.html.fromstring((SITE / page).read_bytes())
    return [value for element, attribute, value, _ in tree.iterlinks() if attribute in ("href", "src") and value]


@functools.cache
def anchors(path: Path) -> set[str]:
    return set(lxml.html.fromstring(path.read_bytes()).xpath("//@id"))


def dead(page: str, link: str) -> bool:
    "Whether a link leads nowhere: on the site, or into the repository."
    if link.startswith(REPOSITORY): return not (ROOT / urlsplit(link.removeprefix(REPOSITORY)).path).exists()
    if link.startswith(WEB): return True   # a link to ourselves is relative
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return False
    target = (SITE / page).parent / unquote(parts.path) if parts.path else SITE / page
    if target.is_dir(): target = target / "index.html"
    return not target.exists() or bool(parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in anchors(target.resolve()))


def test_every_link_leads_somewhere(pages):
    found = {page: bad for page in pages if (bad := sorted({link for link in links(page) if dead(page, link)}))}
    assert not found, json.dumps(found, indent=1)[:6000]


def test_no_page_shows_markup_or_an_address_in_memory(pages):
    found = {}
    for page in pages:
        [main] = lxml.html.fromstring((SITE / page).read_bytes()).xpath("//main")
        said = [text for code in main.xpath(".//code") if (text := code.text_content()) and "](https://biomamba" in text]
        said += main.xpath(".//*[self::h1 or self::h2 or self::h3][contains(., ' at 0x')]/text()")
        for code in main.xpath(".//pre | .//code[not(ancestor::pre)] | .//math | .//style | .//script"): code.drop_tree()
        said += re.findall(r".{0,40}\]\(.{0,40}|Call self as a function", main.text_content())
        if said: found[page] = said
    assert not found, json.dumps(found, indent=1, ensure_ascii=False)[:6000]


def test_every_page_is_reached_from_the_front_page(pages):
    reached, open_ = set(), ["index.html"]
    while open_:
        page = open_.pop()
        if page in reached: continue
        reached.add(page)
        for link in links(page):
            parts = urlsplit(link)
            target = ((SITE / page).parent / unquote(parts.path)).resolve()
            if not parts.scheme and target.suffix == ".html" and target.exists(): open_.append(target.relative_to(SITE).as_posix())
    assert reached == set(pages)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_search_finds_perplexity(address, browser, size):
    tab, wrong = watched(browser, size, address)
    tab.goto(address + "index.html")
    if size is PHONE: tab.locator(".navbar-toggler").click()
    tab.locator("#quarto-search input").fill("perplexity")
    hit = tab.locator(".search-result").first
    hit.wait_for(timeout=10_000)
    assert "perplexity" in hit.inner_text().lower()
    hit.click()
    tab.wait_for_url("**/*.html*")
    assert "perplexity" in tab.locator("main").inner_text().lower() and not wrong
    tab.close()


def test_formulas_are_drawn_without_a_script(address, browser):
    tab, _ = watched(browser, DESK, address)
    tab.goto(address + "06a_ssd.html")
    assert tab.locator("math").count() > 20 and "\\(" not in tab.locator("main").inner_text()
    assert tab.locator("math[display=block]").first.bounding_box()["height"] > 15
    tab.close()


@pytest.mark.parametrize("page", SHOWN)
def test_pictures_are_taken_to_be_looked_at(address, browser, page):
    SHOTS.mkdir(parents=True, exist_ok=True)
    for name, size in {"desk": DESK, "phone": PHONE}.items():
        tab, _ = watched(browser, size, address)
        tab.goto(address + page)
        path = SHOTS / f"{page.removesuffix('.html').replace('/', '-')}-{name}.png"
        tab.screenshot(path=path)
        assert path.stat().st_size > 10_000
        tab.close()
