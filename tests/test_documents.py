"""Readers: what goes in comes out or is counted; what is broken ends in one sentence; real files give real counts."""
import bz2, contextlib, functools, gzip, io, itertools, json, os, re, subprocess, sys, tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lxml import etree

from biomamba import documents, medline, records
from biomamba.documents import Document, file_hashes, read_bioasq, read_documents, read_hub, read_mimic, read_pubmedqa
from biomamba.records import ReadReport
from biomamba.runs import UserError

# BIOMAMBA_FUZZ=5000 makes every fuzz test that long; the examples below are what long runs found
FUZZ = settings(max_examples=int(os.environ.get("BIOMAMBA_FUZZ", 60)), deadline=None, derandomize="BIOMAMBA_FUZZ" not in os.environ,
                suppress_health_check=list(HealthCheck), database=None)
DATA = Path(os.environ.get("BIOMAMBA_DATA", ""))
real = pytest.mark.skipif("BIOMAMBA_DATA" not in os.environ, reason="BIOMAMBA_DATA does not name a folder of real files")


def article(pmid, title="A title.", abstract="An abstract.", version=1, language="eng", extra=""):
    text = f"<Abstract><AbstractText>{abstract}</AbstractText></Abstract>" if abstract else ""
    return (f'<PubmedArticle><MedlineCitation Status="MEDLINE"><PMID Version="{version}">{pmid}</PMID><Article><Journal><JournalIssue><PubDate>'
            f"<Year>2001</Year><Month>Feb</Month></PubDate></JournalIssue><Title>J Ex</Title></Journal><ArticleTitle>{title}</ArticleTitle>{text}"
            f"<Language>{language}</Language></Article>{extra}</MedlineCitation></PubmedArticle>")


def xml_set(*items, root="PubmedArticleSet"): return f"<?xml version='1.0'?>\n<{root}>\n{chr(10).join(items)}\n</{root}>".encode()
def delete(*pmids): return "<DeleteCitation>" + "".join(f'<PMID Version="1">{p}</PMID>' for p in pmids) + "</DeleteCitation>"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, source="pubmed", **options):
    report = ReadReport()
    found = list(read_documents(path, source, report=report, **options))
    assert report.read == len(found) and report.read + report.skipped.total() == report.present
    return found, report


def refusal(call):
    with pytest.raises(UserError) as caught: list(call())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders and formats

def test_a_folder_is_read_in_sorted_order_whatever_its_formats(tmp_path):
    lines = [json.dumps({"id": i, "text": f"text {i}"}).encode() + b"\n" for i in range(6)]
    write(tmp_path / "a.jsonl", lines[0])
    write(tmp_path / "b.json", lines[1])
    write(tmp_path / "c/a.jsonl.gz", gzip.compress(lines[2]))
    write(tmp_path / "c/b.jsonl.zst", zstandard.compress(lines[3]) + zstandard.compress(lines[4]))
    pq.write_table(pa.table({"id": [5], "text": ["text 5"]}), tmp_path / "d.parquet")
    write(tmp_path / "e.txt", "text 6\n")
    write(tmp_path / "f.xml", xml_set(article(7)))
    write(tmp_path / ".hidden/x.jsonl", lines[0])
    write(tmp_path / "README.md", "no data")
    found, report = read(tmp_path)
    assert [d.id for d in found] == ["0", "1", "2", "3", "4", "5", "e.txt", "7"]
    assert report.ignored == ["README.md"] and list(report.counts) == sorted(report.counts)
    assert [d.text for d in found[:6]] == [f"text {i}" for i in range(6)]


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c/a.jsonl.gz", "d.parquet", "f.xml"])
def test_reading_goes_on_behind_any_position(tmp_path, name):
    for file in ("a.jsonl", "b.json"): write(tmp_path / file, b"".join(json.dumps({"text": f"{file} {i}"}).encode() + b"\n" for i in range(5)))
    write(tmp_path / "c/a.jsonl.gz", gzip.compress(b'{"text": "one"}\nbroken\n{"text": "two"}\n'))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(5)]}), tmp_path / "d.parquet")
    write(tmp_path / "f.xml", xml_set(*map(article, (1, 2, 1, 3))))
    report, whole, places = ReadReport(), [], []
    for document in read_documents(tmp_path, "s", report=report, max_bad=0.5):
        whole.append(document)
        places.append(report.position)
    for i, place in enumerate(places):
        if place[0] == name: assert list(read_documents(tmp_path, "s", after=place, max_bad=0.5)) == whole[i + 1:]
    assert len({d.id for d in whole}) == len(whole) and Counter(d.id for d in whole)["1"] == 1


def test_ids_are_stable_text(tmp_path):
    rows = [{"text": "a", "url": "https://e.org"}, {"text": "b"}, {"text": "c", "id": 3}, {"text": "d", "title": "D"}, {"text": "e", "pmid": "05", "id": "x"}]
    found, _ = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    import hashlib
    assert [d.id for d in found] == [hashlib.sha256(b"https://e.org").hexdigest()[:24], hashlib.sha256(b"b").hexdigest()[:24], "3", hashlib.sha256(b"d").hexdigest()[:24], "05"]


