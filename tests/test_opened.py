"""Evaluation against a loop over windows, one by one, in NumPy."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ideas import Unmasking
from test_tokenizers import word_piece
from tiny import SIZES, decoder, generate, hidden, ids, log_softmax, loud

from jaxformer.commands import main
from jaxformer.config import Config, Data, Train
from jaxformer.data.batches import Examples
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import Characters, TokenizerFile
from jaxformer.generation import decode
from jaxformer.generation.logits_processors import LogitsProcessor, Temperature, TopK
from jaxformer.learning.objectives import Masked, NextToken, SequenceToSequence
from jaxformer.model.baselines import GRU
from jaxformer.model.implementations import Auto, CuDNN, Plain
from jaxformer.model.kernels import SoftCapped, Softmax
from jaxformer.model.masks import one_document
from jaxformer.model.models import Decoder, Encoder, EncoderDecoder
from jaxformer.run import opened, plan
from jaxformer.run.opened import Run
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError


def test_samples_are_the_text_of_prompt_and_continuation_together(tmp_path):
    """A tokenizer that sets spaces between its tokens sets one after the prompt; and texts end with their end."""
    word_piece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerFile(str(tmp_path / "tokenizer.json")).fit(())
    model = decoder(n_layers=2, vocab_size=7)
    run = Run(Config("run", model, Data()), tokenizer, TrainState(jnp.int32(5), loud(model), ()))
    ids = [1, *tokenizer.encode("play é").tolist()]
    new = generate(model, run.state.params, [ids] * 9, 8, (Temperature(1.0),), 3, end=2)
    expected = []
    for row in new.tolist():
        row = row[: row.index(2)] if 2 in row else row
        expected.append(tokenizer.decode([*ids, *row]))
    assert run.samples("play é", 8, 9, 3) == expected
    assert {len(text) for text in expected} != {len(expected[0])} and any("é play" in text for text in expected)


class Without(LogitsProcessor):
    """A stranger's: some tokens are never drawn."""

    ids: tuple[int, ...]

    def __call__(self, logits, text=None):
        return logits.at[:, jnp.array(self.ids)].set(-jnp.inf)


LETTERS = Characters("\nabcdefghijklmnopqrstuvwxyz", end_token=True)  # 28 ids
FIELDS = {name: value for name, value in SIZES.items() if name != "vocab_size"} | {"n_layers": 1}
WRITERS = {
    "decoder": (Decoder(**FIELDS), NextToken(), jnp.float32),
    "bfloat16": (Decoder(**FIELDS), NextToken(), jnp.bfloat16),
    "gru": (GRU(d_model=84, context_length=23), NextToken(), jnp.float32),
    "encoder-decoder": (EncoderDecoder(**FIELDS), SequenceToSequence(), jnp.float32),
}


@functools.cache
def writer(name):
    model, objective, dtype = WRITERS[name]
    config = Config("run", model, Data(window=23), objective)
    params = jax.tree.map(lambda a: (a / 2).astype(dtype), loud(dataclasses.replace(model, vocab_size=28)))
    return Run(config, LETTERS, TrainState(jnp.int32(5), params, ()))


@pytest.mark.parametrize("name", [*[*WRITERS][:3], pytest.param("encoder-decoder", marks=pytest.mark.slow)])
def test_sample_i_is_the_same_whatever_the_number_asked_for(name):
    """To the last bit of its log-probabilities; past the context of 23, and while other samples end early."""
    run = writer(name)
    many = run.generate("abc", 40, 6, 3)
    for count in (1, 5):
        assert run.generate("abc", 40, count, 3) == many[:count]
    assert len({found.text for found in many}) == 6 and len({len(found.ids) for found in many}) > 1
    assert max(len(found.ids) for found in many) > 23
    pieces = list(run.stream("abc", 40, 3))
    assert "".join(pieces) == run.sample("abc", 40, 3) and len(pieces) > 5
    more = run.generate("abc", 60, 2, 3)
    assert [found.ids[:40] for found in more] == [found.ids for found in many[:2]]


