"Checkpoints: two formats, exact inverses, and everything that must be refused."
import json
import os
import time

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from biomamba import checkpoints
from biomamba.checkpoints import (TOKENIZER, check_tensors, config_from_state_spaces, config_to_state_spaces, convert, find_checkpoint, from_state_spaces,
                                  load_model, load_tokenizer, read_tensors, save_model, to_state_spaces)
from biomamba.mamba2 import BioMambaForCausalLM, mamba2_config, new_model
from biomamba.runs import UserError, recipe

transformers.logging.set_verbosity_error()
IDS = torch.arange(2, 42)[None]
CONFIG = {"d_model": 64, "d_intermediate": 0, "n_layer": 2, "vocab_size": 301, "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16},
          "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
          "pad_vocab_size_multiple": 16, "tie_embeddings": True}


def words(n=301, start=("<|endoftext|>", "<|padding|>")):
    names = [*start, *(f"w{i}" for i in range(n - len(start)))]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<|endoftext|>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>", pad_token="<|padding|>")


@pytest.fixture(scope="module")
def model(): return new_model(config_from_state_spaces(CONFIG), 0).eval()


@pytest.fixture
def hf(model, tmp_path):
    save_model(model, tmp_path / "hf", words())
    return tmp_path / "hf"


@pytest.fixture
def ssm(model, tmp_path):
    folder = tmp_path / "ssm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(to_state_spaces(model.state_dict()), folder / "pytorch_model.bin")
    return folder


def same_logits(a, b, atol=0.0):
    with torch.no_grad(): torch.testing.assert_close(a(IDS).logits, b(IDS).logits, rtol=0, atol=atol)


def refused(folder, *parts):
    with pytest.raises(UserError) as e: load_model(folder)
    for part in (folder.name, *parts): assert part in str(e.value)
    assert "\n" not in str(e.value)


def test_both_formats_load(model, hf, ssm):
    for folder in (hf, ssm):
        loaded = load_model(folder)
        assert type(loaded) is BioMambaForCausalLM and not loaded.training and loaded.lm_head.weight is loaded.backbone.embeddings.weight
        assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
        assert loaded.generation_config.eos_token_id == 0 and loaded.generation_config.suppress_tokens == [301, 302, 303]
        same_logits(loaded, model)


def test_a_loaded_model_owns_its_memory(hf):
    "Training must not write through to the file or to a second load."
    a = load_model(hf)
    with torch.no_grad():
        for p in a.parameters(): p.add_(1)
    assert not torch.equal(load_model(hf).backbone.norm_f.weight, a.backbone.norm_f.weight)


def test_stock_transformers_loads_what_is_saved(model, hf):
    stock = AutoModelForCausalLM.from_pretrained(hf).eval()
    assert type(stock).__name__ == "Mamba2ForCausalLM" and stock.config.eos_token_id == 0
    same_logits(stock, model, 1e-5)
    assert json.loads((hf / "config.json").read_text())["architectures"] == ["Mamba2ForCausalLM"]
    assert AutoTokenizer.from_pretrained(hf)("w0 w1").input_ids[-2:] == [2, 3]
    out = stock.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=True, max_new_tokens=20)
    assert out.max() < 301


def test_saved_by_stock_with_rescaling_on_still_loads_exactly(model, hf):
    "transformers would divide out_proj again after loading; our loader must not."
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"rescale_prenorm_residual": True}))
    loaded = load_model(hf)
    same_logits(loaded, model)
    save_model(loaded, hf.parent / "again", words())
    same_logits(AutoModelForCausalLM.from_pretrained(hf.parent / "again").eval(), model, 1e-5)


