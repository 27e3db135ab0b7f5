"Checkpoints: two formats, exact inverses, a probe of what was loaded, and everything that must be refused."
import contextlib
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from biomamba import checkpoints
from biomamba.checkpoints import (PROBE_TOLERANCE, TOKENIZER, check_dtypes, check_tensors, config_from_state_spaces, config_to_state_spaces, described,
                                  find_checkpoint, from_state_spaces, load_model, load_tokenizer, parity, probe_logits, read_config, read_tensors,
                                  save_model, to_state_spaces)
from biomamba.conversion import compare_folders, convert, write_state_spaces
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
    loaded = load_model(hf, probe=True)
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


SCALES = ["130m", "370m", "780m", "1.3b", "2.7b"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def raw(tensors):
    "Name → shape, dtype, bytes."
    return {k: (v.shape, v.dtype, v.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for k, v in tensors.items()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_names_shapes_and_dtypes_at_published_scales(scale, dtype):
    config = mamba2_config(recipe(scale))
    with torch.device("meta"): model = BioMambaForCausalLM(config).to(dtype)
    ours = dict(model.named_parameters())
    theirs = to_state_spaces(ours)
    assert len(theirs) == len(ours) + 1 == 9 * config.num_hidden_layers + 3
    assert theirs["lm_head.weight"] is theirs["backbone.embedding.weight"]
    back = from_state_spaces(theirs)
    assert {k: (v.shape, v.dtype) for k, v in back.items()} == {k: (v.shape, v.dtype) for k, v in ours.items()}
    check_tensors(back, model, None)
    assert check_dtypes(back, None) == dtype
    d, inner = config.hidden_size, 2 * config.hidden_size
    assert theirs["backbone.layers.0.mixer.in_proj.weight"].shape == (2 * inner + 2 * 128 + inner // 64, d)
    assert theirs["backbone.layers.0.mixer.conv1d.weight"].shape == (inner + 256, 1, 4)
    published = config_to_state_spaces(config) | {"vocab_size": 50277}
    again = config_from_state_spaces(published)
    assert config_to_state_spaces(again) == published and again.vocab_size == config.vocab_size == 50288
    with torch.device("meta"): assert {k: v.shape for k, v in BioMambaForCausalLM(again).named_parameters()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_is_exact_both_ways(ssm, tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in torch.load(ssm / "pytorch_model.bin", weights_only=True).items()}
    tensors = {"lm_head.weight": tensors["backbone.embedding.weight"]} | {k: v for k, v in tensors.items() if k != "lm_head.weight"}  # not at the end
    torch.save(tensors, ssm / "pytorch_model.bin")
    there = convert(ssm, tmp_path / "a")
    assert read_config(there)[0].dtype == AutoModelForCausalLM.from_pretrained(there).dtype == dtype
    assert raw(dict(read_tensors(there))) == raw(from_state_spaces(tensors))
    back = convert(there, tmp_path / "b", to="state-spaces")
    again = torch.load(back / "pytorch_model.bin", weights_only=True)
    assert raw(again) == raw(tensors) and again["lm_head.weight"].data_ptr() == again["backbone.embedding.weight"].data_ptr()
    assert json.loads((back / "config.json").read_text()) == CONFIG
    with pytest.raises(UserError, match="exists already"): convert(ssm, tmp_path / "a")
    with pytest.raises(UserError, match="hf or state-spaces"): convert(ssm, tmp_path / "c", to="gguf")


def test_an_untied_head_is_kept(ssm, tmp_path):
    (ssm / "config.json").write_text(json.dumps(CONFIG | {"tie_embeddings": False}))
    tensors = torch.load(ssm / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, ssm / "pytorch_model.bin")
    back = convert(convert(ssm, tmp_path / "a", probe=True), tmp_path / "b", to="state-spaces", probe=True)
    assert raw(dict(read_tensors(back))) == raw(tensors)
    loaded = load_model(tmp_path / "a")
    assert torch.equal(loaded.lm_head.weight, loaded.backbone.embeddings.weight + 1)


def test_the_archive_is_a_sound_zip_that_repeats(hf, tmp_path):
    files = [convert(hf, tmp_path / name, to="state-spaces") / "pytorch_model.bin" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    with zipfile.ZipFile(files[0]) as archive: assert archive.testzip() is None and {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
    for mmap in (True, False):
        tensors = torch.load(files[0], weights_only=True, mmap=mmap)
        assert all(v.data_ptr() % 64 == 0 and v.is_contiguous() for v in tensors.values())
        assert raw(tensors) == raw(to_state_spaces(dict(read_tensors(hf))))


def test_tensors_that_are_views_are_written_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    values = {"backbone.embeddings.weight": base.T, "backbone.norm_f.weight": base[1]}
    write_state_spaces(iter(values.items()), {k: torch.empty(v.shape, device="meta") for k, v in values.items()}, False, tmp_path / "x.bin")
    again = torch.load(tmp_path / "x.bin", weights_only=True)
    assert torch.equal(again["backbone.embedding.weight"], base.T) and torch.equal(again["backbone.norm_f.weight"], base[1])


def test_an_old_pickle_is_read(model, ssm, tmp_path):
    "torch wrote its own format, which cannot be mapped, before it wrote zip archives."
    torch.save(to_state_spaces(model.state_dict()), ssm / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(ssm / "pytorch_model.bin")
    same_logits(load_model(ssm), model)
    assert raw(dict(read_tensors(convert(ssm, tmp_path / "a")))) == raw(from_state_spaces(to_state_spaces(model.state_dict())))


def test_a_small_window_changes_nothing(hf, ssm, monkeypatch):
    before = [raw(dict(read_tensors(folder))) for folder in (hf, ssm)]
    monkeypatch.setattr(checkpoints, "WINDOW", 1000)
    assert [raw(dict(read_tensors(folder))) for folder in (hf, ssm)] == before
    assert [k for k, _ in read_tensors(hf, ("backbone.norm_f.weight",))] == ["backbone.norm_f.weight"]
    assert all(v.is_meta for v in described(ssm).values()) and described(ssm).keys() == before[1].keys()


def test_what_the_other_format_cannot_say_is_refused(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    for change in ({"layer_norm_epsilon": 1e-6}, {"time_step_limit": [0.01, 0.1]}):
        (hf / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"{next(iter(change))}.*cannot say"): convert(hf, tmp_path / "a", to="state-spaces")
        assert not (tmp_path / "a").exists()


def test_a_full_disk_is_said_before_writing(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 5_000))
    with pytest.raises(UserError, match="needs 0.0 GB and its disk has 0.0 GB left"): convert(hf, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))


MEASURE = """
import json, re, sys, threading, time
from biomamba import checkpoints, conversion
def status(*names):
    text = open("/proc/self/status").read()
    return [int(re.search(rf"{name}:\\s+(\\d+)", text)[1]) / 1024 for name in names]
checkpoints.WINDOW = int(sys.argv[4])
before, most, done = status("RssAnon", "VmRSS"), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.005): most = max(most, status("RssAnon")[0])
thread = threading.Thread(target=watch); thread.start()
conversion.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], shard=int(sys.argv[4]))
done.set(); thread.join()
print(json.dumps({"anonymous": most - before[0], "resident": status("VmHWM")[0] - before[1]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_conversion_holds_a_part_of_the_checkpoint(tmp_path):
    "470 MB pass through, in files and maps of 32 MB; the largest tensor has 39 MB. Measured in MB above what the imports take."
    config = config_from_state_spaces(CONFIG | {"d_model": 768, "n_layer": 30, "vocab_size": 12_600, "ssm_cfg": {"layer": "Mamba2"}})
    config.architectures = ["Mamba2ForCausalLM"]
    new_model(config, 0).save_pretrained(tmp_path / "a")
    total = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors")) / 2**20
    assert total > 400
    for source, made, to in (("a", "b", "state-spaces"), ("b", "c", "hf")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / made), to, str(32 << 20)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        print(f"{to}: {total:.0f} MB of tensors, {measured}")
        assert measured["anonymous"] < 40 and measured["resident"] < 160 < total / 2
    for name, v in read_tensors(tmp_path / "a"): assert torch.equal(v, dict(read_tensors(tmp_path / "c", (name,)))[name])


@pytest.mark.parametrize("change", [{}, {"vocab_size": 50277}, {"ssm_cfg": {"layer": "Mamba2"}}, {"tie_embeddings": False}, {"pad_vocab_size_multiple": 8},
                                    {"ssm_cfg": {"layer": "Mamba2", "ngroups": 2, "chunk_size": 128}}])
def test_configurations_are_inverse(change):
    config = CONFIG | change
    assert config_to_state_spaces(config_from_state_spaces(config)) == config


def test_mamba1_is_refused(ssm, hf):
    (ssm / "config.json").write_text(json.dumps(CONFIG | {"ssm_cfg": {}}))
    refused(ssm, "Mamba-1")
    (ssm / "config.json").write_text(json.dumps(CONFIG | {"ssm_cfg": None}))
    refused(ssm, "Mamba-1")
    (hf / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refused(hf, "Mamba-1")


def test_the_tensors_of_a_mamba1_are_refused_by_name(ssm, hf):
    for folder in (ssm, hf):
        tensors = {k.replace("mixer.norm", "mixer.x_proj"): v.clone() for k, v in read_tensors(folder)}
        if folder == ssm: torch.save(tensors, folder / "pytorch_model.bin")
        else: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, "Mamba-1", "backbone.layers.0.mixer.x_proj.weight")


@pytest.mark.parametrize("text,part", [("{", "not JSON"), ("\xff\xfe", "not JSON"), ("[1]", "a JSON list"), ("{}", "model_type is None"), ('{"d_model": 64, "n_layer": 2}', "Mamba-1"),
                                       (json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}), "without vocab_size"),
                                       (json.dumps(CONFIG | {"d_model": "64"}), "describes no Mamba-2"), (json.dumps(CONFIG | {"d_model": 65}), "describes no Mamba-2"),
                                       (json.dumps(CONFIG | {"ssm_cfg": "Mamba2"}), "describes no Mamba-2"), (json.dumps(CONFIG | {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}), "describes no Mamba-2"),
                                       ('{"model_type": "mamba2", "hidden_size": "64"}', "describes no Mamba-2"), ("[" * 200_000, "not JSON"),
                                       (json.dumps(CONFIG | {"n_layer": 10**6}), "1,000,000 layers, and weights of"), (json.dumps(CONFIG | {"d_model": 2**70}), "describes no Mamba-2"),
                                       *((json.dumps(CONFIG | {"ssm_cfg": {"layer": "Mamba2"} | bad}), "describes no Mamba-2") for bad in ({"ngroups": 0}, {"expand": -1}, {"d_conv": -1}, {"headdim": -1}))])
def test_configurations_without_sense_are_refused(ssm, text, part):
    (ssm / "config.json").write_bytes(text.encode("latin-1"))
    refused(ssm, part)


@pytest.mark.parametrize("change,part", [(dict(hidden_act="gelu"), "hidden_act is 'gelu'"), (dict(hidden_act="x"), "describes no Mamba-2"), (dict(n_groups=0), "describes no Mamba-2"),
                                         (dict(time_step_limit=[]), "time_step_limit"), (dict(layer_norm_epsilon=float("nan")), "layer_norm_epsilon is nan"), (dict(conv_kernel=-1), "describes no Mamba-2"),
                                         (dict(vocab_size=2**70), "describes no Mamba-2"), (dict(num_hidden_layers=10**6), "layers, and weights of")])
def test_configurations_that_would_compute_something_else_are_refused(hf, tmp_path, change, part):
    config = json.loads((hf / "config.json").read_text()) | change
    (hf / "config.json").write_text(json.dumps(config))
    refused(hf, part)
    with pytest.raises(UserError): convert(hf, tmp_path / "new", to="state-spaces")


def test_swish_is_silu(hf, ssm, tmp_path):
    config = json.loads((hf / "config.json").read_text()) | {"hidden_act": "swish"}
    (hf / "config.json").write_text(json.dumps(config))
    same_logits(load_model(hf), load_model(ssm))
    convert(hf, tmp_path / "new", to="state-spaces")


@pytest.mark.parametrize("text,part", [("{", "not JSON"), ("", "not JSON"), ("[1]", "a JSON list"), ('{"max_new_tokens": -3}', "says nothing that generation could follow")])
def test_a_generation_config_without_sense_is_refused(hf, text, part):
    (hf / "generation_config.json").write_text(text)
    refused(hf, part)


@pytest.mark.parametrize("content,part", [(b"", "not JSON"), (b"{}", "it has no model"), (b"\xff\xfe\x00", "not JSON"), (b'{"model": 3}', "it has no model"),
                                          (b'{"model": {}}', "holds no tokenizer that works"), (b'{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}', "holds no tokenizer that works"),
                                          (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizer.json is JSON, but .*out of vocabulary"),
                                          (b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}', "they must be 0 and 1")])
def test_a_tokenizer_without_sense_is_refused(tmp_path, content, part):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=part): load_tokenizer(tmp_path)


def test_paths_and_dtypes_that_are_none_are_refused(tmp_path, hf, model):
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path in ("~nobody-of-that-name/x", tmp_path / "round", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(UserError): load_model(path)
        with pytest.raises(UserError): load_tokenizer(path)
    for dtype in ("float32", torch.complex64, torch.int8):
        with pytest.raises(UserError, match="dtype is"): load_model(hf, dtype=dtype)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="is a file"): save_model(model, tmp_path / "file", words())
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_numbers_are_refused_by_name(ssm, tmp_path, dtype, bad):
    tensors = {k: v.to(dtype) for k, v in torch.load(ssm / "pytorch_model.bin", weights_only=True).items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    tensors["backbone.layers.1.mixer.D"][2:4] = bad
    torch.save(tensors, ssm / "pytorch_model.bin")
    refused(ssm, "2 of 8 values of backbone.layers.1.mixer.D are NaN or infinite")
    with pytest.raises(UserError, match="NaN or infinite"): convert(ssm, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_of_several_dtypes_are_refused(ssm, hf):
    tensors = dict(read_tensors(hf))
    tensors["backbone.layers.0.mixer.A_log"] = tensors["backbone.layers.0.mixer.A_log"].bfloat16()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    refused(hf, "mixes dtypes", "backbone.layers.0.mixer.A_log", "bfloat16", "float32")
    tensors = {k: v.to(torch.int8) for k, v in read_tensors(ssm)}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, ssm / "pytorch_model.bin")
    refused(ssm, "int8", "float32, float16, bfloat16")


@pytest.mark.parametrize("index,part", [("{", "not JSON"), ("{}", "no weight_map"), ('{"weight_map": ["a"]}', "no weight_map"), ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors'"),
                                        ('{"weight_map": {"a": 3}}', "names 3"), ('{"weight_map": {"a": null}}', "names None"), ('{"weight_map": {"a": ""}}', "names ''"), ('{"weight_map": {"a": ".."}}', "names '..'"), ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"), ('{"weight_map": {}}', "weights of 0 tensors")])
def test_a_wrong_index_is_refused(hf, index, part):
    (hf / "model.safetensors.index.json").write_text(index)
    load_model(hf)  # as stock does: the index is that of an earlier model
    (hf / "model.safetensors").rename(hf / "other.safetensors")
    refused(hf, part)


def test_what_was_saved_last_is_loaded(model, tmp_path):
    "transformers leaves the index of shards where a whole file follows them, and the whole file where shards do."
    other = new_model(model.config, 1).eval()
    for first, last in ((dict(max_shard_size="100KB"), {}), ({}, dict(max_shard_size="100KB"))):
        folder = tmp_path / f"from {len(first)}"
        model.save_pretrained(folder, **first)
        other.save_pretrained(folder, **last)
        for loaded in (load_model(folder), AutoModelForCausalLM.from_pretrained(folder)): same_logits(loaded, other, 1e-5)


@contextlib.contextmanager
def someone_else():
    "Not root while the block runs, so that permissions count."
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)


@pytest.fixture
def public():
    "A temporary folder that everyone may enter."
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("kind,file", [("hf", "config.json"), ("hf", "model.safetensors"), ("ssm", "config.json"), ("ssm", "pytorch_model.bin"), ("hf", ".")])
def test_what_may_not_be_read_is_refused(request, public, kind, file):
    place = Path(shutil.copytree(request.getfixturevalue(kind), public / kind))
    (place / file).chmod(0)
    with someone_else():
        if os.access(place / file, os.R_OK, effective_ids=True): pytest.skip("this user may read every file")
        refused(place, "may not be read (Permission denied)", file.strip("."))


@pytest.mark.parametrize("to", ["hf", "state-spaces"])
def test_a_place_that_may_not_be_written_is_refused(hf, public, to):
    place = Path(shutil.copytree(hf, public / "hf"))
    for file in place.iterdir(): file.chmod(0o644)  # safetensors writes files that only their owner may read
    (public / "closed").mkdir(0o555)
    with someone_else():
        if os.access(public / "closed", os.W_OK, effective_ids=True): pytest.skip("this user may write everywhere")
        with pytest.raises(UserError, match="new could not be written .Permission denied"): convert(place, public / "closed" / "new", to)


@pytest.mark.parametrize("stored", [{"model": {"a": torch.ones(1)}}, [torch.ones(1)], {"backbone.embedding.weight": 3}, {1: torch.ones(1)}])
def test_a_pickle_of_something_else_is_refused(ssm, stored):
    torch.save(stored, ssm / "pytorch_model.bin")
    refused(ssm, "not of a model's tensors by name")


def test_a_file_of_safetensors_of_nonsense_is_refused(hf):
    for content in (b"<html>not found</html>" * 100, struct.pack("<Q", 2) + b"{}" + b"left over", struct.pack("<Q", 1 << 60)):
        (hf / "model.safetensors").write_bytes(content)
        refused(hf, "damaged or cut short")


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


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_tensors_that_are_not_plain_are_refused(ssm, odd):
    tensors = torch.load(ssm / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"backbone.layers.1.mixer.D": odd}, ssm / "pytorch_model.bin")
    refused(ssm, "backbone.layers.1.mixer.D as a tensor that is sparse")


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
    with pytest.raises(UserError, match="tiny is a recipe without a published checkpoint"): find_checkpoint("tiny")
    with pytest.raises(UserError, match="config.json is missing, and a model's folder holds one"): read_config(tmp_path)
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


# ---------------------------------------------------------------- the probe

def exchanged(v, inner=128, state=16):
    "in_proj with the rows of B and C exchanged."
    rows = slice(2 * inner, 2 * inner + 2 * state)
    return torch.cat([v[:rows.start], v[rows].roll(state, 0), v[rows.stop:]])


DAMAGE = {"in_proj.weight": exchanged, "A_log": torch.neg, "dt_bias": lambda v: v.flip(0), "conv1d.weight": lambda v: v.flip(-1), "D": lambda v: v + 1,
          "norm.weight": lambda v: v * 1.01, "out_proj.weight": lambda v: v / 2**0.5}


def test_a_load_that_is_right_passes_its_probe(model, hf, ssm, caplog):
    with caplog.at_level(logging.INFO, "biomamba"):
        for folder in (hf, ssm):
            for dtype in DTYPES: same_logits(load_model(folder, dtype=dtype, probe=True), load_model(folder, dtype=dtype))
    shares = [float(re.search(r"differ by (\S+) of", r.message)[1]) for r in caplog.records if "probe" in r.message]
    assert len(shares) == 6 and max(shares) <= PROBE_TOLERANCE / 10


@pytest.mark.parametrize("name", DAMAGE)
def test_a_load_that_is_wrong_fails_its_probe(hf, name):
    loaded = load_model(hf)
    p = loaded.get_parameter(f"backbone.layers.1.mixer.{name}")
    with torch.no_grad(): p.copy_(DAMAGE[name](p))
    with pytest.raises(UserError, match="do not compute the same") as e: parity(loaded, hf)
    assert "\n" not in str(e.value)


def test_a_loader_that_rounds_fails_its_probe(hf, monkeypatch):
    real = checkpoints.read_weights
    monkeypatch.setattr(checkpoints, "read_weights", lambda *a: ((k, v.bfloat16()) for k, v in real(*a)))
    with pytest.raises(UserError, match="do not compute the same"): load_model(hf, probe=True)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_copy_with_one_other_tensor_is_found(hf, tmp_path, name):
    there = convert(hf, tmp_path / "there", to="state-spaces")
    assert compare_folders(hf, there) <= PROBE_TOLERANCE
    tensors, name = torch.load(there / "pytorch_model.bin", weights_only=True), f"backbone.layers.0.mixer.{name}"
    tensors[name] = DAMAGE[name.partition("mixer.")[2]](tensors[name])
    torch.save(tensors, there / "pytorch_model.bin")
    with pytest.raises(UserError, match="do not compute the same"): compare_folders(hf, there)
    load_model(there, probe=True)  # by itself the copy is a sound checkpoint of another model, which no probe of it alone can tell


def test_every_row_of_a_tied_embedding_counts(hf, tmp_path):
    there = convert(hf, tmp_path / "there", to="state-spaces")
    tensors = torch.load(there / "pytorch_model.bin", weights_only=True)
    tensors["backbone.embedding.weight"][300] *= -1  # also the head: one storage
    torch.save(tensors, there / "pytorch_model.bin")
    with pytest.raises(UserError, match="do not compute the same"): compare_folders(hf, there)


def test_a_failed_probe_leaves_nothing(ssm, tmp_path, monkeypatch):
    from biomamba import conversion
    monkeypatch.setattr(conversion, "stock_logits", lambda folder: probe_logits(new_model(read_config(folder)[0], 1)))
    with pytest.raises(UserError, match="do not compute the same"): convert(ssm, tmp_path / "new", probe=True)
    assert not list(tmp_path.glob("*new*"))


def test_nan_and_other_shapes_never_pass():
    logits = torch.ones(2, 3)
    for other in (torch.full((2, 3), float("nan")), torch.ones(2, 4)):
        for a, b in ((logits, other), (other, logits)):
            with pytest.raises(UserError, match="do not compute the same"): checkpoints.check_parity(a, b, "two models")


def test_the_probe_needs_no_kernels_and_leaves_transformers_alone(hf, monkeypatch):
    "With mamba-ssm installed, transformers' functions are kernels that want a GPU."
    import functools
    from transformers.models.mamba2 import modeling_mamba2 as stock
    def kernel_for(torch_function):
        @functools.wraps(torch_function)
        def kernel(*args, **kwargs): raise RuntimeError("a kernel on a CPU")
        return kernel
    names = ["causal_conv1d_fn", "mamba2_chunk_scan"]
    for name in names: monkeypatch.setattr(stock, name, kernel_for(getattr(stock, name).__wrapped__))
    bound, log = [getattr(stock, name) for name in names], transformers.utils.logging
    for switch, shown in ((log.disable_progress_bar, False), (log.enable_progress_bar, True)):
        switch(); load_model(hf, probe=True)
        assert [getattr(stock, name) for name in names] == bound and log.is_progress_bar_enabled() == shown
    with pytest.raises(RuntimeError, match="a kernel on a CPU"): AutoModelForCausalLM.from_pretrained(hf)(IDS)