def test_parameters_are_laid_out_once_for_all_texts(monkeypatch):
    """And the texts are those of a sampler that does so for each."""
    run, calls = dataclasses.replace(writer("decoder")), []
    lay = decode._for_decoding
    monkeypatch.setattr(decode, "_for_decoding", lambda *a: (calls.append(1), lay(*a))[1])
    found = [run.generate("abc", 9, 5, seed) for seed in range(2)]
    assert len(calls) == 1
    request = run._asked("abc", 9, 1, (), (), {})[0]
    assert request.prepared[0] is request.params
    request = request._replace(params=jax.tree.map(jnp.copy, request.params))  # which nothing is prepared of
    ids = np.concatenate([part.ids for part in run.sampler(request)], 1)
    assert all(one.ids == row[: len(one.ids)].tolist() for one, row in zip(found[1], ids, strict=False))


def test_text_is_written_in_the_dtype_of_the_computation_but_on_a_cpu(monkeypatch):
    run = writer("decoder")
    halves = dataclasses.replace(run.config.train, compute_dtype="bfloat16")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=halves))
    assert {a.dtype.name for a in jax.tree.leaves(run._prepared)} == {"float32"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = dataclasses.replace(run)
    assert {a.dtype.name for a in jax.tree.leaves(run._prepared)} == {"bfloat16"}
    assert len(run.generate("abc", 9, 1)[0].ids) == 9


def test_what_begins_a_text_is_no_repetition():
    """Where the start is the end, too, a penalty would keep texts from ending; of a prompt the same token counts."""
    run = writer("decoder")
    for prompt, written in ((None, []), ("abc", [1, 2, 3])):
        request, *_ = run._asked(prompt, 4, 0, (), (), {})
        known = decode._known(request.prompts, request.frames, 4)
        assert request.prompts[0] == [LETTERS.end, *written] and known.real.sum(1).tolist() == [1 + len(written)] * 4
        assert np.flatnonzero(known.counts(28)[0]).tolist() == written
        known = known.append(jnp.full(4, LETTERS.end))
        assert np.flatnonzero(known.counts(28)[0]).tolist() == [*written, LETTERS.end]


def test_what_is_known_of_a_text():
    run = writer("decoder")
    free = run.generate("abc", 40, 9, 5)
    stop = next(one.text[5:7] for one in free if len(one.text) > 9)
    found = run.generate("abc", 40, 9, 5, stop=(stop, "nowhere"))
    assert [one.sample for one in found] == [*range(9)] and {one.seed for one in found} == {5}
    assert {one.finish_reason for one in found} == {"end", "stop", "length"}
    for one, other in zip(found, free, strict=True):
        assert one.prompt == "abc" and len(one.ids) == len(one.log_probabilities) and max(one.log_probabilities) < 0
        if one.finish_reason == "stop":
            assert one.text == other.text[: other.text.index(stop)]
            assert one.ids == other.ids[: len(one.ids)] and LETTERS.decode(one.ids) == one.text + stop
        else:
            assert one == other and (one.ids[-1] == LETTERS.end or len(one.ids) == 40)
    assert "".join(run.stream("abc", 40, 5, stop=stop)) == run.sample("abc", 40, 5, stop=stop)
    assert run.generate("abc", 0) == [("abc", "", [], [], "length", 0, 0)] and run.sample("abc", 0) == "abc"
    with pytest.raises(TypeError, match="tempreture"):
        run.sample("abc", tempreture=0.5)


def test_a_stop_text_ends_the_drawing(monkeypatch):
    """Of 300 tokens, those of one stretch are drawn."""
    run, calls = writer("decoder"), []
    draw = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *a: (calls.append(1), draw(*a))[1])
    stop = tuple("abcdefghijklmnopqrstuvwxyz\n")
    assert run.generate("abc", 300, stop=stop)[0].finish_reason in ("stop", "end") and len(calls) <= 1


def sampled(monkeypatch, capsys, *arguments):
    """What `jaxformer sample` prints, and its exit status."""
    monkeypatch.setattr(opened, "open_run", lambda *_: writer("decoder"))
    status = main.run("sample", ["run", *arguments])
    return (status, *capsys.readouterr())