def test_columns_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "text", "head": "title", "key": 7, "text": "not this"}\n')
    assert read(path, text="body", id="key")[0] == [Document("7", "text", "pubmed")]
    assert read(path, text=("head", "body"), id="key")[0][0].text == "title\ntext"
    pq.write_table(pa.table({"body": ["text"], "key": [7], "other": [[1]]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", text="body", id="key")[0] == [Document("7", "text", "pubmed")]
    assert "no column 'nobody'" in refusal(lambda: read_documents(path, "s", text="nobody"))
    assert "no column 'nobody'" in refusal(lambda: read_documents(tmp_path / "b.parquet", "s", text="nobody"))


def test_file_hashes_name_every_file_by_content(tmp_path):
    write(tmp_path / "b/x.jsonl", "1")
    write(tmp_path / "a.xml", "2")
    write(tmp_path / ".x", "3")
    import hashlib
    assert file_hashes(tmp_path) == {"a.xml": hashlib.sha256(b"2").hexdigest(), "b/x.jsonl": hashlib.sha256(b"1").hexdigest()}


# Bad input

@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999, mtime=0)[:-9], "cut off"),
    ("a.jsonl.gz", b"", "cut off"),
    ("a.jsonl.gz", b'{"text": "x"}\n', "cut off"),
    ("a.jsonl.zst", zstandard.compress(os.urandom(9999))[:-9], "cut off"),
    ("a.jsonl.zst", b"", "cut off"),
    ("a.jsonl", gzip.compress(b'{"text": "x"}\n', mtime=0), "ends in .gz is accepted"),
    ("a.jsonl", bz2.compress(b'{"text": "x"}\n'), "is of another format"),
    ("a.jsonl", b'[{"text": "x"}]', "is of another format"),
    ("a.jsonl", b"\n\n", "holds no document"),
    ("a.jsonl", b'{"text": ""}', "1 × empty text"),
    ("a.jsonl", b'{"label": 1}', "no column with text"),
    ("a.parquet", b"PAR1 nothing PAR1", "no readable Parquet"),
    ("a.parquet", b"", "no readable Parquet"),
    ("a.xml", b"", "no MEDLINE"),
    ("a.xml", b"<html><body/></html>", "is of another format"),
    ("a.xml", xml_set(article(1))[:-9], "cut off"),
    ("a.xml", xml_set(article(1), article(2))[:-60], "cut off"),
    ("a.xml", xml_set(article(1))[:-9] + b"<!--", "cut off"),
    ("a.xml", b"<?xml version='1.0' encoding='klingon'?>", "unknown encoding"),
    ("a.xml", b"<?xml version='1.0' encoding='zlib'?>", "unknown encoding"),
    ("a.xml", b"<?xml version='1.0' encoding='shift_jis'?><PubmedArticleSet>\x81", "declares"),
    ("a.txt", b"\xff\xfe\xff", "no UTF-8"),
])
def test_a_bad_file_ends_in_one_sentence_with_its_name(tmp_path, name, content, said):
    message = refusal(lambda: read_documents(write(tmp_path / name, content), "s"))
    assert said in message and name in message


def test_a_cut_file_says_what_was_read(tmp_path):
    good = b"".join(json.dumps({"text": f"{i} {os.urandom(40).hex()}"}).encode() + b"\n" for i in range(60_000))
    write(tmp_path / "a.jsonl", b'{"text": "first"}\n')
    write(tmp_path / "b.jsonl.gz", gzip.compress(good)[:-500_000])
    count = 0
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is damaged or was cut off .*; ([\d,]+) documents of it were read") as caught:
        for _ in read_documents(tmp_path, "s"): count += 1
    said = int(re.search(r"([\d,]+) documents", str(caught.value))[1].replace(",", ""))
    assert said == count - 1 > 30_000


def test_missing_and_empty_folders(tmp_path):
    assert "does not exist" in refusal(lambda: read_documents(tmp_path / "nowhere", "s"))
    assert "no file of a known format" in refusal(lambda: read_documents(tmp_path, "s"))
    assert "max_bad=2" in refusal(lambda: read_documents(write(tmp_path / "a.jsonl", "{}"), "s", max_bad=2))
    with pytest.raises(UserError): read_documents(tmp_path / "nowhere", "s")  # at the call, not at the first document


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    assert "a.jsonl cannot be read" in refusal(lambda: read_documents(tmp_path, "s"))


def test_a_name_that_is_no_unicode_is_one_sentence(tmp_path):
    write(tmp_path / os.fsdecode(b"\xff.jsonl"), '{"text": "x"}')
    for call in (file_hashes, lambda folder: read_documents(folder, "s")): assert "'\\udcff.jsonl'" in refusal(lambda: call(tmp_path)).replace(f"{tmp_path}/", "")


@contextlib.contextmanager
def without_rights(folder):
    "As a user who is not root; the folder is one that such a user may enter."
    folder.chmod(0o755)
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


@pytest.mark.parametrize("closed", ["a.jsonl", "sub", "sub/b.jsonl", ""])
def test_what_may_not_be_read_is_named_in_one_sentence(closed):
    calls = {"documents": lambda f: read_documents(f, "s"), "hashes": file_hashes, "a file": lambda f: read_documents(f / "sub/b.jsonl", "s"), "questions": lambda f: read_bioasq(f / "sub/b.jsonl"), "notes": lambda f: read_mimic(f)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "texts"
        for file in ("a.jsonl", "sub/b.jsonl", "sub/discharge.csv"): write(folder / file, '{"text": "x"}\n')
        os.chmod(folder / closed, 0)
        said = {}
        with without_rights(Path(name)):
            for call, read_it in calls.items():
                try: list(read_it(folder))
                except UserError as error: said[call] = str(error)
        os.chmod(folder / closed, 0o700)
    touched = {"a.jsonl": {"documents", "hashes"}, "sub": set(calls), "sub/b.jsonl": {"documents", "hashes", "a file", "questions"}, "": set(calls)}[closed]
    for call in touched: assert "cannot be read (Permission denied)" in said[call] and Path(closed or "texts").name in said[call] and "\n" not in said[call], call


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "else/x.jsonl", '{"text": "x"}')
    write(tmp_path / "texts/sub/y.jsonl", '{"text": "y"}')
    for link, target in (("texts/sub/here", "../../texts"), ("texts/other", "../else"), ("texts/self", "."), ("texts/z.jsonl", "../else/x.jsonl")): (tmp_path / link).symlink_to(target)
    assert list(file_hashes(tmp_path / "texts")) == ["other/x.jsonl", "sub/y.jsonl", "z.jsonl"]
    (tmp_path / "else/back").symlink_to("../texts")          # a circle of two folders
    assert list(file_hashes(tmp_path / "texts")) == ["other/x.jsonl", "sub/y.jsonl", "z.jsonl"]
    (tmp_path / "texts/gone.jsonl").symlink_to("nowhere")
    assert "gone.jsonl cannot be read" in refusal(lambda: read_documents(tmp_path / "texts", "s")) and "gone.jsonl" in refusal(lambda: file_hashes(tmp_path / "texts"))


