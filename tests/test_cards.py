"A card says what its run says, in the form that the hub reads, and carries the mark."
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from biomamba.cards import model_card, write_card, write_cards
from biomamba.checkpoints import save_model
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.pairs import hold_out_pairs, read_pairs, sft
from biomamba.recipe import recipe
from biomamba.runs import UserError, mark_restricted, restricted
from biomamba.sample import sample_documents
from biomamba.steps import train_tokenizer, wrap_tokenizer

SMALL = json.dumps({"max_tokens": 48, "sequences_per_step": 4, "learning_rate": 1e-2, "evaluations": 1})
TERMS = "notes of ward 7, protocol 12, data use agreement of 2024"
SECRET = "zebrafish-quartz-1977"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 60)), 400))
    save_model(new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, state=8, head_dim=16, vocabulary=400)), seed=0), folder, tokenizer)
    return folder


def pairs_file(folder: Path, n: int = 20, answer: str = "high") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Dose {i}:", "answer": answer}) + "\n" for i in range(n)))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    sft(str(base), str(pairs_file(folder)), run_dir=str(folder / "run"), steps=2, overrides=SMALL)
    return folder / "run"


def front(text: str) -> dict:
    "The YAML on top, by a parser that is not the one that wrote it."
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_yaml_that_the_hubs_library_reads(tuned):
    card = ModelCard.load(tuned / "model" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation" and card.data.language == "en"
    assert front((tuned / "model" / "README.md").read_text())["tags"] == card.data.tags and "supervised-fine-tuning" in card.data.tags


def test_the_card_says_what_the_run_says(tuned):
    text, training = (tuned / "model" / "README.md").read_text(), json.loads((tuned / "training.json").read_text())
    identity, manifest = (json.loads((tuned / f"{name}.json").read_text()) for name in ("recipe", "manifest"))
    assert manifest["fingerprint"] in text and identity["weights_sha256"][:16] in text and f"{training['best_validation_loss']['selection']:.4f}" in text
    assert "was not tested" in text and "## Limits" in text and "## Licence" in text
    training["best_validation_loss"]["selection"] = 9.8765
    (tuned / "training.json").write_text(json.dumps(training))
    assert "9.8765" in model_card(tuned), "read from the folder, not written down"


def test_no_path_of_the_machine_is_on_the_card(tuned, base):
    assert str(base.parent) not in (tuned / "model" / "README.md").read_text()


@pytest.mark.parametrize("how", ["file", "word", "model"])
def test_the_mark_reaches_the_card_from_wherever_it_stands(base, tmp_path, how):
    path, start, given = pairs_file(tmp_path / "data", answer=SECRET), base, {}
    if how == "file": mark_restricted(path.parent, TERMS)
    if how == "word": given = {"restriction": TERMS}
    if how == "model":
        import shutil
        start = Path(shutil.copytree(base, tmp_path / "start")); mark_restricted(start, TERMS)
    sft(str(start), str(path), run_dir=str(tmp_path / "run"), steps=1, overrides=SMALL, **given)
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    assert TERMS in text and "counts as sensitive data under the same terms" in text and "## Restricted" in text
    assert front(text)["license"] == "other" and "restricted" in front(text)["tags"]
    assert restricted(tmp_path / "run" / "model") == TERMS and (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    outside = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and "private" not in p.parts]
    assert not [p.name for p in outside if SECRET.encode() in p.read_bytes()]


def test_every_model_below_a_comparison_gets_its_card(tuned, tmp_path):
    import shutil
    for name in ("yes_no-base-42", "yes_no-adapted-42"): shutil.copytree(tuned, tmp_path / "qa" / name)
    for path in (tmp_path / "qa").rglob("README.md"): path.unlink()
    assert [path.parent.parent.name for path in write_cards(tmp_path / "qa")] == ["yes_no-adapted-42", "yes_no-base-42"]


def test_a_folder_without_a_model_is_refused(tmp_path, tuned):
    with pytest.raises(UserError, match="has no model/"): write_card(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="no finished training"): write_card(tmp_path)


# ---------------------------------------------------------------- pairs

def test_prompts_do_not_stand_on_both_sides(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "prompt": f"same {i % 7}", "answer": "a"}) + "\n" for i in range(70)))
    train, held, counts = hold_out_pairs(read_pairs(path), 0.05)
    assert held and not {p.prompt for p in train} & {p.prompt for p in held} and len(train) + len(held) + sum(counts.values()) == 70


