"Generation: prefill in constant memory, rows that do not see each other, transformers' tokens, stops, streams."
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TextStreamer, TopKLogitsWarper, TopPLogitsWarper

from biomamba import decoding
from biomamba.checkpoints import generation_config, save_model
from biomamba.steps import train_tokenizer, wrap_tokenizer
from biomamba.decoding import Decoder, prefill
from biomamba.generation import Options, TextPieces, choose, generate, held_back, row_generator, stream
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.runs import UserError, recipe
from biomamba.ssd import recurrence
from biomamba.token_loops import WAITING

transformers.logging.set_verbosity_error()
SMALL = recipe("tiny", d_model=64, layers=2, state=16, head_dim=16)
TEXTS = ["The β-blocker was given to naïve patients, 5 µg/kg, at −20 °C.", "Ein Müsli für 3 €, 日本語の本文, 😀 and 🧬.", "no wonder, nothing else"] * 3
ENTRIES, ROWS = 300, 312  # of the tokenizer; of the model's vocabulary


@pytest.fixture(scope="module")
def tokenizer(): return wrap_tokenizer(train_tokenizer(TEXTS, ENTRIES))


def small(seed=0, spread=0.05, **changes):
    "A small model whose norms, decays and steps are not at their initial values."
    config = mamba2_config(SMALL, ROWS)
    for k, v in (changes | {"tokenizer_entries": ENTRIES}).items(): setattr(config, k, v)
    model = new_model(config, seed)
    model.generation_config = generation_config(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * spread)
    return model.eval()


def text(length, seed=0): return torch.randint(2, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [text(n, n) for n in (3, 40, 1, 17, 120)]


def stock_tokens(model, prompt, n, **options):
    "What transformers' own loop writes after one prompt."
    ids = torch.tensor([prompt])
    options = dict(do_sample=False) | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, **options)[0, len(prompt):].tolist()


def step_logits(decoder, ids, begin):
    "Logits of a decoder that reads `begin` tokens and is given the rest, one by one; ids (rows, T)."
    batch, out = decoder.batch(len(ids)), []
    for row, t in enumerate(ids): batch.put(row, prefill(decoder.model, t[None, :begin])[1])
    for t in ids[:, begin:].T: out.append(decoder.step(batch, t).clone())
    return torch.stack(out, 1)


# ---------------------------------------------------------------- prefill