def every_reader(folder):
    "name → (reader, file) of a small good file of each kind."
    asked = {"id": "1", "type": "yesno", "body": "Is it?", "exact_answer": "yes", "snippets": [{"text": "S."}]}
    qa = {str(i): {"QUESTION": "Is it?", "CONTEXTS": ["One."], "final_decision": "yes"} for i in range(1, 4)}
    lines = write(folder / "lines.jsonl", "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(3)))
    return {"lines": (functools.partial(read_documents, lines, "s"), lines), "questions": (functools.partial(read_bioasq, found := write(folder / "b.json", json.dumps({"questions": [asked | {"id": str(i)} for i in range(3)]}))), found),
            "abstracts": (functools.partial(read_pubmedqa, found := write(folder / "p.json", json.dumps(qa))), found), "notes": (functools.partial(read_mimic, found := write(folder / "discharge.csv", notes_csv([note(i, "n") for i in range(3)]))), found),
            "hub": (functools.partial(read_hub, "c4", folder=hub_copy(folder / "c4", "c4", rows=3)), Path("allenai/c4 (en) train"))}


@pytest.mark.parametrize("name", ["lines", "questions", "abstracts", "notes", "hub"])
def test_every_reader_resumes_and_refuses_nonsense_at_the_call(tmp_path, name):
    reader, file = every_reader(tmp_path)[name]
    report, whole, places = ReadReport(), [], []
    for document in reader(report=report): whole.append(document); places.append(report.position)
    assert len(whole) == 3 and {place[0] for place in places} == {str(file) if name == "hub" else file.name}
    for i, place in enumerate(places): assert list(reader(after=place)) == whole[i + 1:]
    for options, said in (({"max_bad": 2}, "max_bad=2"), ({"max_bad": -0.1}, "max_bad=-0.1"), ({"after": ("nowhere", 1)}, "'nowhere'")):
        with pytest.raises(UserError, match=re.escape(said)): reader(**options)


def test_a_reading_that_goes_on_counts_every_record_once(tmp_path):
    path = write(tmp_path / "a.jsonl", b"".join(b"bad\n" if i % 5 == 0 else b'{"text": "t%d"}\n' % i for i in range(100)))
    report, once = ReadReport(), ReadReport()
    whole = list(read_documents(path, "s", report=once, max_bad=0.5))
    stream = read_documents(path, "s", report=report, max_bad=0.5)
    first = [next(stream).id for _ in range(37)]
    stream.close()
    assert first + [d.id for d in read_documents(path, "s", report=report, max_bad=0.5, after=report.position)] == [d.id for d in whole]
    assert (report.counts, report.problems, report.corrupt) == (once.counts, once.problems, once.corrupt) and report.present == 100


def test_progress_shows_documents_and_a_rate(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(records, "progress", functools.partial(records.progress, file=shown, disable=False, delay=0, mininterval=0, miniters=1))
    list(read_documents(write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 20), "s"))
    assert "reading a.jsonl" in shown.getvalue() and re.search(r"20 documents \[.*[\d.]+ documents/s\]", shown.getvalue())


def test_titles_without_abstract_are_kept_or_left_out_by_choice(tmp_path):
    write(tmp_path / "a.xml", xml_set(article(1), article(2, abstract="")))
    write(tmp_path / "b.jsonl", '{"pmid": 3, "title": "T.", "abstract": " "}\n{"pmid": 4, "title": "T.", "abstract": "A."}\n{"pmid": 5, "text": "T."}\n')
    found, _ = read(tmp_path)
    assert [(d.id, d.meta.get("abstract")) for d in found] == [("1", True), ("2", False), ("3", False), ("4", None), ("5", None)]
    kept, report = read(tmp_path, titles=False)
    assert [d.id for d in kept] == ["1", "4", "5"] and report.skipped == {"a title without abstract": 2} and not report.corrupt and report.present == 5


def test_corrupt_records_are_counted_listed_and_limited(tmp_path):
    lines = [b'{"text": "t%d"}' % i for i in range(400)]
    for i in (3, 200): lines[i] = b'{"text": "t'
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found, report = read(path)
    assert len(found) == 398 and report.problems == [("a.jsonl", 4, "no JSON"), ("a.jsonl", 201, "no JSON")]
    assert "2 of 400 records are corrupt" in refusal(lambda: read_documents(path, "s", max_bad=0.004))
    many = write(tmp_path / "b.jsonl", b"\n".join([b'{"text": "x"}'] * 50 + [b"bad"] * 1_000_000))
    report = ReadReport()
    assert "b.jsonl" in refusal(lambda: read_documents(many, "s", report=report))
    assert report.present == 151, "the reading stops at the 101st corrupt record, not at the end"


def test_a_file_of_another_format_stops_a_large_folder(tmp_path):
    write(tmp_path / "a.jsonl", b'{"text": "x"}\n' * 10_000)
    write(tmp_path / "b.jsonl", b"\x00\x01\x02\n" * 5)
    assert refusal(lambda: read_documents(tmp_path, "s")).startswith("b.jsonl is of another format")


# MEDLINE

def test_the_older_set_and_bare_records(tmp_path):
    bare = re.sub("</?PubmedArticle>", "", article(11) + article(12))
    old = write(tmp_path / "a.xml", xml_set(bare, root="MedlineCitationSet"))
    assert [d.id for d in read(old)[0]] == ["11", "12"]
    assert [d.id for d in read(write(tmp_path / "b.xml", article(13)))[0]] == ["13"]


def test_update_files_revise_delete_and_version(tmp_path):
    write(tmp_path / "n1.xml.gz", gzip.compress(xml_set(*(article(i, f"old {i}") for i in range(1, 7)), article(7, "v2", version=2))))
    write(tmp_path / "n2.xml", xml_set(article(1, "new 1"), article(1, "newer 1"), article(7, "v1"), delete(2, 3)))
    write(tmp_path / "n3.xml", xml_set(article(3, "back 3"), article(4, "v3", version=3), article(4, "v2", version=2)))
    found, report = read(tmp_path)
    assert {d.id: d.text.split("\n")[0] for d in found} == {"1": "newer 1", "3": "back 3", "4": "v3", "5": "old 5", "6": "old 6", "7": "v2"}
    assert len(found) == 6 and report.present == 13 and report.corrupt == 0
    assert report.skipped == {"revised in a later file": 2, "repeated later in the file": 1, "deleted": 1, "an older version": 3}


def oracle_survivors(files):
    "The rule of revisions, written as a table that is replayed: (PMID → best entry), without memory limits."
    best = {}
    for number, entries in enumerate(files):
        for place, (pmid, version) in enumerate(entries):
            if version < 0: best = {p: b for p, b in best.items() if p != pmid or b[0] > -version}
            elif pmid not in best or version >= best[pmid][0]: best[pmid] = (version, number, place)
    return best


@FUZZ
@given(st.lists(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 1, 1, 2, 3, -1])), min_size=1, max_size=6), min_size=1, max_size=4))
@example([[(1, 1), (1, -1), (1, 1)]])
@example([[(1, 2)], [(1, -1), (1, 1)]])
def test_survivors_of_any_history(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("set")
    for n, entries in enumerate(files):
        write(folder / f"{n}.xml", xml_set(*(delete(p) if v < 0 else article(p, f"{n} {place}", version=v) for place, (p, v) in enumerate(entries))))
    best, report = oracle_survivors(files), ReadReport()
    try: found = list(read_documents(folder, "s", report=report))
    except UserError: found = []
    assert sorted((d.id, d.text.split("\n")[0]) for d in found) == sorted((str(p), f"{n} {place}") for p, (_, n, place) in best.items())
    assert report.present == sum(v > 0 for f in files for _, v in f) == report.read + report.skipped.total()


def test_markup_sections_and_what_is_not_the_abstract(tmp_path):
    other = '<OtherAbstract Type="PIP" Language="eng"><AbstractText>Not this.</AbstractText></OtherAbstract>'
    abstract = ('</AbstractText><AbstractText Label="METHODS" NlmCategory="METHODS">10<sup>-3</sup> &lt; <i>x</i><sub>1</sub>\n  <b>bold</b></AbstractText>'
                '<AbstractText Label="UNLABELLED">free</AbstractText><AbstractText Label="RESULTS"/><AbstractText>'
                '<mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:msup><mml:mi>r</mml:mi><mml:mn>2</mml:mn></mml:msup></mml:math>')
    found, _ = read(write(tmp_path / "a.xml", xml_set(article(1, "<i>Title</i>", abstract, extra=other))))
    assert found[0].text == "Title\nMETHODS: 10^-3 < x1 bold\nfree\nr^2"
    assert found[0].meta == {"year": 2001, "journal": "J Ex", "language": "eng", "abstract": True}
    empty, report = read(write(tmp_path / "b.xml", xml_set(article(2, "[Not Available].", ""), article(3, "T", "", language="fre"))))
    assert report.skipped == {"neither title nor abstract": 1} and empty[0].meta["language"] == "fre" and empty[0].meta["abstract"] is False


def test_a_broken_record_costs_one_record(tmp_path):
    good = [article(i, f"title {i}") for i in range(1, 9)]
    for damage in ("</ArticleTitle>", "</PubmedArticle>", "<PubmedArticle>", "<MedlineCitation Status=\"MEDLINE\">", "<PMID"):
        bad = good[:3] + [good[3].replace(damage, "")] + good[4:]
        found, report = read(write(tmp_path / "a.xml", xml_set(*bad)), max_bad=1)
        assert {d.id for d in found} >= {str(i) for i in (1, 2, 3, 5, 6, 7, 8)}, damage
        assert report.corrupt >= 1, damage


def test_thousands_of_records_without_an_end_cost_themselves_alone(tmp_path):
    lost = "".join(article(i).replace("</PubmedArticle>", "") for i in range(1, 1_200))
    (tmp_path / "a.xml").write_bytes(xml_set(article(5_000), lost, article(5_001)))
    report = ReadReport()
    assert [d.id for d in read_documents(tmp_path, "pubmed", report=report, max_bad=1)] == ["5000", "5001"]
    assert report.corrupt == 1_199 and report.present == 1_201


def test_a_delete_without_its_end_swallows_nothing(tmp_path):
    path = write(tmp_path / "a.xml", xml_set(article(1), delete(9).removesuffix("</DeleteCitation>"), article(2), delete(8), article(3)))
    found, report = read(path, max_bad=1)
    assert [d.id for d in found] == ["1", "2", "3"] and report.problems == [("a.xml", 2, "a damaged DeleteCitation")]


@pytest.mark.parametrize("place, text", [("comment", "<!-- <PubmedArticle>x</PubmedArticle> -->"), ("instruction", "<?x y?>")])
def test_what_may_stand_between_records(tmp_path, place, text):
    assert len(read(write(tmp_path / "a.xml", xml_set(article(1), text, article(2))))[0]) == 2


def test_entities_and_files_are_not_followed(tmp_path):
    secret = write(tmp_path / "secret/s.txt", "secret")
    bomb = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    head = f'<?xml version="1.0"?><!DOCTYPE PubmedArticleSet [<!ENTITY e0 "boom">{bomb}<!ENTITY s SYSTEM "file://{secret}">]>'
    body = xml_set(article(1), article(2, "&e11;"), article(3, "&s;"), article(4, "&undefined;")).decode().split("\n", 1)[1]
    found, report = read(write(tmp_path / "a.xml", head + body), max_bad=1)
    assert [d.id for d in found] == ["1"] and report.corrupt == 3 and "secret" not in repr(found)


def test_depth_and_size_are_bounded(tmp_path):
    deep, large = article(1, "<i>" * 10_000 + "x" + "</i>" * 10_000), article(2, "x" * (11 << 20))
    endless = "<PubmedArticle>" + "<x/>" * (5 << 20)
    path = write(tmp_path / "a.xml", xml_set(deep, large, article(3), endless, article(4)))
    found, report = read(path, max_bad=1)
    assert [d.id for d in found] == ["3", "4"] and report.corrupt >= 3


def test_a_namespace_that_the_set_declares(tmp_path):
    text = xml_set(article(1, "<mml:math><mml:mi>x</mml:mi></mml:math>")).replace(b"<PubmedArticleSet>", b'<PubmedArticleSet xmlns:mml="http://www.w3.org/1998/Math/MathML">')
    assert read(write(tmp_path / "a.xml", text))[0][0].text.startswith("x\n")


@pytest.mark.parametrize("encoding", ["utf-16", "iso-8859-1", "utf-8-sig", "windows-1252"])
def test_encodings(tmp_path, encoding):
    text = xml_set(article(1, "Förster é"), article(2, "x" * (3 << 20))).decode().replace("'1.0'", f"'1.0' encoding='{encoding.removesuffix('-sig')}'")
    assert read(write(tmp_path / "a.xml", text.encode(encoding)))[0][0].text.startswith("Förster é\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_records_do_not_depend_on_how_a_stream_is_cut(encoding):
    content = xml_set(article(1), "<!-- - -->", article(2, "é"), "junk", delete(3)).decode().encode(encoding)
    bytewise = [content[:2], *(content[i:i + 1] for i in range(2, len(content)))]
    assert list(medline.pieces_of(medline.in_utf8(bytewise))) == list(medline.pieces_of(medline.in_utf8([content])))


# Memory

def peak_of(code):
    "Peak memory in MB of a process that runs `code`."
    script = f"{code}\nprint(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_file(tmp_path):
    with gzip.open(tmp_path / "a.xml.gz", "wb", 1) as file:
        file.write(b"<PubmedArticleSet>")
        for i in range(30_000): file.write(article(i * 1200 + 1, abstract="word " * 300).encode())
        file.write(b"</PubmedArticleSet>")
    assert peak_of(f"from biomamba.documents import read_documents\nassert sum(1 for _ in read_documents({str(tmp_path)!r}, 's')) == 30000") < 200


@pytest.mark.slow
@real
def test_memory_on_real_records(tmp_path):
    pieces = re.findall(rb"<PubmedArticle>.*?</PubmedArticle>", gzip.decompress((DATA / "pubmed/pubmedsample18n0001.xml.gz").read_bytes()), re.DOTALL)
    with gzip.open(tmp_path / "a.xml.gz", "wb", 6) as file:
        file.write(b"<PubmedArticleSet>")
        for i in range(30_000): file.write(re.sub(rb"(<PMID[^>]*>)\d+", rb"\g<1>%d" % (10_000_000 + 1200 * i), pieces[i % len(pieces)], count=1))
        file.write(b"</PubmedArticleSet>")
    code = "from biomamba.documents import read_documents\nassert sum(1 for _ in read_documents({!r}, 's')) == 30000"
    assert peak_of(code.format(str(tmp_path))) <= 200


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_decompression_bomb_costs_no_memory(tmp_path, pack):
    path = write(tmp_path / ("a.jsonl" + (".gz" if pack is gzip.compress else ".zst")), pack(bytes(1 << 29)))
    code = f"from biomamba.documents import read_documents\ntry: list(read_documents({str(path)!r}, 's'))\nexcept ValueError as e: assert '64 MiB' in str(e)"
    assert peak_of(code) < 320


@pytest.mark.parametrize("zeros", [1, 1 << 16, 3 << 16])
def test_zeros_behind_a_gzip_file_mean_nothing(tmp_path, zeros):
    line = b'{"text": "x"}\n'
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(line) + bytes(zeros) + gzip.compress(line) + bytes(zeros))
    assert [d.text for d in read_documents(path, "s")] == ["x"] * 2
    assert "damaged" in refusal(lambda: read_documents(write(path, gzip.compress(line) + bytes(zeros) + b"rest"), "s"))


def test_dates_beyond_pythons_cost_no_text(tmp_path):
    columns = {"text": ["a", "b"], "timestamp": pa.array([1 << 62, 2], pa.timestamp("us")), "year": pa.array([1 << 30, 2], pa.date32())}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [(d.text, d.meta) for d in read_documents(tmp_path, "s")] == [("a", {}), ("b", {})]


# Public datasets, in local files of exactly their layout

CARD = "---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {path}\n---\n"


def hub_copy(folder, key, rows=1):
    "A local copy of a public dataset, an invented row or several times the same."
    config, path = {"pubmed": ("default", "chunk/*.jsonl"), "pubmed-medline": ("default", "data/train-*"), "c4": ("en", "en/c4-train.*.json.gz"),
                    "wikipedia": ("20231101.en", "20231101.en/train-*"), "pubmedqa": ("pqa_labeled", "pqa_labeled/train-*")}[key]
    write(folder / "README.md", CARD.format(config=config, path=path))
    if key == "pubmed":
        row = {"id": "pubmed23n0001_0", "title": "T.", "content": "Abstract.", "contents": "T. Abstract.", "PMID": 21}
        write(folder / "chunk/pubmed23n0001.jsonl", (json.dumps(row) + "\n") * rows)
    elif key == "c4": write(folder / "en/c4-train.00000-of-01024.json.gz", gzip.compress((json.dumps({"text": "Web page.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://e.org/a"}) + "\n").encode() * rows))
    else:
        tables = {"pubmed-medline": ("data", {"id": ["1"], "pubmed_id": ["22"], "title": ["T."], "authors": ["A B"], "journal": ["J"], "content": ["Abstract."],
                                              "source_url": ["https://e.org"], "publication_types": ["Review"]}),
                  "wikipedia": ("20231101.en", {"id": ["12"], "url": ["https://e.org/T"], "title": ["T"], "text": ["Article."]}),
                  "pubmedqa": ("pqa_labeled", {"pubid": pa.array([23], pa.int32()), "question": ["Is it?"], "context": [{"contexts": ["One.", "Two."], "labels": ["AIM", "RESULTS"],
                               "meshes": ["M"], "reasoning_required_pred": ["y"], "reasoning_free_pred": ["y"]}], "long_answer": ["It is."], "final_decision": ["yes"]})}
        sub, columns = tables[key]
        (folder / sub).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / sub / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("key, id, text", [("pubmed", "21", "T.\nAbstract."), ("pubmed-medline", "22", "T.\nAbstract."), ("c4", None, "Web page."),
                                           ("wikipedia", "12", "Article."), ("pubmedqa", "23", "AIM: One.\nRESULTS: Two.")])
def test_public_datasets_in_their_own_schema(tmp_path, key, id, text):
    report = ReadReport()
    found, = read_hub(key, folder=hub_copy(tmp_path / key, key), report=report)
    assert (found.id, found.text, found.source) == (id or records.stable_hash("https://e.org/a"), text, documents.HUB[key].source)
    assert report.read == report.present == 1
    if key not in ("pubmedqa",): assert next(read_documents(tmp_path / key, found.source)).text == found.text
    else: assert found.meta["question"] == "Is it?" and found.meta["answer"] == "yes"


@pytest.mark.parametrize("key, columns, id, text", [
    ("pubmed", {"id": ["pubmed23n0001_0"], "title": ["T."], "content": ["Abstract."], "contents": ["T. Abstract."], "PMID": pa.array([21], pa.int64())}, "21", "T.\nAbstract."),
    ("c4", {"text": ["Web page."], "timestamp": ["2019-04-25T12:57:54Z"], "url": ["https://e.org/a"]}, records.stable_hash("https://e.org/a"), "Web page."),
    ("pubmed-medline", {"id": ["1"], "pubmed_id": ["22"], "title": ["T."], "authors": ["A B"], "journal": ["J"], "content": [""], "source_url": ["https://e.org"], "publication_types": ["Review"]}, "22", "T."),
])
def test_public_datasets_as_parquet(tmp_path, key, columns, id, text):
    config = documents.HUB[key].config or "default"
    write(tmp_path / "README.md", CARD.format(config=config, path="data/train-*"))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/train-00000-of-00001.parquet")
    found, = read_hub(key, folder=tmp_path)
    local, = read_documents(tmp_path / "data", documents.HUB[key].source)
    assert (found.id, found.text) == (id, text) == (local.id, local.text)
    if text == "T.": assert found.meta["abstract"] is False and "1 × a title without abstract" in refusal(lambda: read_hub(key, folder=tmp_path, titles=False))


def test_a_part_of_a_public_dataset_is_taken_from_files_of_any_age(tmp_path):
    "File after file in an order of its own: a longer reading begins with a shorter one, and may go on behind any row."
    copy = hub_copy(tmp_path, "wikipedia")
    (copy / "20231101.en/train-00000-of-00001.parquet").unlink()
    for i in range(12): pq.write_table(pa.table({"id": [f"{i}-{k}" for k in range(3)], "text": ["An article."] * 3}), copy / f"20231101.en/train-{i:05d}-of-00012.parquet")
    def ids(**options): return [d.id for d in read_hub("wikipedia", folder=copy, **options)]
    plain, found, report = ids(), ids(spread=True), ReadReport()
    assert sorted(found) == sorted(plain) and found != plain == [f"{i}-{k}" for i in range(12) for k in range(3)]
    assert [id[-1] for id in found] == list("012") * 12, "a file is read to its end before the next"
    first = list(itertools.islice(read_hub("wikipedia", folder=copy, spread=True, report=report), 10))
    assert [d.id for d in first] + ids(spread=True, after=report.position) == found
    assert len({id.split("-")[0] for id in found[:12]} & {"0", "1", "2", "3"}) < 4, "the first third is not the oldest files"


def test_a_public_dataset_goes_on_behind_a_position(tmp_path):
    copy = hub_copy(tmp_path, "wikipedia")
    pq.write_table(pa.table({"id": list("abcd"), "text": ["1", "2", "3", "4"]}), copy / "20231101.en/train-00000-of-00001.parquet")
    report = ReadReport()
    stream = read_hub("wikipedia", folder=copy, report=report)
    assert [next(stream).id, next(stream).id] == ["a", "b"]
    assert [d.id for d in read_hub("wikipedia", folder=copy, after=report.position)] == ["c", "d"]


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    calls = ["read_hub('c4')", "read_hub('pubmed-medline')", "hub_revision('c4', revision='main')"]
    code = "from biomamba.documents import hub_revision, read_hub\n" + "\n".join(f"try: {call}\nexcept ValueError as error: print(error)" for call in calls)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == len(calls) and all("cannot be reached" in message and "local folder" in message for message in messages)
    assert ["allenai/c4" in message for message in messages] == [True, False, True]


def test_the_revision_is_pinned_and_can_be_changed(monkeypatch):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or iter([{"text": "x", "url": "u", "id": "1"}]))
    for key, hub in documents.HUB.items():
        if hub.source in ("c4", "wikipedia"): list(read_hub(key))
    list(read_hub("c4", revision="abc" + "0" * 37, split="validation"))
    assert [options["revision"] for _, options in asked] == [documents.HUB["c4"].revision, documents.HUB["wikipedia"].revision, "abc" + "0" * 37]
    assert all(options["streaming"] for _, options in asked) and asked[2][1]["split"] == "validation"
    assert all(re.fullmatch("[0-9a-f]{40}", hub.revision) for key, hub in documents.HUB.items() if key != "pubmed-medline")


