"""Rows of MEDLINE XML: this project beside pubmed_parser 0.5.1, on the same file, in turns, each reading in a process of its own.

The file is made by repeating the records of a real one (or three invented ones) with new PMIDs.
"""
import gzip, importlib.util, os, re, tempfile, time
from pathlib import Path

from benchmarks.harness import Found, Skip, alternate, fresh, peak_memory

SOURCE, RECORDS = "pubmed/pubmedsample18n0001.xml.gz", 30_000   # below the folder that BIOMAMBA_DATA names
INVENTED = """<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="1">{0}</PMID><Article PubModel="Print"><Journal><ISSN IssnType="Print">0000-0000</ISSN>
<JournalIssue CitedMedium="Print"><Volume>{0}</Volume><PubDate><Year>2001</Year></PubDate></JournalIssue><Title>Journal of Invented Results</Title></Journal>
<ArticleTitle>Invented title {0} about <i>nothing</i> in particular.</ArticleTitle><Abstract><AbstractText Label="METHODS">{1}</AbstractText><AbstractText Label="RESULTS">{1}</AbstractText></Abstract>
<AuthorList CompleteYN="Y">{2}</AuthorList><Language>eng</Language><PublicationTypeList><PublicationType UI="D016428">Journal Article</PublicationType></PublicationTypeList></Article>
<MeshHeadingList>{3}</MeshHeadingList></MedlineCitation><PubmedData><History><PubMedPubDate PubStatus="pubmed"><Year>2001</Year></PubMedPubDate></History></PubmedData></PubmedArticle>"""


def invented():
    "Three invented records of ordinary length."
    author = "<Author ValidYN=\"Y\"><LastName>Nobody</LastName><ForeName>N</ForeName><AffiliationInfo><Affiliation>Nowhere University</Affiliation></AffiliationInfo></Author>"
    mesh = '<MeshHeading><DescriptorName UI="D000000" MajorTopicYN="N">Nothing</DescriptorName></MeshHeading>'
    return [INVENTED.format(i, "A sentence that says nothing in ten words is here. " * 10, author * 5, mesh * 8).encode() for i in (1, 2, 3)]


def records_of(source):
    "The PubmedArticle elements of a file, as bytes."
    if source is None: return invented()
    content = (gzip.decompress if source.endswith(".gz") else bytes)(Path(source).read_bytes())
    found = re.findall(rb"<PubmedArticle>.*?</PubmedArticle>", content, re.DOTALL)
    if not found: raise Skip(f"{source} holds no PubmedArticle")
    return found


def make_file(path, records, n):
    "A PubMed file of n records with PMIDs of their own."
    with gzip.open(path, "wb", 6) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for i in range(n): file.write(re.sub(rb"(<PMID[^>]*>)\d+", rb"\g<1>%d" % (30_000_000 + i), records[i % len(records)], count=1) + b"\n")
        file.write(b"</PubmedArticleSet>\n")


def read(
    reader: str,  # ours or pubmed_parser
    path: str,
    records: int, # in the file
) -> dict:  # records a second; peak memory in MB
    "One reading, in the process that calls this."
    if reader == "ours":
        from biomamba.documents import read_documents
        found = lambda: read_documents(path, "pubmed")
    else:
        import pubmed_parser
        found = lambda: pubmed_parser.parse_medline_xml(path)
    began = time.perf_counter()
    n = sum(1 for _ in found())
    seconds = time.perf_counter() - began
    assert 0.9 * records < n <= records, f"{reader} found {n} of {records} records"
    return {"rate": records / seconds, "peak": 1000 * peak_memory()}


def measured(
    quick: bool,
    number: str,   # rate or peak
) -> Found:
    "The readings of both, in turns; there is no target on invented records."
    if importlib.util.find_spec("pubmed_parser") is None: raise Skip("pubmed_parser is not installed: pip install pubmed-parser==0.5.1")
    folder, n = os.environ.get("BIOMAMBA_DATA"), 60 if quick else RECORDS
    with tempfile.TemporaryDirectory() as made:
        path = str(Path(made) / "records.xml.gz")
        make_file(path, records_of(str(Path(folder) / SOURCE) if folder else None), n)
        one = lambda reader: lambda: fresh("medline:read", here=quick, reader=reader, path=path, records=n)[number]
        runs = {reader: one(reader) for reader in ("ours", "pubmed_parser")}
        values = alternate(runs, quick) if number == "rate" else {reader: [run()] for reader, run in runs.items()}
    return Found(values, data=f"{n:,} records, " + ("real ones repeated" if folder else "invented"),
                 untargeted="" if folder else "BIOMAMBA_DATA is not set: invented records")


def reading(quick: bool) -> Found:
    "Records a second."
    return measured(quick, "rate")


def memory(quick: bool) -> Found:
    "The peak of a process that reads."
    return measured(quick, "peak")