@pytest.mark.parametrize("chunk", [1, 3, 64, 100, 5000])
def test_prefill_in_pieces_equals_the_whole(chunk):
    model, ids = small(), torch.tensor([text(150, 1), text(150, 2)])
    with torch.no_grad(): whole = model(ids, use_cache=True)
    logits, cache = prefill(model, ids, chunk)
    torch.testing.assert_close(logits, whole.logits[:, -1], rtol=0, atol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(cache.get_recurrent_state(layer), whole.cache.get_recurrent_state(layer), rtol=0, atol=1e-5)
        torch.testing.assert_close(cache.get_conv_state(layer), whole.cache.get_conv_state(layer), rtol=0, atol=1e-5)


MEMORY = """
import json, resource, sys, torch
from biomamba.decoding import Decoder, prefill
from biomamba.mamba2 import mamba2_config, new_model
from biomamba.runs import recipe
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
model = new_model(mamba2_config(recipe("tiny", d_model=32, layers=2, state=8, head_dim=16)), 0).eval()
prefill(model, torch.zeros(1, 2000, dtype=torch.long))
short = peak()
_, cache = prefill(model, torch.zeros(1, int(sys.argv[1]), dtype=torch.long))
long = peak()
decoder = Decoder(model); batch = decoder.batch(1); batch.put(0, cache); ids = torch.zeros(1, dtype=torch.long)
for _ in range(50): ids = decoder.step(batch, ids).argmax(-1)
first = peak()
for _ in range(1500): ids = decoder.step(batch, ids).argmax(-1)
print(json.dumps([short, long, first, peak()]))
"""


def test_200_000_tokens_fit_in_the_memory_of_2_000_plus_their_ids():
    "And 1,500 more steps of the loop take nothing. Megabytes; the logits of the long prompt alone would be 1,600."
    done = subprocess.run([sys.executable, "-c", MEMORY, "200000"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    short, long, first, last = json.loads(done.stdout)
    assert long - short < 200_000 * 8 / 2**20 + 8, (short, long)
    assert last - first < 2, (first, last)


# ---------------------------------------------------------------- the step

@pytest.mark.parametrize("changes", [{}, {"n_groups": 2}, {"use_bias": True}, {"use_conv_bias": False}, {"time_step_limit": (0.01, 0.05)},
                                     {"tie_word_embeddings": False}], ids=str)
def test_steps_equal_the_forward_pass(changes):
    model, ids = small(**changes), torch.tensor([text(70, 3), text(70, 4)])
    with torch.no_grad(): whole = model(ids).logits
    for begin in (1, 2, 13):  # shorter than the convolution's window too
        torch.testing.assert_close(step_logits(Decoder(model), ids, begin), whole[:, begin:], rtol=0, atol=1e-4)


def naive_logits(model, ids):
    "The model written out in fp64 from the definitions: one text (T), all its logits."
    m, rms = model.double(), lambda x, norm, w: x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * w
    h = m.backbone.embeddings.weight[ids]
    for block in m.backbone.layers:
        mixer = block.mixer
        z, xbc, dt = (rms(h, block.norm, block.norm.weight) @ mixer.in_proj.weight.T).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
        padded = F.pad(xbc, (0, 0, mixer.conv_kernel_size - 1, 0))
        xbc = F.silu(sum(padded[k:k + len(xbc)] * mixer.conv1d.weight[:, 0, k] for k in range(mixer.conv_kernel_size)) + mixer.conv1d.bias)
        x, B, C = xbc.split([mixer.intermediate_size, mixer.ssm_state_size, mixer.ssm_state_size], -1)
        x, A = x.view(1, len(ids), mixer.num_heads, -1), -mixer.A_log.exp()
        y, _ = recurrence(x, F.softplus(dt + mixer.dt_bias)[None], A, B[None, :, None], C[None, :, None], mixer.D)
        h = h + rms(y.flatten(2)[0] * F.silu(z), mixer.norm, mixer.norm.weight) @ mixer.out_proj.weight.T
    return rms(h, m.backbone.norm_f, m.backbone.norm_f.weight) @ m.lm_head.weight.T


def test_steps_in_fp64_equal_the_definition():
    "From an empty row, through three flushes; an empty row is one that no prompt was put in."
    model, ids = small().double(), torch.tensor(text(60, 5))
    decoder = Decoder(model)
    batch = decoder.batch(1)
    got = torch.cat([decoder.step(batch, t[None]).clone() for t in ids])
    assert got.dtype == torch.float64
    with torch.no_grad(): torch.testing.assert_close(got, naive_logits(model, ids), rtol=0, atol=1e-11)


def test_bf16_products_keep_the_logits_to_their_accuracy():
    model, ids = small(), torch.tensor([text(200, 6)])
    with torch.no_grad(): whole = model(ids).logits[:, 20:]
    got = step_logits(Decoder(model, torch.bfloat16), ids, 20)
    assert got.dtype == torch.float32  # as the products sum them
    error = (got - whole).square().mean().sqrt() / whole.std()
    assert 1e-4 < error < 0.02, error


@given(rows=st.integers(1, 4), joins=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=5), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_rows_join_at_any_step_and_do_not_see_each_other(rows, joins, seed):
    "Rows are taken over by new texts while their neighbours' tokens wait; every row's logits are those of its text alone."
    decoder = Decoder(small())
    batch, g = decoder.batch(rows), torch.Generator().manual_seed(seed)
    texts = [[] for _ in range(rows)]
    for row, steps in [(r, 1) for r in range(rows)] + joins:
        row %= rows
        texts[row] = torch.randint(2, 290, (1 + steps % 7,), generator=g).tolist()
        batch.put(row, prefill(decoder.model, torch.tensor([texts[row]]))[1])
        if not all(texts): continue
        for _ in range(steps):
            tokens = torch.randint(2, 290, (rows,), generator=g)
            for t, token in zip(texts, tokens.tolist()): t.append(token)
            logits = decoder.step(batch, tokens)
        for t, got in zip(texts, logits):
            with torch.no_grad(): torch.testing.assert_close(got, decoder.model(torch.tensor([t])).logits[0, -1], rtol=0, atol=1e-4)


def test_a_smaller_batch_goes_on():
    decoder, ids = Decoder(small()), torch.tensor([text(50, s) for s in range(3)])
    with torch.no_grad(): whole = decoder.model(ids).logits
    batch = decoder.batch(3)
    for row in range(3): batch.put(row, prefill(decoder.model, ids[row:row + 1, :4])[1])
    for i in range(4, 25): decoder.step(batch, ids[:, i])
    batch = batch.keep([2, 0])
    for i in range(25, 50):
        torch.testing.assert_close(decoder.step(batch, ids[[2, 0], i]), whole[[2, 0], i], rtol=0, atol=1e-4)


def test_a_strong_decay_neither_overflows_nor_leaves_a_trace():
    model = small()
    with torch.no_grad(): model.backbone.layers[0].mixer.A_log.fill_(12.0)
    ids = torch.tensor([text(60, 7)])
    got = step_logits(Decoder(model), ids, 3)
    with torch.no_grad(): torch.testing.assert_close(got, model(ids).logits[:, 3:], rtol=0, atol=1e-4)


def test_without_packed_products_the_loop_is_the_same(monkeypatch):
    model, ids = small(), torch.tensor([text(40, 8)])
    by_loops = step_logits(Decoder(model), ids, 5)
    monkeypatch.setattr(decoding, "multiplies", lambda weight: False)
    packed = step_logits(Decoder(model), ids, 5)
    monkeypatch.setattr(decoding, "packs", lambda weight: False)
    plain = Decoder(model)
    assert plain.head.func is F.linear
    for other in (by_loops, packed): torch.testing.assert_close(step_logits(plain, ids, 5), other, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- transformers' tokens

def test_greedy_tokens_are_those_of_stock_transformers(tmp_path, tokenizer):
    "A model saved and loaded by transformers alone; ours alone; ours through transformers' loop, padded on the left."
    model = small(3)
    save_model(model, tmp_path / "model", tokenizer)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(stock) is transformers.Mamba2ForCausalLM
    batch = [list(c.tokens) for c in generate(model, tokenizer, PROMPTS, max_new_tokens=50)]
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[1] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    through = model.generate(padded, attention_mask=mask, max_new_tokens=50, do_sample=False)[:, longest:].tolist()
    for prompt, ours, row in zip(PROMPTS, batch, through):
        assert ours == stock_tokens(stock, prompt, 50) == stock_tokens(model, prompt, 50) == row[:len(ours)]
        assert ours == list(generate(model, tokenizer, [prompt], max_new_tokens=50)[0].tokens)
    assert len({tuple(t) for t in batch}) == len(PROMPTS)  # or the comparison would say little


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, seed=5), dict(temperature=0.8, top_k=20), dict(temperature=1.3, top_p=0.9, seed=1)], ids=str)
def test_each_row_equals_its_own_single_run(tokenizer, dtype, options):
    "Whatever the batch, its size and the order."
    decoder = Decoder(small(), dtype)
    run = lambda prompts, **more: [c.tokens for c in generate(decoder, tokenizer, prompts, max_new_tokens=40, **options, **more)]
    alone = [run([p])[0] for p in PROMPTS]
    assert run(PROMPTS) == alone
    assert run(PROMPTS, batch_size=2) == alone
    assert run(PROMPTS[::-1], batch_size=3) == alone[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_joins_late_has_the_digits_of_its_own_run(dtype):
    "Its tokens enter its state when they would if it were alone, also after the batch has shrunk."
    model = small()
    decoder, later, exact = Decoder(model, dtype), 5, dict(rtol=0, atol=0)
    begin = lambda batch, row: batch.put(row, prefill(model, torch.tensor([PROMPTS[row]]), dtype=dtype)[1])
    alone, both, given = decoder.batch(1), decoder.batch(2), torch.arange(2, 62)
    alone.put(0, prefill(model, torch.tensor([PROMPTS[1]]), dtype=dtype)[1])
    begin(both, 0)
    for k in range(later): decoder.step(both, given[[k, k]])
    begin(both, 1)
    for k in range(40):
        if k == 27: both = both.keep([1])
        one, other = decoder.step(alone, given[[k]])[0], decoder.step(both, given[[k] * both.rows])[-1]
        torch.testing.assert_close(one, other, **exact if decoder.by_loops else {})


def test_a_batch_whose_rows_end_at_different_times_shrinks_and_refills(tokenizer, monkeypatch):
    model = small()
    model.generation_config.eos_token_id = None
    free = [c.tokens for c in generate(model, tokenizer, PROMPTS * 2, max_new_tokens=30, temperature=1.0)]
    model.generation_config.eos_token_id = ends = sorted({t[n] for t, n in zip(free, (2, 25, 7, 29, 0, 3, 14, 9, 28, 1))})
    sizes, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, batch, ids: (sizes.append(len(ids)), step(self, batch, ids))[1])
    done = generate(model, tokenizer, PROMPTS * 2, max_new_tokens=30, temperature=1.0, batch_size=4)
    for c, t in zip(done, free):
        cut = next((i for i, token in enumerate(t) if token in ends), None)
        assert c.tokens == (t if cut is None else t[:cut + 1]) and c.reason == ("length" if cut is None else "eos")
    assert max(sizes) == 4 and min(sizes) < 4 and sizes == sorted(sizes, reverse=True)


# ---------------------------------------------------------------- choosing

@pytest.mark.parametrize("o", [Options(temperature=0.7), Options(temperature=1.0, top_k=5), Options(temperature=2.0, top_p=0.6), Options(temperature=1.0, top_k=9, top_p=0.5)], ids=str)
def test_samples_follow_the_distribution_of_transformers(o):
    g, n = torch.Generator().manual_seed(0), 20_000
    logits = torch.randn(1, 30, generator=g) * 2
    given = ((TemperatureLogitsWarper, o.temperature), (TopKLogitsWarper, o.top_k), (TopPLogitsWarper, o.top_p))
    p = LogitsProcessorList(warper(value) for warper, value in given if value)(None, logits.index_fill(1, torch.tensor([3, 29]), -torch.inf)).softmax(-1)[0]
    counts = torch.bincount(torch.tensor(choose(logits.expand(n, -1), torch.tensor([3, 29]), o, [g] * n)), minlength=30) / n
    assert (counts[p == 0] == 0).all()
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_a_uniform_number_of_zero_chooses_no_suppressed_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: torch.zeros(size))
    assert choose(torch.zeros(1, 5), torch.tensor([0, 1]), Options(temperature=1.0), [None]) == [2]