def test_what_is_not_pinned_is_read_at_one_commit_that_can_be_named(monkeypatch):
    import datasets
    asked, commit = [], "c" * 40
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config, revision: asked.append((name, revision)) or type("Builder", (), {"hash": commit}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, revision, **options: asked.append((args[0], revision)) or iter([{"title": "T", "content": "C", "pubmed_id": "1"}]))
    assert documents.hub_revision("pubmed-medline") == commit == documents.hub_revision("c4", revision="main")
    assert len(list(read_hub("pubmed-medline"))) == 1 and documents.hub_revision("c4") == documents.HUB["c4"].revision
    name = "cyrilzakka/pubmed-medline"
    assert asked == [(name, None), ("allenai/c4", "main"), (name, None), (name, commit)], "the stream is opened at the commit that was named"


# Questions and notes

def test_bioasq_forms(tmp_path):
    base = {"id": "1", "type": "yesno", "body": "Is it?", "exact_answer": "yes", "snippets": [{"text": "S."}, {"text": "S."}, {"text": "T."}], "documents": ["http://e.org/pubmed/99"]}
    cases = [base, base | {"id": "2", "exact_answer": ["No"]}, base | {"type": "list"}, {k: v for k, v in base.items() if k != "exact_answer"},
             base | {"snippets": []}, base | {"exact_answer": "perhaps"}, {k: v for k, v in base.items() if k != "body"}, {k: v for k, v in base.items() if k != "documents"}, "text"]
    report = ReadReport()
    found = list(read_bioasq(write(tmp_path / "q.json", json.dumps({"questions": cases})), report=report, max_bad=0.5))
    assert [d.meta["answer"] for d in found] == ["yes", "no", "yes"] and found[0].text == "S.\nT." and found[2].meta["pmids"] == []
    assert report.skipped.total() == 6 and report.corrupt == 3 and report.present == 9
    assert "BioASQ's JSON" in refusal(lambda: read_bioasq(write(tmp_path / "r.json", "[1]")))
    assert "no JSON" in refusal(lambda: read_bioasq(write(tmp_path / "s.json", '{"questions": [')))
    assert "does not exist" in refusal(lambda: read_bioasq(tmp_path / "t.json"))