def test_run_folder_and_relative_path(model, hf, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    hf.rename(run / "model")
    same_logits(load_model(run), model)
    assert find_checkpoint(run) == run / "model" and load_tokenizer(run).eos_token_id == 0


def test_sharded(model, hf, tmp_path):
    there = convert(hf, tmp_path / "shards", shard=40_000)
    files = sorted(p.name for p in there.glob("*.safetensors"))
    assert len(files) > 3 and "model.safetensors.index.json" in {p.name for p in there.iterdir()}
    same_logits(load_model(there), model)
    same_logits(AutoModelForCausalLM.from_pretrained(there).eval(), model, 1e-5)
    (there / files[1]).unlink()
    refused(there, files[1], "missing")


def test_dtype(hf):
    loaded = load_model(hf, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad(): assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("scale", ["130m", "370m", "780m", "1.3b", "2.7b"])
def test_names_shapes_and_dtypes_at_published_scales(scale):
    config = mamba2_config(recipe(scale))
    with torch.device("meta"): model = BioMambaForCausalLM(config)
    ours = dict(model.named_parameters())
    theirs = to_state_spaces(ours)
    assert len(theirs) == len(ours) + 1 and "backbone.embedding.weight" in theirs and "lm_head.weight" in theirs
    back = from_state_spaces(theirs)
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}
    check_tensors(back, model, None)
    d, inner = config.hidden_size, 2 * config.hidden_size
    assert theirs["backbone.layers.0.mixer.in_proj.weight"].shape == (2 * inner + 2 * 128 + inner // 64, d)
    assert theirs["backbone.layers.0.mixer.conv1d.weight"].shape == (inner + 256, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conversion_is_exact_both_ways(ssm, tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in torch.load(ssm / "pytorch_model.bin", weights_only=True).items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, ssm / "pytorch_model.bin")
    back = convert(convert(ssm, tmp_path / "a"), tmp_path / "b", to="state-spaces")
    again = torch.load(back / "pytorch_model.bin", weights_only=True)
    assert again.keys() == tensors.keys()
    for k, v in tensors.items(): assert again[k].dtype == dtype and again[k].numpy(force=True).tobytes() == v.numpy(force=True).tobytes() if dtype != torch.bfloat16 else torch.equal(again[k], v)
    assert json.loads((back / "config.json").read_text()) == CONFIG
    with pytest.raises(UserError, match="exists already"): convert(ssm, tmp_path / "a")
    with pytest.raises(UserError, match="hf or state-spaces"): convert(ssm, tmp_path / "c", to="gguf")


@pytest.mark.parametrize("change", [{}, {"vocab_size": 50277}, {"ssm_cfg": {"layer": "Mamba2"}}, {"tie_embeddings": False}, {"pad_vocab_size_multiple": 8},
                                    {"ssm_cfg": {"layer": "Mamba2", "ngroups": 2, "chunk_size": 128}}])
def test_configurations_are_inverse(change):
    config = CONFIG | change
    assert config_to_state_spaces(config_from_state_spaces(config)) == config


def test_mamba1_is_refused(ssm, hf):
    (ssm / "config.json").write_text(json.dumps(CONFIG | {"ssm_cfg": {}}))
    refused(ssm, "Mamba-1")
    (hf / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused(hf, "Mamba-1")


@pytest.mark.parametrize("change,part", [({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"), ({"attn_layer_idx": [1]}, "attn_layer_idx"), ({"d_intermediate": 9}, "d_intermediate")])
def test_other_architectures_are_refused(ssm, change, part):
    (ssm / "config.json").write_text(json.dumps(CONFIG | change))
    refused(ssm, part)


def test_missing_and_unknown_tensors_are_refused(ssm, hf):
    tensors = torch.load(ssm / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if "layers.1.mixer.D" not in k}, ssm / "pytorch_model.bin")
    refused(ssm, "backbone.layers.1.mixer.D", "lacks 1 of")
    torch.save(tensors | {"backbone.layers.1.mlp.fc1.weight": torch.ones(2)}, ssm / "pytorch_model.bin")
    refused(ssm, "backbone.layers.1.mlp.fc1.weight")
    save_file(load_file(hf / "model.safetensors") | {"extra": torch.ones(2)}, hf / "model.safetensors")
    refused(hf, "extra")


def test_wrong_shapes_are_refused(ssm):
    tensors = torch.load(ssm / "pytorch_model.bin", weights_only=True)
    (ssm / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    refused(ssm, "400", "304", "vocabulary")
    (ssm / "config.json").write_text(json.dumps(CONFIG))
    torch.save(tensors | {"backbone.layers.0.mixer.D": torch.ones(3)}, ssm / "pytorch_model.bin")
    refused(ssm, "mixer.D", "(3,)")
    torch.save(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, ssm / "pytorch_model.bin")
    with pytest.raises(UserError, match="ties the head"): load_model(ssm)


@pytest.mark.parametrize("keep", [0, 5, 200, 50_000])
def test_truncated_files_are_refused(hf, ssm, keep):
    for file in (hf / "model.safetensors", ssm / "pytorch_model.bin"):
        file.write_bytes(file.read_bytes()[:keep])
        refused(file.parent, file.name, "cut short")


def test_a_pickle_with_code_is_refused_and_not_run(ssm, tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"backbone.embedding.weight": Bomb()}, ssm / "pytorch_model.bin")
    refused(ssm, "could run code")
    assert not (tmp_path / "ran").exists()


def test_a_pointer_instead_of_weights_is_refused(ssm):
    (ssm / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(ssm, "not a file of weights")


def test_folders_without_a_model_are_refused(tmp_path, hf):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    (hf / "model.safetensors").unlink()
    refused(hf, "no weights")
    (hf / "config.json").write_text("{")
    refused(hf, "not JSON")
    (hf / "config.json").write_text('{"model_type": "llama"}')
    refused(hf, "llama")


def test_unreachable_hub_is_one_quick_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    for ask in (find_checkpoint, load_model, load_tokenizer):
        with pytest.raises(UserError, match="state-spaces/mamba2-130m.*HF_HUB_OFFLINE.*local folder.*scale tiny") as e: ask("130m")
        assert "\n" not in str(e.value)
    assert time.monotonic() - started < 5


def test_network_error_is_one_sentence(monkeypatch):
    def unreachable(name, local_files_only, **kwargs): raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError: nobody there\nand more")
    monkeypatch.setattr(checkpoints, "is_offline_mode", lambda: False)
    monkeypatch.setattr(checkpoints, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="at revision abc could not be had.*nobody there") as e: find_checkpoint("some/model", "abc")
    assert "\n" not in str(e.value)


def test_local_snapshot_comes_before_the_network(monkeypatch, hf):
    asked = []
    def snapshot(name, revision, local_files_only, **kwargs):
        asked.append((name, revision, local_files_only))
        return str(hf)
    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot)
    assert find_checkpoint("some/model", "main") == hf and asked == [("some/model", "main", True)]


def test_a_snapshot_in_the_cache_is_found_offline(monkeypatch, tmp_path, ssm):
    "The layout that huggingface_hub writes, with a branch that points to a commit."
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    ssm.rename(repo / "snapshots" / commit)
    real = checkpoints.snapshot_download
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path / "cache", **k))
    monkeypatch.setattr(checkpoints, "is_offline_mode", lambda: True)
    for revision in (None, "main", commit): assert load_model("some/model", revision).config.vocab_size == 304
    with pytest.raises(UserError, match="at revision v2"): load_model("some/model", "v2")


def test_unknown_names_are_told_what_exists(tmp_path):
    with pytest.raises(UserError, match="did you mean '130m'"): find_checkpoint("130M")
    with pytest.raises(UserError, match="there is no folder"): find_checkpoint(tmp_path / "nothing")


def test_tokenizers(tmp_path, hf):
    t = load_tokenizer(hf / "tokenizer.json")
    assert (t.eos_token_id, t.bos_token_id, t.pad_token_id, t.padding_side, len(t)) == (0, 0, 1, "left", 301)
    words(9, ("<|padding|>", "<|endoftext|>")).save_pretrained(tmp_path / "swapped")
    with pytest.raises(UserError, match="must be 0 and 1"): load_tokenizer(tmp_path / "swapped")


def test_state_spaces_folders_take_the_tokenizer_of_their_makers(monkeypatch, ssm, hf):
    asked = []
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, **k: asked.append(name) or str(hf))
    assert len(load_tokenizer(ssm)) == 301 and asked == [TOKENIZER]


def test_a_tokenizer_too_large_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="400 entries.*304 rows"): save_model(model, tmp_path / "x", words(400))
    assert not (tmp_path / "x").exists()


def test_real_tokenizer(model, tmp_path, data):
    t = load_tokenizer(data / "tokenizer" / "tokenizer.json")
    assert len(t) == 50277 and t.eos_token_id == 0 and t.decode(t.encode("Aspirin inhibits platelets.")) == "Aspirin inhibits platelets."
    assert t.encode(" yes") != t.encode("yes")
    with pytest.raises(UserError, match="50,277"): save_model(model, tmp_path / "x", t)


def test_reading_is_one_tensor_at_a_time(hf):
    names = iter(read_tensors(hf))
    name, tensor = next(names)
    assert isinstance(name, str) and isinstance(tensor, torch.Tensor)
