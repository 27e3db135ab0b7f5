"""The rows of `make bench`: what is measured, beside what, and what it must reach. A row more is an entry more here and a function that measures it."""
from benchmarks.harness import Line, Row, Target


def faster(number: float) -> Target: return Target("ratio", ">=", number)
def smaller(number: float) -> Target: return Target("ratio", "<=", number)
def share(number: float) -> Target: return Target("share", ">=", number)
def at_most(number: float) -> Target: return Target("value", "<=", number)
def at_least(number: float) -> Target: return Target("value", ">=", number)


STEP, TINY, SCORE = "training step, 130m shape, 1 × 1,024 tokens", "training step, scale tiny, 4 × 1,024 tokens", "scoring without gradients, 130m shape"
DECODE, PACKED = "greedy decode, 130m shape", "documents of a training step, 130m shape"

LIST = (
    Row("step-fp32", "tokens/s", "models:training_step", (
        Line(f"{STEP}, fp32", "ours fp32", "stock fp32", (faster(1.8),)),), {"series": ["ours fp32", "stock fp32"]}),
    Row("step-bf16", "tokens/s", "models:training_step", (
        Line(f"{STEP}, bf16 against stock fp32", "ours bf16", "stock fp32", (faster(5), share(0.5))),
        Line(f"{STEP}, bf16 against stock bf16", "ours bf16", "stock bf16")), {"series": ["ours bf16", "stock fp32", "stock bf16"]}),
    Row("step-memory", "GB", "models:memory", (
        Line("peak memory of that step, fp32", "ours fp32", "stock fp32", (smaller(1 / 3),)),
        Line("the same above what was resident before", "ours fp32 above", "stock fp32 above"),
        Line("peak memory of that step, bf16", "ours bf16", "stock bf16", (smaller(1 / 3),)),
        Line("the same above what was resident before", "ours bf16 above", "stock bf16 above")),
        {"series": ["ours fp32", "stock fp32", "ours bf16", "stock bf16"]}),
    Row("scoring", "tokens/s", "models:scoring", (
        Line(f"{SCORE}, bf16 against stock fp32", "ours bf16", "stock fp32", (faster(5),)),
        Line(f"{SCORE}, bf16 against stock bf16", "ours bf16", "stock bf16")), {"series": ["ours bf16", "stock fp32", "stock bf16"]}),
    Row("decode", "tokens/s", "decoding:decoding", (
        Line(f"{DECODE}, batch 1, bf16 against stock fp32", "ours bf16", "stock fp32", (faster(3), share(0.7))),
        Line(f"{DECODE}, batch 1, bf16 against stock bf16", "ours bf16", "stock bf16", (faster(2.3),)),
        Line(f"{DECODE}, batch 1, fp32 against stock fp32", "ours fp32", "stock fp32"))),
    Row("decode-context", "tokens/s", "decoding:contexts", (
        Line("after 10,000 tokens against after 10, bf16", "long prompt", "short prompt", (faster(0.95),)),)),
    Row("decode-batch", "tokens/s", "decoding:batches", (
        Line("batch 16 against batch 1, bf16", "batch 16", "batch 1", (faster(6),)),)),
    Row("step-tiny", "tokens/s", "models:training_step", (
        Line(f"{TINY}, fp32", "ours fp32", "stock fp32", (faster(1.5),)),), {"series": ["ours fp32", "stock fp32"], "scale": "tiny", "rows": 4}),
    Row("length", "tokens/s", "models:time_against_length", (
        Line("two layers, forward and backward, at 16,384 tokens against 1,024", "ours 16384", "ours 1024"),
        Line("the same at 4,096 tokens against stock", "ours 4096", "stock 4096"))),
    Row("medline", "records/s", "medline:reading", (
        Line("reading MEDLINE XML against pubmed_parser", "ours", "pubmed_parser", (faster(2.5),)),)),
    Row("medline-memory", "MB", "medline:memory", (
        Line("peak memory of that, 30,000 records", "ours", "pubmed_parser", (at_most(200),)),)),
    Row("tokenizing", "documents/s", "texts:tokenizing", (
        Line("tokenizing into a table against encode_batch alone", "ours", "encode_batch", (faster(0.8),)),)),
    Row("minhash", "documents/s", "texts:signatures", (Line("MinHash signatures and their bands", "ours"),)),
    Row("language", "documents/s", "corpora:languages", (Line("recognizing the language of abstracts, one core", "ours", targets=(at_least(3000),)),)),
    Row("contamination", "documents/s", "corpora:searched", (Line("searching abstracts for the questions of test sets, one core", "ours", targets=(at_least(2000),)),)),
    Row("sample", "documents/s", "corpora:written", (
        Line("writing abstracts of the sample, one core", "abstracts", targets=(at_least(2000),)),
        Line("writing notes of the sample, one core", "notes", targets=(at_least(200),)))),
    Row("opening", "s", "corpora:opening", (Line("opening a corpus of a million documents, whose order is already drawn", "ours", targets=(at_most(1),)),)),
    Row("fill", "% of a row", "texts:filling", (
        Line("rows of 1,024 filled with the documents of a step against padded", "packed", "padded", (share(0.97),)),)),
    Row("packing", "documents/s", "texts:packing", (
        Line(f"{PACKED}, bf16, packed against padded", "packed", "padded", (faster(3),)),
        Line("the same against stock padded, its faster dtype", "packed", "stock padded, faster", (faster(12),)),
        Line("stock padded, fp32", "stock padded fp32"), Line("stock padded, bf16", "stock padded bf16"))),
)
ROWS = {row.name: row for row in LIST}