def test_pubmedqa_forms(tmp_path):
    base = {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "LABELS": ["AIM", "RESULTS"], "final_decision": "maybe", "LONG_ANSWER": "Perhaps."}
    entries = {"1": base, "2": {k: v for k, v in base.items() if k not in ("LABELS", "final_decision")}, "3": base | {"CONTEXTS": "One."}, "4": base | {"final_decision": "si"}, "x": base}
    report = ReadReport()
    found = list(read_pubmedqa(write(tmp_path / "q.json.gz", gzip.compress(json.dumps(entries).encode())), report=report, max_bad=1))
    assert [(d.id, d.text, d.meta["answer"]) for d in found] == [("1", "AIM: One.\nRESULTS: Two.", "maybe"), ("2", "One.\nTwo.", None)]
    assert [position for _, position, _ in report.problems] == [3, 4, 5]


def notes_csv(rows, end="\n"):
    import csv
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end)
    writer.writerow(documents.NOTE_COLUMNS)
    writer.writerows(rows)
    return out.getvalue().encode()


def note(i, text): return [f"1000{i}-DS-1", f"1000{i}", "2000", "DS", "1", "2150-01-02 00:00:00", "", text]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_notes_keep_their_lines_quotes_and_length(tmp_path, end):
    texts = ['Line one\n\nsaid "so", then', "x" * 300_000, "é"]
    write(tmp_path / "note/discharge.csv.gz", gzip.compress(notes_csv([note(i, t) for i, t in enumerate(texts)], end)))
    report = ReadReport()
    found = list(read_mimic(tmp_path, report=report))
    assert [d.text for d in found] == texts and [d.id for d in found] == [f"1000{i}-DS-1" for i in range(3)]
    assert all(d.meta["restricted"] for d in found) and found[0].meta["subject_id"] == "10000" and found[0].meta["storetime"] is None


