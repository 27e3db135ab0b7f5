"What an exported model must have for programs that are not here to try: vLLM and llama.cpp."
import json
import re

import pytest
from safetensors import safe_open

from biomamba.checkpoints import save_model
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.recipe import recipe
from biomamba.steps import train_tokenizer, wrap_tokenizer

# The fields that vLLM's Mamba2ForCausalLM reads from config.json.
VLLM = ["hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "expand", "hidden_act",
        "use_bias", "use_conv_bias", "layer_norm_epsilon", "tie_word_embeddings", "vocab_size"]
# The tensors of one layer that both programs know, in transformers' names.
LAYER = {"norm.weight", "mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias",
         "mixer.norm.weight", "mixer.out_proj.weight"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A model as a run exports it."
    folder = tmp_path_factory.mktemp("exported") / "model"
    small = recipe("tiny", d_model=64, layers=2, vocabulary=512)
    save_model(new_model(mamba2_config(small), 0), folder, wrap_tokenizer(train_tokenizer(["a word or two of text"] * 50, 512)))
    return folder


def read(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def names(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file: return sorted(file.keys())


def test_the_configuration_has_what_vllm_reads(exported):
    config = read(exported)
    assert config["architectures"] == ["Mamba2ForCausalLM"] and config["model_type"] == "mamba2"
    assert not [name for name in VLLM if name not in config]
    assert config["expand"] * config["hidden_size"] == config["num_heads"] * config["head_dim"]
    assert config["tie_word_embeddings"] and "lm_head.weight" not in names(exported)


def test_the_configuration_has_what_llama_cpp_asks_for(exported):
    config = read(exported)
    inner = config.get("intermediate_size") or 2 * config["hidden_size"]
    assert inner == 2 * config["hidden_size"] and inner % config["head_dim"] == 0
    assert config["vocab_size"] % 16 == 0, "the converter would pad the vocabulary, and the embedding would not fit it"
    assert config["n_groups"] == 1 and config["conv_kernel"] == 4 and config["state_size"]
    assert (exported / "tokenizer.json").is_file() and not list(exported.glob("*.bin"))


def test_the_published_scales_have_it_too():
    from biomamba.paper import SCALES
    for scale in SCALES:
        config = mamba2_config(recipe(scale)).to_dict()
        assert config["vocab_size"] % 16 == 0 and config["expand"] == 2
        assert config["expand"] * config["hidden_size"] == config["num_heads"] * config["head_dim"]


def test_the_tensors_are_those_of_the_format(exported):
    layers = {f"backbone.layers.{i}.{name}" for i in range(2) for name in LAYER}
    assert set(names(exported)) == layers | {"backbone.embeddings.weight", "backbone.norm_f.weight"}


def test_gguf_has_a_place_for_every_tensor(exported):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: make oracles")
    places = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA2, 2)
    asked = [re.sub(r"\.dt_bias$", ".dt_proj.bias", name) for name in names(exported)]     # as its converter does
    found = {name: places.get_name(name, try_suffixes=(".weight", ".bias")) for name in asked}
    assert all(found.values()), [name for name, place in found.items() if not place]
    assert len(set(found.values())) == len(found)
    kinds = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MAMBA2]}
    used = {re.sub(r"^blk\.\d+", "blk.{bid}", re.sub(r"\.(weight|bias)$", "", place)) for place in found.values()}
    assert kinds - used == {"output"}, "a tied head is not stored, and nothing else may be missing"