def test_rows_without_a_token_never_appear(tokenizer):
    model = small()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    with torch.no_grad(): model.backbone.embeddings.weight[len(tokenizer):] *= 50  # their logits are far above all others, half of the time
    plain = stock_tokens(model, PROMPTS[0], 40)
    assert max(plain) >= len(tokenizer)
    for options in ({}, {"temperature": 1.5}):
        assert max(max(c.tokens) for c in generate(model, tokenizer, PROMPTS, max_new_tokens=40, **options)) < len(tokenizer)


def test_suppress_tokens_of_the_generation_config(tokenizer):
    model = small()
    first = [c.tokens[0] for c in generate(model, tokenizer, PROMPTS, max_new_tokens=1)]
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1, suppress_tokens=[*first, *range(len(tokenizer), ROWS)])
    for prompt, c in zip(PROMPTS, generate(model, tokenizer, PROMPTS, max_new_tokens=30)):
        assert not set(first) & set(c.tokens)
        assert list(c.tokens) == stock_tokens(model, prompt, 30)


def test_seeds(tokenizer):
    model = small()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run = lambda prompts, seed=0: [c.tokens for c in generate(model, tokenizer, prompts, max_new_tokens=25, temperature=1.0, seed=seed)]
    assert run(PROMPTS) == run(PROMPTS) and run(PROMPTS) != run(PROMPTS, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert len({row_generator(*seed).initial_seed() for seed in ((0, [1], 0), (0, [2], 0), (1, [1], 0), (0, [1], 1))}) == 4
    assert len(set(run([PROMPTS[0]] * 6))) == 6
    assert len(set(run([PROMPTS[0]] * 6, 7)) | set(run([PROMPTS[0]] * 6))) == 12


# ---------------------------------------------------------------- ends

def test_end_of_text_is_the_last_token_and_no_text(tokenizer):
    model = small()
    tokens = stock_tokens(model, PROMPTS[1], 12)
    model.generation_config.eos_token_id = tokens[4]
    cut = tokens.index(tokens[4])
    [c] = generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=12)
    assert list(c.tokens) == stock_tokens(model, PROMPTS[1], 12) == tokens[:cut + 1]
    assert (c.reason, c.prompt_tokens) == ("eos", len(PROMPTS[1]))
    with torch.no_grad():  # the tokenizer's own end of text, made the likeliest token
        h = model.backbone(torch.tensor([PROMPTS[1]])).last_hidden_state[0, -1]
        model.backbone.embeddings.weight[0] = 9 * h / h.norm()
    model.generation_config.eos_token_id = 0
    [c] = generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=12)
    assert (c.tokens, c.text, c.reason) == ((0,), "", "eos")