@pytest.mark.parametrize("line, quote", [(5, "opening"), (6, "closing")])
def test_a_lost_quote_is_counted_and_the_rest_is_read(tmp_path, line, quote):
    rows = notes_csv([note(i, f"a\nb, {i}") for i in range(100)]).decode().split("\n")
    assert rows[line].count('"') == 1
    rows[line] = rows[line].replace('"', "")
    report = ReadReport()
    found = list(read_mimic(write(tmp_path / "discharge.csv", "\n".join(rows)), report=report, max_bad=0.2))
    assert report.corrupt >= 1 and len(found) >= 97 and report.read + report.skipped.total() == report.present
    assert not any("DS-1" in d.text for d in found), "one note swallowed another"


# Fuzz: no exception but UserError, no hang, nothing lost in silence

garbage = st.one_of(st.binary(max_size=40), st.sampled_from([b'{"text": 1}', b'{"text": null}', b'{"text": "\\ud800"}', b"[" * 2000, b'{"text": "ok", "id": [1]}', b'{"text":"a","text":"b"}', b"1" * 5000, b"null", b'{"id": NaN, "text": "x"}']))


@FUZZ
@given(st.lists(st.one_of(garbage, st.builds(lambda t: json.dumps({"text": t}).encode(), st.text(max_size=20))), max_size=12))
@example([b'{"text": "x", "id": Infinity}', b'{"text": "y"}'])
@example([b"\xef\xbb\xbf"])
def test_fuzz_jsonl(tmp_path_factory, lines):
    folder = tmp_path_factory.getbasetemp()
    data, report = b"\n".join(line.replace(b"\n", b"") for line in lines), ReadReport()
    try: found = list(read_documents(write(folder / "fuzz.jsonl", data), "s", report=report, max_bad=1))
    except UserError: found = None
    whole = data.removeprefix(b"\xef\xbb\xbf")
    if not data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")): assert report.present == sum(bool(line.strip()) for line in whole.split(b"\n"))
    assert report.read + report.skipped.total() == report.present and (found is None or all(d.text.strip() and isinstance(d.id, str) for d in found))