def test_the_command(monkeypatch, capsys):
    free = writer("decoder").generate("abc", 40, 3, 5, repetition_penalty=1.7)
    stop = free[0].text[3:5], free[1].text[3:5]
    how = ["--prompt=abc", "--tokens=40", "--seed=5", f"--stop={stop[0]}", "--stop", stop[1]]
    how += ["--repetition_penalty=1.7"]
    expected = writer("decoder").generate("abc", 40, 3, 5, stop=stop, repetition_penalty=1.7)
    assert [one.finish_reason for one in expected[:2]] == ["stop"] * 2
    status, plain, _ = sampled(monkeypatch, capsys, *how, "--samples=3")
    assert status == 0 and plain == "\n---------------\n".join("abc" + one.text for one in expected) + "\n"
    assert plain != sampled(monkeypatch, capsys, *how[:-1], "--samples=3")[1]
    _, rows, _ = sampled(monkeypatch, capsys, *how, "--samples=3", "--json")
    assert [json.loads(row) for row in rows.splitlines()] == [one._asdict() for one in expected]
    assert sampled(monkeypatch, capsys, *how, "--stream")[1] == "abc" + expected[0].text + "\n"


def test_a_device_without_room_is_told_in_a_sentence(monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand much more")

    monkeypatch.setattr(opened, "open_run", full)
    assert main.run("sample", ["run"]) == 1
    sentence = (
        "not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); make the batch, the window or"
    )
    assert sentence in (error := capsys.readouterr().err) and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--repetition_penalty=0", "repetition_penalty=0.0 must be more than 0; 1 changes nothing"),
        ("--repetition_penalty=-1", "repetition_penalty=-1.0 must be more than 0"),
        ("--stop=", "stop='' must not be empty; give the text before which to end"),
        ("--stream --samples=2", "stream must not be given beside samples=2: it prints one text alone; leave one"),
        ("--stream --json", "stream must not be given beside json: it prints one text alone; leave one of them out"),
        ("--stream --tokens=-1", "tokens=-1 must be at least 0"),
    ],
)
def test_what_the_command_refuses(arguments, sentence, monkeypatch, capsys):
    status, out, error = sampled(monkeypatch, capsys, *arguments.split())
    assert (status, out) == (2, "") and sentence in error


def test_what_is_asked_of_a_run_in_python_is_checked(trained):
    with pytest.raises(InputError, match=r"top_k=0 must be at least 1"):
        trained.sample("a", processors=(TopK(0),))
    config = dataclasses.replace(trained.config, data=Data(sampling=Examples(joined=True)))
    with pytest.raises(InputError, match="2 second texts must be as many as the 1 first ones"):
        dataclasses.replace(trained, config=config).predict(["a"], ["b", "c"])


def test_a_sampler_of_a_strangers_draws_texts_of_an_encoder():
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz", mask_token=True)
    fields = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = Config("run", Encoder(**fields), objective=Masked(), sampler=Unmasking(3))
    model = dataclasses.replace(config.model, vocab_size=27)
    run = Run(config, tokenizer, TrainState(jnp.int32(5), loud(model), ()))
    one, other = run.samples("abc", 7, 2, processors=(Without((26,)),))  # 26 is the mask, which has no text
    assert [one, other] == run.samples("abc", 7, 2, processors=(Without((26,)),)) and one != other
    assert all(text.startswith("abc") and len(text) == 10 for text in (one, other))
    assert run.generate("abc", 7)[0].log_probabilities is None  # this sampler tells none
    with pytest.raises(InputError, match="its model writes no text"):
        dataclasses.replace(run, config=dataclasses.replace(config, sampler=None)).samples("abc", 7)