def test_reasons_and_lengths(tokenizer):
    model = small()
    model.generation_config.eos_token_id = None
    for n in (1, 2, 33):
        done = generate(model, tokenizer, PROMPTS, max_new_tokens=n)
        assert all(c.reason == "length" and len(c.tokens) == n for c in done)
        assert [c.prompt_tokens for c in done] == [len(p) for p in PROMPTS]


def test_stop_strings_are_found_across_tokens_and_trimmed(tokenizer):
    "Every substring of what is written, as a stop string, ends the text where it first stands."
    model = small()
    [free] = generate(model, tokenizer, [PROMPTS[3]], max_new_tokens=30)
    whole = free.text.rstrip("�")
    ends = [(i, j) for i in range(0, len(whole), 5) for j in range(i + 1, min(len(whole), i + 9), 3)]
    assert len(ends) > 10
    for i, j in ends:
        [c] = generate(model, tokenizer, [PROMPTS[3]], max_new_tokens=30, stop=(whole[i:j], "never written"))
        assert c.reason == "stop" and c.text == whole[:whole.index(whole[i:j])]
        assert c.tokens == free.tokens[:len(c.tokens)]
        pieces = list(stream(model, tokenizer, PROMPTS[3], max_new_tokens=30, stop=whole[i:j]))
        assert "".join(pieces) == c.text and all(pieces)


