"Fine-tuning: only answers are learned, nothing but the context is cut, a stopped run ends as if it had not been."
import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import Mamba2ForCausalLM

from biomamba.checkpoints import load_model, load_tokenizer, save_model
from biomamba.generation import generate
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.optimizer_step import loss_of
from biomamba.packing import IGNORE, padded_batches, step_batches
from biomamba.paper import SCALES
from biomamba.paper_results import CLINICAL_SCALES, published_table
from biomamba.recipe import recipe
from biomamba.runs import Run, UserError, mark_restricted, read_metrics, restricted
from biomamba.sample import sample_documents
from biomamba.sft import Example, Examples, candidate_scores, counts_of, digest, fine_tune, ids_of, loop_recipe, make_example, make_prompt, sft_recipe
from biomamba.steps import train_tokenizer, wrap_tokenizer

SHAPE = dict(d_model=32, layers=2, state=8, head_dim=16, vocabulary=400)
SMALL = sft_recipe("tiny", "qa", max_tokens=64, steps=8, sequences_per_step=5, learning_rate=1e-2, evaluations=4, micro_batch_tokens=128, seed=1)
END = 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A newborn model with its tokenizer."
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = wrap_tokenizer(train_tokenizer((d.text for d in sample_documents("pubmed", 60)), 400))
    save_model(new_model(mamba2_config(recipe("tiny", **SHAPE)), seed=3), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def drawn(n, seed=0, longest=64, name="q"):
    "Examples of random ids."
    rng, made = np.random.RandomState(seed), []
    for i in range(n):
        m = rng.randint(1, 6)
        prompt = np.concatenate([[END], rng.randint(2, 400, rng.randint(0, longest - m))])
        made.append(Example(f"{name}{i}", prompt, np.append(rng.randint(2, 400, m), END)))
    return made


TRAIN, VALIDATION = drawn(17), drawn(6, seed=1, name="v")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    "The folder of a run that nothing disturbed."
    folder = tmp_path_factory.mktemp("whole") / "run"
    fine_tune(folder, base, TRAIN, VALIDATION, SMALL)
    return folder


# ---------------------------------------------------------------- what is learned

def reference(model, examples):
    "Loss and gradients of the answers' token mean, one example after another, from logits."
    tokens = sum(len(e.answer) for e in examples)
    total = 0.0
    for e in examples:
        ids = torch.tensor(np.concatenate([e.prompt, e.answer]))
        logits = model(input_ids=ids[None, :-1]).logits[0]
        loss = F.cross_entropy(logits[len(e.prompt) - 1:].float(), ids[len(e.prompt):], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def of_batches(model, batches):
    tokens, total = sum(b.tokens for b in batches), 0.0
    for batch in batches:
        loss = loss_of(model, batch, None) / tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro", [64, 128, 4096])
def test_a_packed_masked_step_equals_one_example_at_a_time(base, micro):
    loop = loop_recipe(dataclasses.replace(SMALL, sequences_per_step=17, micro_batch_tokens=micro), **SHAPE)
    examples = Examples(TRAIN, VALIDATION, loop, base)
    batches = step_batches(examples, loop, 0)
    assert sum(b.tokens for b in batches) == sum(len(e.answer) for e in TRAIN) and sum(b.documents for b in batches) == 17
    assert sum((b.targets != IGNORE).sum() for b in batches) == sum(b.tokens for b in batches)
    stock = Mamba2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    for other in (reference(stock, TRAIN), of_batches(load_model(base), padded_batches([e.sequence for e in TRAIN], 64, 256))):
        loss, gradients = of_batches(load_model(base), batches)
        assert abs(loss - other[0]) < 1e-5
        for name, gradient in gradients.items():
            assert (gradient - other[1][name]).abs().max() <= 1e-5 * max(1, other[1][name].abs().max()), name


def test_no_position_that_predicts_the_prompt_has_a_gradient(base):
    model, kept = load_model(base), []
    model.backbone.register_forward_hook(lambda module, args, out: (out.last_hidden_state.retain_grad(), kept.append(out.last_hidden_state)) and None)
    e = Example("q", np.array([END, 5, 6, 7, 8]), np.array([9, 10, END]))
    ids = torch.tensor(np.concatenate([e.prompt, e.answer]))[None]
    loop = loop_recipe(dataclasses.replace(SMALL, sequences_per_step=1), **SHAPE)
    [batch] = step_batches(Examples([e], VALIDATION, loop, base), loop, 0)
    assert torch.equal(batch.input_ids, ids[:, :-1])
    loss_of(model, batch, None).backward()
    assert kept[0].grad[0].abs().amax(-1).gt(0).tolist() == [False] * 4 + [True] * 3
    # another prompt token is another input; as a target it was never asked for
    assert batch.targets.tolist() == [[IGNORE] * 4 + [9, 10, END]]


def test_prompts_are_learned_by_nobody(base, tmp_path):
    "The best that can be done on answers that are the same for all is to say them; a prompt stays as unlikely as it was."
    same = [dataclasses.replace(e, answer=np.array([7, 8, END])) for e in TRAIN]
    held = [dataclasses.replace(e, answer=np.array([7, 8, END])) for e in VALIDATION]
    summary = fine_tune(tmp_path / "run", base, same, held, dataclasses.replace(SMALL, steps=40))
    assert summary["best_validation_loss"]["selection"] < 0.5 < 5 < summary["validations"][0][1]
    models, prompts = (load_model(base), load_model(tmp_path / "run")), [np.array([END])]
    before, after = (np.mean(candidate_scores(m, prompts, [e.prompt[1:] for e in TRAIN if len(e.prompt) > 20]) / [len(e.prompt) - 1 for e in TRAIN if len(e.prompt) > 20]) for m in models)
    assert after < before + 0.2


def test_the_end_is_learned_and_ends_a_text(base, tokenizer, tmp_path):
    words = {"first": " yes", "second": " no", "third": " perhaps not"}
    made = [make_example(name, "Word: ", name, "\nAnswer:", answer, tokenizer, 64) for name, answer in words.items()]
    held = [dataclasses.replace(e, id=f"held {e.id}") for e in made]
    fine_tune(tmp_path / "run", base, made, held, dataclasses.replace(SMALL, steps=80, sequences_per_step=3, evaluations=2))
    prompts = [make_prompt("Word: ", name, "\nAnswer:", tokenizer, 64)[0].tolist() for name in words]
    said = generate(load_model(tmp_path / "run"), tokenizer, prompts, max_new_tokens=20)
    assert [(c.text, c.reason) for c in said] == [(answer, "eos") for answer in words.values()]


# ---------------------------------------------------------------- prompt and answer

@settings(max_examples=150, deadline=None)
@given(*[st.text(max_size=30)] * 3, st.text(min_size=1, max_size=12), st.integers(1, 90), st.integers(0, 20))
def test_only_the_context_is_cut_and_from_its_left(tokenizer, before, context, after, answer, max_tokens, least):
    parts = [ids_of(text, tokenizer).tolist() for text in (before, context, after, answer)]
    fixed = 1 + len(parts[0]) + len(parts[2]) + len(parts[3])
    e = make_example("q", before, context, after, answer, tokenizer, max_tokens, least)
    if fixed > max_tokens or max_tokens - fixed < min(least, len(parts[1])):
        assert e is None
        return
    kept = max(0, len(parts[1]) - (fixed + len(parts[1]) - max_tokens if fixed + len(parts[1]) > max_tokens else 0))
    assert e.prompt.tolist() == [END, *parts[0], *parts[1][len(parts[1]) - kept:], *parts[2]]
    assert e.answer.tolist() == [*parts[3], END] and e.cut == len(parts[1]) - kept
    assert e.tokens == len(e.sequence) - 1 == min(fixed + len(parts[1]), max_tokens) and e.sequence[:, 0].tolist() == [*e.prompt, *e.answer]
    assert (e.sequence[:, 1] >= 0).sum() == len(e.answer)
    same, cut = make_prompt(before, context, after, tokenizer, room=len(e.prompt))
    assert np.array_equal(same, e.prompt) and cut == e.cut


@pytest.mark.parametrize("given, says", [(["Mr Quarkfield fell"], "a list of length 1"), (b"Mr Quarkfield", "a bytes of length 13"), (None, "a NoneType"), (3.5, "a float")])
def test_what_is_no_text_is_not_quoted(tokenizer, given, says):
    with pytest.raises(UserError) as caught:
        make_example("q", "", given, "", "yes", tokenizer, 64)
    assert str(caught.value) == f"the context of q is {says}; a string is accepted"


def test_parts_are_tokenized_apart(tokenizer):
    word = max((tokenizer.decode([i]) for i in range(2, 400)), key=len)
    assert len(ids_of(word, tokenizer)) == 1                # one token, as one text
    e = make_example("q", "", "", word[:2], word[2:], tokenizer, 64)
    assert e.prompt.tolist() == [END, *ids_of(word[:2], tokenizer)] and e.answer.tolist() == [*ids_of(word[2:], tokenizer), END]
    assert tokenizer.decode([*e.prompt[1:], *e.answer[:-1]]) == word


def test_a_spelled_end_of_text_ends_nothing(tokenizer):
    e = make_example("q", "<|endoftext|>", "a<|padding|>b", "<|endoftext|>", "<|endoftext|>", tokenizer, 500)
    assert (e.prompt == END).sum() == 1 == (e.answer == END).sum() and not (e.prompt == 1).any()
    assert tokenizer.decode(e.answer[:-1]) == "<|endoftext|>"


def test_what_is_cut_and_dropped_is_counted(tokenizer, base, tmp_path):
    texts = [("short", 5), ("a far longer context than fits into the window of this test, by some words", 40), ("x", 2)]
    made = [make_example(f"q{i}", "", text, "?", " yes", tokenizer, room) for i, (text, room) in enumerate([(t, 24 if i < 2 else 3) for i, (t, _) in enumerate(texts)])]
    assert made[2] is None and made[1].cut > 0 == made[0].cut
    counts = counts_of(made)
    assert counts == {"examples": 2, "tokens": made[0].tokens + made[1].tokens, "supervised_tokens": 2 * len(made[0].answer), "supervised_share": counts["supervised_share"],
                      "cut_examples": 1, "cut_tokens": made[1].cut, "dropped": 1}
    assert counts["supervised_share"] == counts["supervised_tokens"] / counts["tokens"]
    summary = fine_tune(tmp_path / "run", base, made, VALIDATION + [None], dataclasses.replace(SMALL, steps=2, evaluations=1))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert summary["train"] == counts == manifest["train"] and summary["validation"]["dropped"] == 1


# ---------------------------------------------------------------- a run

def outcome(folder):
    "Metrics without times, the model, and the last checkpoint."
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]
    return lines, load_file(folder / "model" / "model.safetensors"), load_file(max((folder / "checkpoints").glob("step-*")) / "state.safetensors")


@pytest.mark.parametrize("number", [3, 4])      # between two validations, and at one
def test_a_stopped_run_goes_on_to_the_last_bit(base, whole, tmp_path, monkeypatch, number):
    write = Run.log
    def log(self, **line):
        write(self, **line)
        if line["step"] == number and "loss" in line: signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(UserError, match=f"stopped by SIGTERM after step {number} of 8"):
        fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, SMALL)
    monkeypatch.undo()
    fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, SMALL)
    (lines, *files), (lines2, *files2) = outcome(whole), outcome(tmp_path / "run")
    assert lines == lines2
    for tensors, tensors2 in zip(files, files2):
        assert tensors.keys() == tensors2.keys() and all(torch.equal(tensors[name], tensors2[name]) for name in tensors)