def mutate(data, edits):
    "Bytes with pieces overwritten, cut out or put in."
    data = bytearray(data)
    for place, kind, piece in edits:
        at = int(place * len(data))
        if kind == "put": data[at:at] = piece
        elif kind == "over": data[at:at + len(piece)] = piece
        else: del data[at:at + len(piece) * 3]
    return bytes(data)


def edits(pieces): return st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["put", "over", "cut"]), pieces), min_size=1, max_size=4)


@FUZZ
@given(edits(st.binary(min_size=1, max_size=8)), st.sampled_from([".jsonl.gz", ".jsonl.zst", ".parquet"]))
@example([(0.51171875, "over", b"\x80")], ".parquet")
def test_fuzz_packed_files(tmp_path_factory, changes, suffix):
    folder, texts = tmp_path_factory.getbasetemp(), [f"text {i}" for i in range(50)]
    plain, buffer = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode(), io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, compression="snappy")
    data = {".jsonl.gz": gzip.compress(plain), ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(plain), ".parquet": buffer.getvalue()}[suffix]
    report = ReadReport()
    damaged = mutate(data, changes)
    try: list(read_documents(write(folder / f"fuzz{suffix}", damaged), "s", report=report, max_bad=1))
    except UserError as error: assert f"fuzz{suffix}" in str(error)
    else: assert report.present == 50, "a record was lost in silence"
    assert report.read + report.skipped.total() == report.present


@FUZZ
@given(st.lists(st.one_of(st.text(max_size=10).map(str.encode), st.binary(max_size=10)), max_size=4), st.sampled_from(["txt", "txt.gz"]))
def test_fuzz_text_files(tmp_path_factory, pieces, suffix):
    folder, data, report = tmp_path_factory.getbasetemp(), b"\n".join(pieces), ReadReport()
    try: found = list(read_documents(write(folder / f"fuzz.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data), "s", report=report))
    except UserError as error: assert f"fuzz.{suffix}" in str(error) and report.read == 0
    else: assert [d.text for d in found] == [data.decode("utf-8-sig").strip()] and report.present == 1


cells = st.none() | st.text(max_size=6) | st.sampled_from(["", " ", "https://e.org", "1"])


@FUZZ
@given(st.lists(st.fixed_dictionaries({"id": cells, "url": cells, "title": cells, "text": cells}), min_size=1, max_size=6))
def test_fuzz_public_rows(tmp_path_factory, rows):
    folder, report = tmp_path_factory.mktemp("wikipedia"), ReadReport()
    write(folder / "README.md", CARD.format(config="20231101.en", path="train-*"))
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in rows[0]])), folder / "train-0.parquet")
    try: found = list(read_hub("wikipedia", folder=folder, report=report, max_bad=1))
    except UserError as error: assert "holds no document" in str(error); found = []
    assert report.present == len(rows) and len(found) == sum(bool((row["text"] or "").strip()) for row in rows)


@FUZZ
@given(edits(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"\\u", b'"21"']))), st.sampled_from(["bioasq", "pubmedqa"]))
@example([(0.5, "put", b'"22": {"QUESTION": "Is it?", "CONTEXTS": ["One."]}, ')], "pubmedqa")
def test_fuzz_question_files(tmp_path_factory, changes, kind):
    asked = {"id": "1", "type": "yesno", "body": "Is it?", "exact_answer": "yes", "snippets": [{"text": "S."}]}
    entries = {str(i): {"QUESTION": "Is it?", "CONTEXTS": ["One."], "final_decision": "yes"} for i in range(21, 25)}
    reader, content = (read_bioasq, {"questions": [asked] * 4}) if kind == "bioasq" else (read_pubmedqa, entries)
    report = ReadReport()
    path = write(tmp_path_factory.getbasetemp() / "fuzz.json", mutate(json.dumps(content).encode(), changes))
    try: list(reader(path, report=report, max_bad=1))
    except UserError as error: assert "fuzz.json" in str(error)
    else:
        held = json.loads(path.read_bytes())
        assert report.present == len(held["questions"] if kind == "bioasq" else held)
    assert report.read + report.skipped.total() == report.present


def test_a_question_that_is_there_twice_is_not_lost_in_silence(tmp_path):
    one = json.dumps({"QUESTION": "Is it?", "CONTEXTS": ["One."]})
    assert "'21' stands in one object twice" in refusal(lambda: read_pubmedqa(write(tmp_path / "q.json", '{"21": %s, "21": %s}' % (one, one))))


tags = st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b"<", b">", b"&", b"</PubmedArticle>", b"<PubmedArticle>", b"</MedlineCitation>", b"<PMID>", b"</PubmedArticleSet>",
    b"<PubmedArticleSet>", b"<DeleteCitation>", b"</DeleteCitation>", b"<![CDATA[", b"]]>", b"<?", b"?>", b"<!DOCTYPE x [", b"]>", b"<PubmedBookArticle>", b"\xff", b"<MedlineCitation>"]))