@pytest.mark.parametrize("stop", [("r, no", "er, no"), ("er, no", "r, no")])
def test_the_first_of_two_stop_strings_counts(tokenizer, stop):
    "Both end with the same token, and the text ends before the one that begins first."
    pieces, out = TextPieces(tokenizer, stop), ""
    for token in tokenizer("no wonder, nothing").input_ids:
        if not pieces.stopped: out += pieces.add(token)
    assert pieces.stopped and out == "no wond"


def test_held_back():
    assert [held_back(t, ("###", "\n\nQ:")) for t in ("", "a", "a#", "a##", "#a", "x\n", "x\n\nQ", "x\n\n#")] == [0, 0, 1, 2, 0, 1, 3, 1]
    assert held_back("anything", ()) == 0


# ---------------------------------------------------------------- streams

@given(st.text(max_size=40), st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_text_are_whole_letters_and_join_to_it(written, stop):
    tokenizer = pieces_tokenizer()
    ids = tokenizer(written, add_special_tokens=False).input_ids
    pieces = TextPieces(tokenizer, ("never written",) * stop)
    out = [pieces.add(t, last=i == len(ids) - 1) for i, t in enumerate(ids)]
    assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == written
    if "�" not in written: assert not any("�" in p for p in out)


@given(st.lists(st.integers(0, 280), min_size=1, max_size=30))
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_tokens_join_to_their_text(ids):
    "Half letters and special tokens too."
    tokenizer = pieces_tokenizer()
    pieces = TextPieces(tokenizer)
    out = [pieces.add(t, last=i == len(ids) - 1) for i, t in enumerate(ids)]
    assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_tokenizer(made=[]):
    if not made: made.append(wrap_tokenizer(train_tokenizer(TEXTS, ENTRIES)))
    return made[0]


def test_pieces_with_the_published_tokenizer(data):
    from biomamba.checkpoints import load_tokenizer
    tokenizer = load_tokenizer(data / "tokenizer" / "tokenizer.json")
    for line in list(open(data / "pubmed" / "abstracts.jsonl", encoding="utf-8"))[:40]:
        whole = json.loads(line)["abstract"][:600] + " 😀🧬"
        ids, pieces = tokenizer(whole, add_special_tokens=False).input_ids, TextPieces(tokenizer, ("\n\nQ",))
        out = [pieces.add(t, last=i == len(ids) - 1) for i, t in enumerate(ids)]
        assert "".join(out) == whole and len([p for p in out if p]) > len(ids) / 2


@pytest.mark.parametrize("options", [{}, dict(temperature=1.2, seed=2), dict(stop=("e", "a"), temperature=1.0)], ids=str)
def test_a_stream_joins_to_the_completion(tokenizer, options):
    model = small()
    for prompt in (*PROMPTS, "Patients", ""):
        [c] = generate(model, tokenizer, [prompt], max_new_tokens=30, **options)
        assert "".join(stream(model, tokenizer, prompt, max_new_tokens=30, **options)) == c.text


def test_a_stream_begins_before_the_end(tokenizer, monkeypatch):
    steps, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, batch, ids: (steps.append(1), step(self, batch, ids))[1])
    pieces = stream(small(), tokenizer, PROMPTS[1], max_new_tokens=60)
    next(pieces), next(pieces)
    assert 0 < len(steps) < 30
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    steps_before = len(steps)
    pieces.close()
    assert len(steps) == steps_before