def test_a_finished_run_returns_its_summary(base, whole, monkeypatch):
    monkeypatch.setattr("biomamba.training.work", lambda *args: pytest.fail("it trained again"))
    summary = fine_tune(whole, base, TRAIN, VALIDATION, SMALL)
    assert summary["steps"] == 8 and [step for step, _ in summary["validations"]] == [0, 2, 4, 6, 8]
    assert not (whole / "private").exists()          # one process has its examples at hand


def test_no_average_and_equal_rates(whole):
    state = load_file(max((whole / "checkpoints").glob("step-*")) / "state.safetensors")
    names = [name.removeprefix("average.") for name in state if name.startswith("average.")]
    assert names and all(torch.equal(state[f"average.{name}"], state[f"model.{name}"]) for name in names)
    rates = [line["learning_rate"] for line in read_metrics(whole) if "loss" in line]
    assert max(rates) == SMALL.learning_rate and rates[-1] > 0 and rates[1:] == sorted(rates[1:], reverse=True)


def test_the_best_checkpoint_is_exported(base, tmp_path):
    hasty = dataclasses.replace(SMALL, learning_rate=0.3, warmup_ratio=0.5, steps=30, evaluations=15, early_stopping=2)
    summary = fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, hasty)
    step, loss = min(summary["validations"], key=lambda v: v[1])
    assert summary["best_step"] == step < summary["steps"] == step + 2 * 2 and summary["stopped_early"]
    model = load_model(tmp_path / "run")
    nats = sum(candidate_scores(model, [e.prompt], [e.answer])[0, 0] for e in VALIDATION)
    assert abs(-nats / sum(len(e.answer) for e in VALIDATION) - loss) < 1e-5


