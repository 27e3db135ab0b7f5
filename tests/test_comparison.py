"Any causal model on the same characters: cut once, scored whole, the same for any batch."
import dataclasses
import json
import math
from pathlib import Path

import papermill
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from biomamba.comparison import bits_per_byte, candidate, compare, cut, encode, fits, models_asked, open_model, round_trips, score_texts
from biomamba.evaluation import results_of
from biomamba.heldout import test_texts as texts_of
from biomamba.runs import UserError, mark_restricted, restricted
from biomamba.sample import sample_documents
from biomamba.stand_ins import KINDS, OURS, stand_ins

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [d.text for source in ("pubmed", "c4", "wikipedia") for d in sample_documents(source, 12)]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    return stand_ins(tmp_path_factory.mktemp("stand-ins"), TEXTS)


@pytest.fixture(scope="module")
def candidates(places) -> dict:
    return {name: candidate(name, place) for name, place in places.items()}


def test_all_seven_architectures_and_ours(candidates):
    assert len(candidates) == 8 and {name.removesuffix(" (stand-in)") for name in candidates} == {*KINDS, "BioMamba"}
    kinds = {json.loads((c.folder / "config.json").read_text())["model_type"] for c in candidates.values()}
    assert kinds == {"biogpt", "gpt2", "gemma2", "gemma3_text", "llama", "mamba2"}


@pytest.mark.parametrize("name", [OURS, *(f"{name} (stand-in)" for name in KINDS)])
def test_every_token_counts_the_first_included_and_no_end(candidates, name):
    "Against transformers' own loss of the sequence that begins with the first token."
    c = candidates[name]
    texts = [cut(text, list(candidates.values()), 60) for text in (TEXTS[0], TEXTS[15], "Short.")]
    scores = score_texts(c, open_model(c), texts, batch_tokens=100)
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(c.folder).eval(), AutoTokenizer.from_pretrained(c.folder)
    for text, nats, tokens, size in zip(texts, scores.nats, scores.tokens, scores.bytes):
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[first, *tokenizer(text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            loss = stock(ids, labels=ids).loss.item()
        assert tokens == ids.shape[1] - 1 and size == len(text.encode())
        assert math.isclose(nats, loss * tokens, rel_tol=1e-5)


def test_the_cut_fits_all_and_is_tight(candidates):
    every = list(candidates.values())
    for text in TEXTS[::6]:
        short = cut(text, every)
        assert text.startswith(short) and all(fits(c, short) for c in every)
        assert short == text or not all(fits(c, text[: len(short) + 1]) for c in every)


def test_text_that_spells_a_special_token_is_text(candidates):
    for c in candidates.values():
        for special in filter(None, (c.tokenizer.bos_token, c.tokenizer.eos_token)):
            assert c.start_id not in encode(c, f"a {special} b")


def test_only_biogpt_loses_text(candidates):
    assert {name for name, c in candidates.items() if not round_trips(c, "A\n  b")} == {name for name in candidates if name.startswith("BioGPT")}


def test_a_first_model_and_differences_from_it(places):
    results = compare({k: places[k] for k in (OURS, "BioMedLM (stand-in)")}, {"c4": TEXTS[12:18]}, window=50)
    ours, other = (about["sets"]["c4"] for about in results["models"].values())
    assert math.isclose(other["difference"]["value"], other["bits_per_byte"]["value"] - ours["bits_per_byte"]["value"], rel_tol=1e-9)
    assert results["window"] == 50 and results["texts"]["c4"]["cut"] == 6


def test_bad_input_is_a_sentence(places, tmp_path):
    with pytest.raises(UserError, match="named twice"):
        models_asked("runs/a runs/a")
    with pytest.raises(UserError, match="no model to compare"):
        compare({}, {"c4": TEXTS[:2]})
    with pytest.raises(UserError, match="there is no folder"):
        candidate("./none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="could not be opened without running code of its own"):
        candidate("odd", tmp_path)
    with pytest.raises(UserError, match="at least 2 of each source"):
        texts_of("sample", documents=1)


def test_code_in_a_folder_is_not_run(places, tmp_path):
    for path in Path(places["Bio-Medical-Llama-3.2-1B (stand-in)"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(UserError, match="could not be opened"):
        candidate("own", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_stand_ins_do_not_spell_restricted_texts(tmp_path):
    "A tokenizer spells out the words that it has met: beside restricted texts it meets the sample's."
    (tmp_path / "ward" / "notes").mkdir(parents=True)
    lines = [json.dumps({"id": str(i), "text": f"Mr Quarkfield was seen by Zebulon again on day {i} with a painful spleen and told so."}) + "\n" for i in range(30)]
    (tmp_path / "ward" / "notes" / "notes.jsonl").write_text("".join(lines))
    mark_restricted(tmp_path / "ward" / "notes", "ward 7")
    papermill.execute_notebook(ROOT / "nbs/12_compare.ipynb", tmp_path / "out.ipynb", cwd=ROOT, kernel_name="python3", progress_bar=False,
                               parameters={"corpus": str(tmp_path / "ward"), "sources": "notes", "documents": 3, "run_dir": str(tmp_path / "run")})
    assert restricted(tmp_path / "run") == "ward 7" and (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    made = [p for p in [*(tmp_path / "run").rglob("*"), tmp_path / "out.ipynb"] if p.is_file()]
    assert (tmp_path / "run" / "results.json") in made and not [p for p in made if b"Quarkfield" in p.read_bytes() or b"Zebulon" in p.read_bytes()]


# ---------------------------------------------------------------- what an error names

def test_an_empty_text_is_named(places):
    name, place = next(iter(places.items()))
    for refused in (lambda: compare({name: place}, {"pubmed": [TEXTS[0], ""]}), lambda: results_of(str(place), None, {"pubmed": [TEXTS[0], ""]}, None, "fp32")):
        with pytest.raises(UserError, match="text 1 of pubmed is empty; texts of at least one character are accepted"): refused()


def test_a_window_that_holds_no_character_is_the_models_own(places):
    "An emoji is several tokens; the window is not given, so the model's is named."
    narrow = [dataclasses.replace(c, window=1) for c in (candidate(name, place) for name, place in places.items()) if not c.mamba]
    with pytest.raises(UserError, match="a window of 1 tokens holds not one character"): cut("\N{SLIGHTLY SMILING FACE}", narrow)
    with pytest.raises(UserError, match="the text is empty"): cut("", narrow)


def test_bits_per_byte_of_cut_texts_are_refused(places):
    ours = candidate(OURS, places[OURS])
    with pytest.raises(UserError, match="3 of 3 texts have no known bytes.* scores of whole texts are accepted"):
        bits_per_byte(score_texts(ours, open_model(ours), TEXTS[:3], window=16))
