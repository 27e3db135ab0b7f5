"""Reading MEDLINE XML: this project beside pubmed_parser, on the same file, in turns.

    python benchmarks/medline.py [--source FILE.xml.gz] [--records 30000] [--rounds 3]

The file is made by repeating the records of --source (or three invented ones) with new PMIDs. Each reading runs in a
process of its own; shown are the best of the rounds and the peak memory. Needs pubmed-parser==0.5.1 for the comparison.
"""

import argparse, gzip, importlib.util, json, os, re, subprocess, sys, tempfile
from pathlib import Path

READERS = {
    "biomamba": "from biomamba.documents import read_documents\nstart()\nn = sum(1 for _ in read_documents(PATH, 'pubmed'))",
    "pubmed_parser": "import pubmed_parser\nstart()\nn = sum(1 for _ in pubmed_parser.parse_medline_xml(PATH))",
}
FRAME = """
import json, sys, time
PATH = {path!r}
def start():
    global wall, cpu
    wall, cpu = time.perf_counter(), time.process_time()
{body}
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps(dict(n=n, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, peak=peak)))
"""
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
    if not found: sys.exit(f"{source} holds no PubmedArticle")
    return found


def make_file(path, records, n):
    "A PubMed file of n records with PMIDs of their own."
    with gzip.open(path, "wb", 6) as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<PubmedArticleSet>\n')
        for i in range(n): file.write(re.sub(rb"(<PMID[^>]*>)\d+", rb"\g<1>%d" % (30_000_000 + i), records[i % len(records)], count=1) + b"\n")
        file.write(b"</PubmedArticleSet>\n")


def measure(reader, path):
    "One reading in a process of its own."
    code = FRAME.format(path=str(path), body=READERS[reader])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}, cwd=Path(__file__).parents[1])
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a PubMed file whose records are repeated; invented ones without it")
    parser.add_argument("--records", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    readers = [r for r in READERS if r != "pubmed_parser" or importlib.util.find_spec("pubmed_parser")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.xml.gz"
        make_file(path, records_of(options.source), options.records)
        runs = {reader: [] for reader in readers}
        for _ in range(options.rounds):
            for reader in readers: runs[reader].append(measure(reader, path))
        print(f"MEDLINE XML, {options.records:,} records, {path.stat().st_size / 1e6:.0f} MB compressed, best of {options.rounds}\n")
    print("| reader | records/s | records/CPU s | peak MB |\n|:--|--:|--:|--:|")
    best = {reader: {key: min(run[key] for run in found) for key in ("wall", "cpu", "peak", "n")} for reader, found in runs.items()}
    for reader, b in best.items(): print(f"| {reader} | {b['n'] / b['wall']:,.0f} | {b['n'] / b['cpu']:,.0f} | {b['peak']:.0f} |")
    if len(best) == 2: print(f"\nratio: {best['pubmed_parser']['wall'] / best['biomamba']['wall']:.2f} (wall), {best['pubmed_parser']['cpu'] / best['biomamba']['cpu']:.2f} (CPU)")
    else: print("\nno comparison: pip install pubmed-parser==0.5.1")


if __name__ == "__main__": main()
