"What is exported serves others: stock transformers and PEFT, without a network; and what lies on the disk is found before any network is asked."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from biomamba.checkpoints import load_model, save_model
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.recipe import recipe
from biomamba.sample import sample_documents
from biomamba.steps import train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(d_model=32, layers=2, state=8, head_dim=16, vocabulary=400)
TEXT = "Patients with heart failure were treated for ten days."
# In a process of its own: every attempt to reach a network is counted and fails.
NO_NETWORK = """
import json, socket, sys
asked = []
def refused(*address, **_): asked.append(str(address[-1])); raise OSError("no network in this test")
socket.socket.connect = refused
socket.getaddrinfo = refused
socket.create_connection = refused
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    "A small model as a run exports it."
    folder = tmp_path_factory.mktemp("exported") / "model"
    tokenizer = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 60)), 400))
    save_model(new_model(mamba2_config(recipe("tiny", **SHAPE)), seed=5), folder, tokenizer)
    return folder


def in_a_process(source: str, **environment) -> dict:
    "What a fresh interpreter without a network prints last, as JSON."
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGINGFACE_"))}
    done = subprocess.run([sys.executable, "-c", NO_NETWORK + source], cwd=ROOT, capture_output=True, text=True, env=bare | {"PYTHONPATH": str(ROOT)} | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- stock transformers

def test_stock_transformers_loads_generates_and_agrees_without_a_network(exported):
    found = in_a_process(f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({str(exported)!r}), AutoTokenizer.from_pretrained({str(exported)!r})
ids = tokenizer({TEXT!r}, return_tensors="pt").input_ids
torch.manual_seed(0)
with torch.no_grad(): logits = model(ids).logits[0, -1].tolist()
written = model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
print(json.dumps(dict(kind=type(model).__name__, module=type(model).__module__, ids=ids[0].tolist(), logits=logits, written=written, asked=asked, ours="biomamba" in sys.modules)))
""")
    assert found["kind"] == "Mamba2ForCausalLM" and found["module"].startswith("transformers.") and not found["ours"] and found["asked"] == []
    model = load_model(exported)
    ids = torch.tensor(found["ids"])[None]
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits[0, -1], torch.tensor(found["logits"]), atol=1e-4)
    assert model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist() == found["written"]


# ---------------------------------------------------------------- PEFT

def adapters(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def lora_step(model, ids):
    "One optimizer step on the adapters; returns which of them got a gradient."
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=0.1)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    moved = {name: float(p.grad.abs().sum()) if p.grad is not None else None for name, p in adapters(model).items()}
    optimizer.step(); optimizer.zero_grad()
    model.eval()
    return moved


def test_peft_adapts_a_model_of_ours_and_gives_it_back(exported, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed; the development set brings it")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    stock = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad(): before = stock(ids).logits
    torch.manual_seed(0)
    model = peft.get_peft_model(stock, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["in_proj"], task_type="CAUSAL_LM"))
    names = set(adapters(model))
    assert len(names) == 2 * SHAPE["layers"] and all("in_proj" in name and "lora_" in name for name in names)
    first = lora_step(model, ids)
    assert all(value > 0 for name, value in first.items() if "lora_B" in name), "B starts at zero, so it alone moves in the first step"
    assert all(value > 0 for value in lora_step(model, ids).values()), "every adapter received a gradient"
    with torch.no_grad(): after = model(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(names)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(exported), tmp_path / "adapter").eval()
    with torch.no_grad(): assert torch.allclose(again(input_ids=ids).logits, after, atol=1e-5)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    with torch.no_grad(): assert torch.allclose(load_model(tmp_path / "merged")(input_ids=ids).logits, after, atol=1e-4), "the merged model is a model of ours again"


# ---------------------------------------------------------------- the disk before the network

def snapshot(home: Path, name: str, exported: Path) -> Path:
    "A model in the hub's cache below HF_HOME, as huggingface_hub lays it out."
    commit = "1" * 40
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    place = repo / "snapshots" / commit
    place.mkdir(parents=True)
    for file in exported.iterdir(): (place / file.name).symlink_to(file)
    return place


LOOK = """
from biomamba.checkpoints import find_checkpoint, load_model, load_tokenizer
from biomamba.runs import UserError
def tried(name, call=find_checkpoint):
    del asked[:]
    try: return [str(call(name)), len(asked)]
    except UserError as error: return [f"UserError: {error}", len(asked)]
"""


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["online", "offline"])
def test_a_snapshot_in_hf_home_is_taken_before_the_network_is_asked(exported, tmp_path, offline):
    place = snapshot(tmp_path, "someone/mamba2-small", exported)
    scale = snapshot(tmp_path, "state-spaces/mamba2-130m", exported)
    found = in_a_process(LOOK + """
print(json.dumps(dict(named=tried("someone/mamba2-small"), scale=tried("130m"), pinned=tried("someone/mamba2-small", lambda n: find_checkpoint(n, "1" * 40)),
                      loaded=tried("someone/mamba2-small", lambda n: load_model(n).config.vocab_size), words=tried("someone/mamba2-small", lambda n: len(load_tokenizer(n))), absent=tried("no/such"))))
""", HF_HOME=str(tmp_path), **offline)
    assert found["named"] == [str(place), 0] and found["pinned"] == [str(place), 0] and found["scale"] == [str(scale), 0]
    assert found["loaded"] == ["400", 0] and found["words"] == ["400", 0]
    said, tries = found["absent"]
    assert said.startswith("UserError: no/such could not be had") and "local folder" in said
    assert (tries == 0) == bool(offline), "only what is not on the disk may ask the network, and nothing may where HF_HUB_OFFLINE is set"
    assert ("HF_HUB_OFFLINE is set" in said) == bool(offline)


def test_a_corpus_of_the_hub_is_refused_offline_without_a_try(tmp_path):
    found = in_a_process("""
from biomamba.documents import read_hub
from biomamba.runs import UserError
try: said = str(next(iter(read_hub("c4"))))
except UserError as error: said = f"UserError: {error}"
print(json.dumps(dict(said=said, asked=asked)))
""", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert found["said"].startswith("UserError: ") and "local folder" in found["said"] and found["asked"] == []


def test_the_front_pages_lines_load_generate_and_score(exported, tmp_path):
    "The Python of the README, as it stands there, on a small model."
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [lines] = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(lines.strip().splitlines()) == 5 and all(name in lines for name in ("load_model", "generate", "evaluate"))
    done = subprocess.run([sys.executable, "-c", lines.replace("runs/tiny", str(exported)).replace("documents=20", "documents=3")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("Patients with") and "PubMed" in done.stdout and "bits per byte" in done.stdout