@pytest.mark.parametrize("content, says", [
    ('{"prompt": "a"}\n{"prompt": "b", "answer": "c"}', "pairs.jsonl:1 has no answer"), ('[1]\n', "line 1, is no JSON object"), ('{"prompt": "a", "answer": "b"}', "1 pairs; at least 2"),
    ('{"question": "a", "answer": "b"}\n', "has no context"), ('{"id": 1, "prompt": "a", "answer": "b"}\n{"id": 1, "prompt": "c", "answer": "d"}', "pairs 1 and 2 of"), ("", "0 pairs"),
    ('{"prompt": "na\\ud800", "answer": "b"}\n', "has no prompt"), (b'{"prompt": "na\xefve", "answer": "b"}\n', "line 1, is no JSON object in UTF-8"),
    ('{"prompt": 3, "answer": "b"}\n', "has no prompt"), ('{"prompt": "a", "answer": " "}\n', "has no answer")])
def test_a_bad_file_is_one_sentence(tmp_path, base, content, says):
    (tmp_path / "pairs.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says) as caught: sft(str(base), str(tmp_path / "pairs.jsonl"), run_dir=str(tmp_path / "run"))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_training_and_asking_share_one_template(base, tmp_path):
    from biomamba.pairs import examples_of
    from biomamba.checkpoints import load_tokenizer
    from biomamba.qa import qa_example
    from biomamba.questions import YES_NO, Question
    lines = [{"id": str(i), "question": f"Did {i} recover?", "context": f"Case {i} recovered.", "answer": "yes"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = load_tokenizer(base)
    made = examples_of(tmp_path / "pairs.jsonl", tokenizer, 128, 0.25)
    for example in [*made.train, *made.validation]:
        line = lines[int(example.id)]
        theirs = qa_example(Question(example.id, line["question"], line["context"], line["answer"], "asked"), YES_NO, tokenizer, 128)
        assert example.prompt.tolist() == theirs.prompt.tolist() and example.answer.tolist() == theirs.answer.tolist()


@pytest.mark.parametrize("name, scale, from_hub, expected", [("runs/mine", "tiny", None, None), ("someone/model", "tiny", True, "someone/model"), ("someone/model", "tiny", None, None), ("tests/upstream", "tiny", None, None),
                                                            ("state-spaces/mamba2-130m", "130m", None, "state-spaces/mamba2-130m"), ("state-spaces/mamba2-130m", "tiny", True, "state-spaces/mamba2-130m")])
def test_a_card_names_a_repository_and_no_folder(tuned, tmp_path, name, scale, from_hub, expected):
    for file in ("recipe.json", "manifest.json", "training.json"):
        about = json.loads((tuned / file).read_text())
        if file == "recipe.json": about |= {"model": name, "recipe": about["recipe"] | {"scale": scale}}
        if file == "training.json" and from_hub: about |= {"base_from_hub": True}
        (tmp_path / file).write_text(json.dumps(about))
    assert front(model_card(tmp_path)).get("base_model") == expected


def test_a_training_notes_that_its_base_is_of_the_hub(base, tmp_path, monkeypatch):
    import shutil

    from biomamba import checkpoints
    snapshot = shutil.copytree(base, tmp_path / "models--someone--model" / "snapshots" / "abc")
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **__: str(snapshot))
    sft("someone/model", str(pairs_file(tmp_path)), run_dir=str(tmp_path / "run"), steps=1, overrides=SMALL)
    assert front((tmp_path / "run" / "model" / "README.md").read_text())["base_model"] == "someone/model"
    sft(str(base), str(pairs_file(tmp_path)), run_dir=str(tmp_path / "local"), steps=1, overrides=SMALL)
    assert "base_from_hub" not in json.loads((tmp_path / "local" / "training.json").read_text())