def test_another_run_is_refused(base, whole, tmp_path):
    for train, validation, r, field in ((TRAIN[1:], VALIDATION, SMALL, "corpus"), (TRAIN, VALIDATION[1:], SMALL, "corpus"),
                                        (TRAIN, VALIDATION, dataclasses.replace(SMALL, seed=2), "recipe.seed"),
                                        (TRAIN, VALIDATION, dataclasses.replace(SMALL, arm="adapted"), "fine_tuning.arm")):
        with pytest.raises(UserError, match=f"belongs to another run: .*{field}"):
            fine_tune(whole, base, train, validation, r)


def test_the_name_of_examples_changes_with_any_id():
    e = TRAIN[0]
    others = [dataclasses.replace(e, id="other"), dataclasses.replace(e, prompt=np.append(e.prompt, 5)), dataclasses.replace(e, answer=np.append([5], e.answer)),
              Example(e.id, np.append(e.prompt, e.answer[:1]), e.answer[1:])]
    assert len({digest(x) for x in ([e], [e, e], [], *([o] for o in others))}) == 3 + len(others)


def test_losses_that_are_not_finite_name_their_examples(base, tmp_path):
    wild = dataclasses.replace(SMALL, learning_rate=1e18, clip=1e18, warmup_ratio=0.0, steps=30, evaluations=1)
    with pytest.raises(UserError, match=r"3 optimizer steps in a row .* with the documents q\d+, q\d+"):
        fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, wild)