def test_transformers_streamer_shows_the_same_text(tokenizer, capsys):
    model = small()
    ids = torch.tensor([PROMPTS[1]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
                   streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert capsys.readouterr().out.removesuffix("\n") == generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=30)[0].text


# ---------------------------------------------------------------- bad input

def test_bad_input(tokenizer):
    model = small()
    bad = [(["a"], dict(temperature=-1), "temperature is -1"), (["a"], dict(temperature=float("nan")), "temperature is nan"), (["a"], dict(top_k=0), "top_k is 0"),
           (["a"], dict(top_p=1.5), "top_p is 1.5"), (["a"], dict(max_new_tokens=0), "max_new_tokens is 0"), (["a"], dict(batch_size=0), "batch_size is 0"),
           (["a"], dict(stop=("",)), "empty string"), ("a", {}, "one string"), ([""], dict(start=False), "no tokens"), ([[]], {}, "no tokens"),
           (["a"], dict(max_new_tokens=2.5), "2.5"), (["a"], dict(max_new_tokens="5"), "'5'"), (["a"], dict(max_new_tokens=None), "None"), (["a"], dict(temperature="1"), "'1'"),
           (["a"], dict(top_k=2.5), "2.5"), (["a"], dict(stop=3), "stop is"), (["a"], dict(stop=["b", 3]), "stop is"), (["a"], dict(temperature=1e-40), "temperature is 1e-40"),
           (None, {}, "prompts is None"), ([None], {}, "NoneType is neither a text"), ([[1.7]], {}, "neither a text"), (["\ud800"], {}, "neither a text"), ([torch.zeros(2, 2).long()], {}, "neither a text"),
           ([[5, ROWS]], {}, f"token {ROWS}"), ([[-1]], {}, "token -1"), (["a"], dict(max_tokens=5), "max_tokens")]
    for prompts, options, says in bad:
        with pytest.raises(UserError, match=says): generate(model, tokenizer, prompts, **options)
    assert generate(model, tokenizer, []) == []
    assert generate(model, tokenizer, ["a"], max_new_tokens=3, stop=None) == generate(model, tokenizer, ["a"], max_new_tokens=3)


def test_prompts_in_any_sequence(tokenizer):
    model, ids = small(), text(9)
    expected = generate(model, tokenizer, [ids], max_new_tokens=4)
    for prompts in (iter([ids]), ([i for i in ids],), [torch.tensor(ids)], [tuple(ids)]): assert generate(model, tokenizer, prompts, max_new_tokens=4) == expected


def test_a_model_that_recomputes_activations_writes_the_same_while_it_trains(tokenizer):
    model, ids = small(), text(90)
    expected = generate(model, tokenizer, [ids], max_new_tokens=5), prefill(model, torch.tensor([ids]), chunk=20)[0]
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert generate(model, tokenizer, [ids], max_new_tokens=5) == expected[0]
    torch.testing.assert_close(prefill(model, torch.tensor([ids]), chunk=20)[0], expected[1], rtol=0, atol=0)
    assert all(m.gradient_checkpointing and m.training for m in (model.backbone, *model.backbone.layers))


def test_products_in_a_dtype_that_autocast_has_not_are_refused():
    model, ids = small().bfloat16(), torch.tensor([text(5)])
    for work in (lambda: prefill(model, ids, dtype=torch.float32), lambda: Decoder(model, torch.float32), lambda: prefill(model, ids, dtype=torch.float64)):
        with pytest.raises(UserError, match="can be loaded in another"): work()
    assert prefill(model, ids, dtype=torch.bfloat16)[0].isfinite().all()


def test_a_text_is_preceded_by_end_of_text(tokenizer):
    model, ids = small(), tokenizer("no wonder", add_special_tokens=False).input_ids
    a, b, c = generate(model, tokenizer, ["no wonder", [0, *ids], ids], max_new_tokens=10)
    assert a.tokens == b.tokens != c.tokens and a.prompt_tokens == len(ids) + 1
    assert generate(model, tokenizer, ["no wonder"], max_new_tokens=10, start=False)[0].tokens == c.tokens


def test_waiting_is_a_multiple_of_the_taps():
    assert WAITING % recipe("130m").conv == 0 