@pytest.mark.parametrize("length", [2, 7, 50, 99])
def test_evaluation_is_the_mean_over_all_tokens_but_the_first(length):
    model = decoder(n_layers=2, dropout=0.5)
    params, tokens = loud(model), np.asarray(ids(length))
    nats = []
    for start in range(0, length - 1, 11):
        window = tokens[start : start + 12]
        h, _ = hidden(model, params, jnp.asarray(window[None, :-1]), one_document(len(window) - 1))
        log_p = log_softmax(model.logits(params, h)[0])
        nats += (-log_p[np.arange(len(window) - 1), window[1:]]).tolist()
    tokenizer = Characters("".join(map(chr, range(65, 90))) + "\u00e4\u00f6\u00fc\u732b")  # 1, 2 and 3 bytes
    run = Run(Config("run", model, Data(batch_size=3, window=11)), tokenizer, TrainState(jnp.int32(5), params, ()))
    row = run.evaluate(Source(tokens, np.zeros(1, np.int64)))
    assert (row["step"], row["split"], row["tokens"]) == (5, "valid", length - 1)
    assert row["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    n_bytes = len(tokenizer.decode(tokens[1:]).encode())
    assert row["bits_per_byte"] == pytest.approx(np.sum(nats) / n_bytes / np.log(2), rel=1e-5)


def test_an_evaluation_takes_as_many_rows_as_a_slice(monkeypatch):
    """What fits in training fits here."""
    model, tokens, seen, found = decoder(n_layers=1), np.asarray(ids(99)), [], []
    judge = plan.evaluate_batch
    monkeypatch.setattr(plan, "evaluate_batch", lambda *a: (seen.append(a[2]["tokens"].shape), judge(*a))[1])
    for accumulation in (1, 3):
        config = Config("run", model, Data(batch_size=6, window=11), train=Train(accumulation=accumulation))
        run = Run(config, Characters("".join(map(chr, range(65, 94)))), TrainState(jnp.int32(5), loud(model), ()))
        found.append(run.evaluate(Source(tokens, np.zeros(1, np.int64)))["loss"])
    assert set(seen) == {(6, 12), (2, 12)} and found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(("count", "why"), [(1, "1 token cannot be predicted"), (5, "of 5 tokens objective=NextToken")])
def test_an_evaluation_that_asks_for_nothing_is_refused(trained, monkeypatch, count, why):
    monkeypatch.setattr(opened, "evaluate", lambda *_: [{"loss": math.nan, "tokens": 0}])
    with pytest.raises(InputError, match=why):
        trained.evaluate(Source(np.arange(count), np.zeros(1, np.int64)))


def test_what_an_evaluation_cuts_is_told(trained, caplog):
    config = dataclasses.replace(trained.config, data=dataclasses.replace(trained.config.data, sampling=Examples()))
    source = Source(np.asarray(ids(40)), np.array([0, 9, 30]), examples=True)
    dataclasses.replace(trained, config=config).evaluate(source)
    assert "valid: 1 of 3 examples are longer than data.window=11, and are cut" in caplog.messages


def test_a_run_of_an_implementation_that_is_not_here_is_opened(trained, caplog):
    told = "implementation=CuDNN of attention: it needs an NVIDIA GPU; this is cpu; Auto takes its place"
    kernels = Softmax(implementation=CuDNN()), SoftCapped(implementation=Plain())
    for kernel, found in ((kernels, [Auto, Plain]), (kernels[1], [Plain])):
        config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, kernel=kernel))
        caplog.clear()
        here = opened._here(config).model.kernel
        assert caplog.messages == ([told] if Auto in found else [])
        assert [type(each.implementation) for each in (here if isinstance(here, tuple) else (here,))] == found


@pytest.fixture
def trained(tmp_path):
    """A run with rows, whose state is that of step 5."""
    (tmp_path / "metrics.jsonl").write_text(
        """{"step": 4, "split": "train", "loss": 3.25}
        {"step": 5, "split": "valid", "loss": 3.125}
        {"step": 6, "split": "train", "loss": 3.0}
        {"step": 6, "split": "valid", "loss": 2.5}
        """
    )
    model = decoder(n_layers=2)
    state = TrainState(jnp.int32(5), loud(model), ())
    config = Config(str(tmp_path), model, Data(batch_size=3, window=11), train=Train(steps=1000))
    return Run(config, Characters("".join(map(chr, range(65, 94)))), state)


def test_a_run_is_told_in_a_line(trained):
    count = sum(array.size for array in jax.tree.leaves(trained.state.params))
    where = trained.config.directory
    start = f"<Run {where}: Decoder, {count:,} parameters, step 5 of 1,000"
    assert repr(trained) == f"{start}, validation loss 3.1250>"
    elsewhere = dataclasses.replace(trained, config=dataclasses.replace(trained.config, directory="nowhere"))
    assert repr(elsewhere) == f"{start}>".replace(where, "nowhere")
    later = dataclasses.replace(trained, state=trained.state.replace(step=jnp.int32(7)))  # not evaluated since
    assert repr(later) == f"{start}>".replace("step 5", "step 7")


def test_the_curve_of_a_run_is_that_of_its_rows(trained):
    (axes,) = trained.plot().axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert curves == {"training": [[4, 3.25], [6, 3.0]], "validation": [[5, 3.125], [6, 2.5]]}
    assert axes.get_title() == trained.config.directory
    with pytest.raises(InputError, match=r"nowhere: there are no rows in metrics\.jsonl to plot; train first"):
        dataclasses.replace(trained, config=dataclasses.replace(trained.config, directory="nowhere")).plot()