def test_the_mark_goes_with_what_derives(base, tmp_path):
    short = dataclasses.replace(SMALL, steps=1, evaluations=1)
    fine_tune(tmp_path / "one", base, TRAIN, VALIDATION, short, reason="notes under an agreement")
    assert restricted(tmp_path / "one") == restricted(tmp_path / "one" / "model") == "notes under an agreement"
    mark_restricted(tmp_path / "one" / "model", "notes under an agreement")
    fine_tune(tmp_path / "two", tmp_path / "one" / "model", TRAIN, VALIDATION, short)
    assert restricted(tmp_path / "two" / "model") == "notes under an agreement"
    fine_tune(tmp_path / "three", base, TRAIN, VALIDATION, short)
    assert restricted(tmp_path / "three") is None is restricted(tmp_path / "three" / "model")


@pytest.mark.slow
def test_two_processes_equal_one(base, whole, tmp_path):
    fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, SMALL, processes=2)
    losses = [[line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (whole, tmp_path / "run")]
    validations = [[line["validation_loss"]["selection"] for line in read_metrics(folder) if "validation_loss" in line] for folder in (whole, tmp_path / "run")]
    assert np.allclose(*losses, rtol=1e-5) and np.allclose(*validations, rtol=1e-5) and len(losses[0]) == 8
    assert (tmp_path / "run" / "private").stat().st_mode & 0o777 == 0o700


# ---------------------------------------------------------------- scores

def test_candidates_are_scored_as_one_at_a_time(base):
    stock, ours = Mamba2ForCausalLM.from_pretrained(base, dtype=torch.float32), load_model(base)
    prompts = [e.prompt for e in drawn(9, seed=4, longest=90)] + [np.array([END])]
    candidates = [np.array([5]), np.array([6, END]), np.array([7, 8, 9, 10, END])]
    scores = candidate_scores(ours, prompts, candidates, micro_batch_tokens=200)
    with torch.no_grad():
        for prompt, row in zip(prompts, scores):
            for candidate, found in zip(candidates, row):
                logits = stock(input_ids=torch.tensor(np.concatenate([prompt, candidate]))[None]).logits[0].double().log_softmax(-1)
                assert abs(found - sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(candidate))) < 1e-5
    assert ours.training is False and scores.shape == (10, 3)
    for tokens in (1, 64, 4096):
        assert np.abs(candidate_scores(ours, prompts, candidates, micro_batch_tokens=tokens) - scores).max() < 1e-5
    assert candidate_scores(ours, [], candidates).shape == (0, 3)