@FUZZ
@given(edits(tags))
@example([(0.1, "put", b"<DeleteCitation>"), (0.99, "put", b"</DeleteCitation>")])
def test_fuzz_medline(tmp_path_factory, changes):
    data = mutate(xml_set(*(article(i, f"title <i>{i}</i>") for i in range(1, 6)), delete(9)), changes)
    report, folder = ReadReport(), tmp_path_factory.getbasetemp()
    try: list(read_documents(write(folder / "fuzz.xml", data), "s", report=report, max_bad=1))
    except UserError as error:
        assert "fuzz.xml" in str(error)
        if "cut off" in str(error) or "compressed" in str(error) or "encoding" in str(error): return
    if b"<!--" not in data: assert report.present >= len(re.findall(rb"<PubmedArticle(?=[\s/>])", data)), "a record was lost in silence"
    assert report.read + report.skipped.total() == report.present


@FUZZ
@given(edits(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b'"', b",", b"\n", b'""', b"\x00", b"\r"]))))
def test_fuzz_notes(tmp_path_factory, changes):
    data = mutate(notes_csv([note(i, f'a "b", {i}\nc') for i in range(6)]), changes)
    report, folder = ReadReport(), tmp_path_factory.getbasetemp()
    try: list(read_mimic(write(folder / "discharge.csv", data), report=report, max_bad=1))
    except UserError as error: assert "discharge.csv" in str(error)
    assert report.read + report.skipped.total() == report.present


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(["yes", "yesno", "1"]),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "contexts", "labels", "a"]), inner, max_size=3), max_leaves=6)
bioasq_entry = st.fixed_dictionaries({}, optional={k: values for k in ("id", "body", "type", "exact_answer", "ideal_answer", "documents", "snippets")})
pubmedqa_entry = st.fixed_dictionaries({}, optional={k: values for k in ("QUESTION", "CONTEXTS", "LABELS", "YEAR", "final_decision", "LONG_ANSWER", "context", "question")})


@FUZZ
@given(st.lists(values | bioasq_entry, max_size=5), st.dictionaries(st.text(max_size=4) | st.sampled_from(["1", "22"]), values | pubmedqa_entry, max_size=5))
def test_fuzz_questions(tmp_path_factory, questions, entries):
    folder = tmp_path_factory.getbasetemp()
    for reader, content, n in ((read_bioasq, {"questions": questions}, len(questions)), (read_pubmedqa, entries, len(entries))):
        report = ReadReport()
        try: list(reader(write(folder / "fuzz.json", json.dumps(content)), report=report, max_bad=1))
        except UserError: pass
        assert report.present == n == report.read + report.skipped.total()


mathml = st.recursive(st.builds(lambda t, s: f"<{t}>{s}</{t}>", st.sampled_from(["mi", "mn", "mo", "mtext", "cn"]), st.sampled_from(["x", "12", "+", "βc", ""])),
                      lambda inner: st.builds(lambda t, parts: f"<{t}>{''.join(parts)}</{t}>", st.sampled_from([*medline.PATTERNS, "mrow", "msqrt", "mtable", "mtr", "mtd", "mfenced", "unknown", "pi"]),
                                              st.lists(inner, max_size=3)), max_leaves=12)


@FUZZ
@given(mathml)
def test_fuzz_formulas_lose_no_symbol(math):
    tree = etree.fromstring(f"<t>a <math>{math}</math> b</t>")
    text = medline.text_of(tree)
    for leaf in tree.iter("mi", "mn", "mtext"): assert (leaf.text or "") in text
    assert text.startswith("a") and text.endswith("b")


# Real files

def plain_walk(path):
    "PMID → title and abstract without markup, by a plain walk of the whole tree."
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file: root = etree.parse(file, etree.XMLParser(remove_comments=True)).getroot()
    def flat(element): return re.sub(r"[\s^]+", "", "".join(element.itertext())) if element is not None else ""
    citations = root.iter("MedlineCitation", "BookDocument")
    return {c.findtext("PMID"): (flat(next(c.iter("ArticleTitle"), None)) or flat(next(c.iter("VernacularTitle"), None)), [flat(a) for a in c.iterfind(".//Abstract/AbstractText")]) for c in citations}


@real
@pytest.mark.parametrize("name, count", [("pubmedsample18n0001.xml.gz", 177), ("test_current_medline.xml.gz", 4), ("biopython_pubmed1.xml", 2), ("jabref_MedlineImporterTestPubmedBook.xml", 1)])
def test_real_medline_equals_a_plain_walk(name, count):
    found, report = read(DATA / "pubmed" / name)
    walked = plain_walk(DATA / "pubmed" / name)
    assert len(found) == count == len(walked) and report.present == count and not report.corrupt
    for d in found:
        title, parts = walked[d.id]
        squeezed = re.sub(r"[\s^]+", "", d.text)
        assert title in squeezed and all(part in squeezed for part in parts)
        assert len(squeezed) <= len(title) + sum(map(len, parts)) + sum(map(len, re.findall(r"^.*?: ", d.text, re.M))) or d.meta.get("book")
        assert 1800 < d.meta["year"] < 2100 and d.meta["language"]
    if count == 177: assert sum(d.meta["abstract"] for d in found) == len(read(DATA / "pubmed" / name, titles=False)[0]) == 109
    if count == 177: assert {d.meta["language"] for d in found} > {"eng", "fre", "chi"} and {d.meta["abstract"] for d in found} == {True, False}


@real
def test_real_formulas():
    document, = read(DATA / "pubmed/jabref_MedlineImporterTestMathML.xml")[0]
    for written in ("η_p^2", "∞", "(a, b, c)", "(a + 1)/b", "∑_(i = 1)^n(a_i)", "v^→ = (v_1, v_2, v_3)"): assert written in document.text


@real
@pytest.mark.parametrize("path, count", [("pubmed/abstracts.jsonl", 3000), ("general/c4.jsonl", 800), ("general/wikipedia.jsonl", 50)])
def test_real_lines(path, count):
    found, report = read(DATA / path)
    assert len(found) == count == report.present and len({d.id for d in found}) == count


@real
def test_real_questions():
    answers = Counter(d.meta["answer"] for d in read_pubmedqa(DATA / "qa/ori_pqal.json"))
    assert answers == {"yes": 552, "no": 338, "maybe": 110}
    for name, yes, no in (("12B1", 15, 10), ("12B2", 18, 8)):
        report = ReadReport()
        assert Counter(d.meta["answer"] for d in read_bioasq(DATA / f"qa/{name}_golden.json", report=report)) == {"yes": yes, "no": no}
        assert report.present == 85 and not report.corrupt