# ---------------------------------------------------------------- settings

@pytest.mark.parametrize("scale", SCALES)
def test_settings_are_the_tables(scale):
    a6 = published_table("A6").row(scale.upper())
    for arm in ("base", "adapted"):
        r = sft_recipe(scale, "qa", arm)
        assert (r.learning_rate, r.epochs, r.sequences_per_step, r.weight_decay) == (a6["learning rate"], a6["epochs"], a6["effective batch"], a6["weight decay"])
    if scale not in CLINICAL_SCALES:
        with pytest.raises(UserError, match="'2.7b' was not fine-tuned on notes"): sft_recipe(scale, "clinical")
        return
    for arm, number in (("base", "A9"), ("adapted", "A10")):
        r, row = sft_recipe(scale, "clinical", arm), published_table(number).row(scale.upper())
        assert (r.learning_rate, r.epochs, r.sequences_per_step) == (row["learning rate"], row["epochs"], row["effective batch"] == 32 and 32)
        assert r.warmup_ratio == row.get("warmup", 0.1)


def test_a_recipe_is_plain_data_and_the_loop_decays_it_to_nothing():
    r = sft_recipe("1.3b", "clinical", "adapted")
    assert json.loads(json.dumps(dataclasses.asdict(r)))["betas"] == [0.9, 0.95]
    loop = loop_recipe(r, **SHAPE)
    assert (loop.layer_decay, loop.ema_decay, loop.floor, loop.stable_ratio, loop.decay_ratio) == (1, 0, 0, 0, None)
    assert (loop.learning_rate, loop.steps, loop.epochs, loop.d_model, loop.early_stopping) == (9e-6, None, 6, 32, 5)


# ---------------------------------------------------------------- what a user can do wrong

@pytest.mark.parametrize("arguments, fields, says", [
    (("8b",), {}, "scale '8b' is unknown"), (("tiny", "chat"), {}, "task 'chat' is unknown"), (("tiny", "qa", "adpated"), {}, "did you mean 'adapted'"),
    (("tiny",), {"learning_rat": 1}, "did you mean 'learning_rate'"), (("tiny",), {"learning_rate": 0}, "learning_rate=0"), (("tiny",), {"epochs": 1.5}, "epochs=1.5"),
    (("tiny",), {"warmup_ratio": 2}, "warmup_ratio=2"), (("tiny",), {"early_stopping": 0}, "early_stopping=0"), (("tiny",), {"precision": "fp8"}, "precision='fp8'"),
    (("tiny",), {"scale": "130m"}, "scale"), (("tiny",), {"ema_decay": 0.9}, "'ema_decay' is no setting of fine-tuning"),
])
def test_wrong_settings(arguments, fields, says):
    with pytest.raises((UserError, TypeError), match=says): sft_recipe(*arguments, **fields)


A = TRAIN[0]


@pytest.mark.parametrize("train, validation, says", [
    ([], VALIDATION, "train holds no example"), (TRAIN, [], "validation holds no example"), ([None, None], VALIDATION, "all 2 were dropped"),
    (TRAIN + ["text"], VALIDATION, "train holds 'text'; Examples are accepted"),
    ([dataclasses.replace(A, prompt=np.array([5, 6]))], VALIDATION, r"q0 of train has a prompt that begins with \[5\]"),
    ([dataclasses.replace(A, prompt=np.array([], int))], VALIDATION, r"begins with \[\]"),
    ([dataclasses.replace(A, answer=np.array([5, 6]))], VALIDATION, r"has the answer \[5, 6\].*the end of text"),
    ([dataclasses.replace(A, answer=np.array([END]))], VALIDATION, r"has the answer \[0\]; one id at least"),
    ([dataclasses.replace(A, answer=np.array([400, END]))], VALIDATION, "holds the id 400 and the model's vocabulary has 400 rows"),
    ([dataclasses.replace(A, prompt=np.full(70, END))], VALIDATION, "at most max_tokens=64"),
    (TRAIN, TRAIN[:1], "1 ids stand in train and in validation; sets apart"),
])
def test_wrong_examples(base, tmp_path, train, validation, says):
    with pytest.raises(UserError, match=says): fine_tune(tmp_path / "run", base, train, validation, SMALL)
    assert not (tmp_path / "run").exists()


def test_other_mistakes(base, tokenizer, tmp_path, whole):
    with pytest.raises(UserError, match="did you mean 'keep_checkpoints'"): fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, SMALL, keep_checkpoint=1)
    with pytest.raises(UserError, match="processes=0"): fine_tune(tmp_path / "run", base, TRAIN, VALIDATION, SMALL, processes=0)
    with pytest.raises(UserError): fine_tune(tmp_path / "run", tmp_path / "nothing", TRAIN, VALIDATION, SMALL)
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds thesis.txt"): fine_tune(tmp_path / "mine", base, TRAIN, VALIDATION, SMALL)
    with pytest.raises(UserError, match="the answer of q7 is empty"): make_example("q7", "", "text", "?", "", tokenizer, 64)
    with pytest.raises(UserError, match="the context of q7 is a NoneType;"): make_example("q7", "", None, "?", " yes", tokenizer, 64)
    with pytest.raises(UserError, match="the answer of q7 is a int;"): make_example("q7", "", "text", "?", 3, tokenizer, 64)
    with pytest.raises(UserError, match="without its context has 3 tokens, and there is room for 2"): make_prompt("a", "text", "?", tokenizer, 2)
    model = load_model(base)
    with pytest.raises(UserError, match="candidate 1 has no tokens"): candidate_scores(model, [A.prompt], [A.answer, []])
    with pytest.raises(UserError, match="prompt 0 has no tokens"): candidate_scores(model, [[]], [A.answer])
    with torch.no_grad(): model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="1 of 1 prompts have a candidate whose log-likelihood is not finite"): candidate_scores(model, [A.prompt], [A.answer])
