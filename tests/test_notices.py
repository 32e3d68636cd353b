"""What a run says when it starts, and how runs that began before a change of defaults go on."""

import dataclasses
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, Train
from jaxformer import config as config_lib
from jaxformer.data.batches import Examples, PackedDocuments
from jaxformer.data.corpora import Mixture, TextFiles, TextLines
from jaxformer.data.dialogues import Dialogues
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import Bytes, Characters
from jaxformer.generation.decode import Drawn, LeftToRight
from jaxformer.learning.objectives import Classification, NextToken, PrefixLM
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WSD, Constant, WarmupCosine, WarmupLinear
from jaxformer.model.baselines import Bigram
from jaxformer.model.heads import ClassificationHead, MultiLabelHead
from jaxformer.model.implementations import Blocked
from jaxformer.model.kernels import Softmax, Uniform
from jaxformer.model.positions import Learned, Rotary
from jaxformer.run import notices, warm_start
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter
from jaxformer.run.checks import _tell_of_templates, checked_data
from jaxformer.run.dry_run import dry_run
from jaxformer.run.manifest import sha256
from jaxformer.run.plan import prepare_data
from jaxformer.run.warm_start import _otherwise, tell_other_beginnings
from jaxformer.spec import InputError

SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 14, "d_ff": 11}
TRAIN = Train(steps=20, steps_per_call=5, log_every=5, eval_every=20, save_every=10, sample_tokens=0)


class Fixed(LeftToRight):
    """Draws one token, and no other."""

    id: int = 0

    def __call__(self, request):
        yield Drawn(np.full((len(request.prompts), request.tokens), self.id, np.int32))


def text(tmp_path, corpus=None, **data):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{i} and {i}\n" for i in range(101)))
    data = Data(corpus or TextFiles(str(path)), batch_size=3, **data)
    optimizer = AdamW(Constant(3e-3))
    return Config(str(tmp_path / "run"), Decoder(**SIZES, context_length=7), data, optimizer=optimizer, train=TRAIN)


def table(tmp_path, **fields):
    """Sorted by class: 90 neg, 90 pos, 20 mixed."""
    kinds = [("neg", 90), ("pos", 90), ("mixed", 20)]
    lines = [f"{kind[0]} {i},{kind}\n" for kind, count in kinds for i in range(count)]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(lines))
    data = Data(Table(str(tmp_path / "t.csv"), labels=("label",)), sampling=Examples(), batch_size=7, **fields)
    model = Encoder(**SIZES, context_length=13, head=ClassificationHead("label"))
    optimizer = AdamW(WarmupCosine(peak=3e-3, final=1e-4, warmup_steps=100))
    return Config(str(tmp_path / "run"), model, data, Classification(), optimizer, TRAIN)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- a beginning


def test_a_model_that_computes_otherwise_than_what_it_begins_with_says_so():
    same = {"dropout": 0.3, "unroll": 1, "context_length": 99, "head": ClassificationHead("label")}
    old = Decoder(**SIZES, context_length=7)
    other = {"position": Rotary(base=50.0), "kernel": Softmax(scale=0.1, implementation=Blocked())}
    blocked = Softmax(implementation=Blocked())
    two = [Decoder(**SIZES, context_length=7, kernel=(Softmax(), kernel)) for kernel in (Softmax(), blocked)]
    assert _otherwise(*two) == []
    several = [Decoder(**SIZES, context_length=7, position=(Learned(decay=decay), Rotary())) for decay in (True, False)]
    assert _otherwise(*several) == []
    assert _otherwise(old, Decoder(**SIZES | same)) == []
    assert _otherwise(old, Decoder(**SIZES | same | other)) == [
        "model.position was Learned and is Rotary",
        "model.kernel.scale was None and is 0.1",
    ]
    assert _otherwise(old, Encoder(**SIZES, context_length=7)) == ["model was Decoder and is Encoder"]


def test_dialogues_that_are_written_in_several_ways_are_told(caplog):
    own = Dialogues("a.jsonl", template="{{ messages }}", system="Be brief.")
    for valid, count in ((None, 0), (dataclasses.replace(own, path="b.jsonl"), 0), (Dialogues("b.jsonl"), 2)):
        caplog.clear()
        _tell_of_templates(Config("run", Decoder(**SIZES, context_length=7), Data(own, valid=valid)))
        assert [message.split()[4] for message in warnings_of(caplog)] == ["template,", "system,"][:count]


def test_runs_that_began_with_other_parameters_are_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(warm_start, "has_checkpoint", lambda place: place.name != "anew")
    names = "same", "other", "anew", "new"
    configs = [Config(str(tmp_path / name), Decoder(**SIZES, context_length=7)) for name in names]
    for name in names[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "init_from.json").write_text(json.dumps({"taken_sha256": name}))
    tell_other_beginnings(configs, {"run": "runs/base", "taken_sha256": "same"})
    assert warnings_of(caplog) == [
        f"runs/base has trained on since {tmp_path / 'other'} began with it: new runs begin otherwise"
    ]


# --- the split


def test_a_sorted_table_is_validated_on_all_of_its_classes(tmp_path, caplog):
    """20 % of 90, 90 and 20."""
    config = table(tmp_path, valid_fraction=0.2)
    prepared = prepare_data(config)
    names = [prepared.classes["label"][i] for i in prepared.valid[0].labels["label"]]
    assert sorted(names) == ["mixed"] * 4 + ["neg"] * 18 + ["pos"] * 18
    jaxformer.train(config, {"train.steps": 5})
    assert not [message for message in warnings_of(caplog) if "there is no example" in message]
    last = prepare_data(dataclasses.replace(config, data=dataclasses.replace(config.data, split_seed=None)))
    assert set(last.valid[0].labels["label"]) == {
        last.classes["label"].index("mixed"),
        last.classes["label"].index("pos"),
    }


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_class_that_is_missing_on_one_side_is_told(tmp_path, caplog, several):
    config = table(tmp_path, split_seed=None)
    if several:
        corpus = dataclasses.replace(config.data.corpus, several=("label",))
        model = dataclasses.replace(config.model, head=MultiLabelHead("label"))
        config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, corpus=corpus))
    jaxformer.train(config, {"train.steps": 5})
    told = [message for message in warnings_of(caplog) if "there is no example" in message]
    assert told == [
        "'label': there is no example to train on of mixed",
        "'label': there is no example to validate on of neg, pos",
    ]


def test_products_of_halves_are_told_and_want_units(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    how = {"train.product_dtype": "bfloat16", "train.steps": 1}
    for i, features in enumerate((["avx2"], ["avx512_bf16"], [])):  # []: not known
        caplog.clear()
        monkeypatch.setattr(notices, "features", lambda found=features: found)
        jaxformer.train(text(tmp_path), how, directory=tmp_path / f"run{i}")
        assert "parameters float32, compute float32, products bfloat16" in caplog.text
        assert any("this processor has no units" in message for message in warnings_of(caplog)) == (i == 0)
    with pytest.raises(InputError, match=r"product_dtype=bfloat16 must be None beside train\.compute_dtype=float16"):
        jaxformer.train(text(tmp_path), how | {"train.compute_dtype": "float16"}, directory=tmp_path / "none")
    with pytest.raises(
        InputError, match="product_dtype=bfloat16 must be None: model=Bigram has no products that it makes"
    ):
        jaxformer.train(text(tmp_path), how | {"model": "Bigram"}, directory=tmp_path / "none")


def test_a_column_that_only_training_has_is_not_counted_elsewhere(tmp_path, caplog):
    config = table(tmp_path)  # which writes a t.csv of its own
    lines = {"t": "text,label,mood\n" + "one,a,x\ntwo,b,y\n" * 9, "v": "text,label\n" + "one,a\ntwo,a\n"}
    for name, text in lines.items():
        (tmp_path / f"{name}.csv").write_text(text)
    corpora = (
        Table(str(tmp_path / "t.csv"), labels=("label", "mood")),
        Table(str(tmp_path / "v.csv"), labels=("label",)),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid=corpora[1]))
    jaxformer.train(
        dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=corpora[0])), {"train.steps": 1}
    )
    told = [message for message in warnings_of(caplog) if "there is no example" in message]
    assert told == ["'label': there is no example to validate on of b"]


def test_windows_are_validated_on_the_end_and_documents_drawn_if_there_are_some(tmp_path):
    config = text(tmp_path)
    (valid,) = prepare_data(config).valid
    assert (
        Characters(alphabet=prepare_data(config).tokenizer.alphabet).decode(valid.tokens[-11:])
        == "100 and 100"[0:0] + "00 and 100\n"
    )
    lines = TextLines(str(tmp_path / "lines.txt"))
    packed = text(tmp_path, lines, tokenizer=Bytes(end_token=True), sampling=PackedDocuments())
    (valid,) = prepare_data(packed).valid
    assert valid.picked is not None and len(valid.starts) == 10 and np.diff(valid.starts).max() > 20
    few = text(tmp_path, tokenizer=Bytes(end_token=True), sampling=PackedDocuments())  # one document
    (valid,) = prepare_data(few).valid
    assert valid.picked is None and len(valid.tokens) > 50


# --- documents without an end


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "has no id that ends a text: the 9. documents run together; set data.tokenizer.end_token=true"),
        (
            {"sampling": PackedDocuments()},
            "where a document ends is not learned, and samples do not end; set data.tokenizer",
        ),
        pytest.param({"tokenizer": Characters(end_token=True)}, None, marks=pytest.mark.slow),
        ({"tokenizer": Characters(end_token=True), "sampling": PackedDocuments()}, None),
        ({"corpus": None}, None),
    ],
)
def test_documents_that_run_together_are_told_once(tmp_path, caplog, fields, told):
    """`TextLines` of names with `Characters()` would learn emmaoliviaava."""
    fields = {"corpus": TextLines(str(tmp_path / "lines.txt"))} | fields
    jaxformer.train(text(tmp_path, **fields), {"train.steps": 5})
    found = [message for message in warnings_of(caplog) if "data.tokenizer" in message]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0]), found


@pytest.mark.parametrize(("other", "told"), [("talks.jsonl", False), ("lines.txt", True)])
def test_dialogues_end_as_their_template_has_it_also_in_a_mixture(tmp_path, caplog, other, told):
    """Of other texts that need an end in the same mixture it is told."""
    talk = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two!"}]}
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps(talk)}\n" * 20)
    parts = [
        (Dialogues if name == "talks.jsonl" else TextLines)(str(tmp_path / name)) for name in ("talks.jsonl", other)
    ]
    checked_data(text(tmp_path, Mixture((*parts,), (0.5, 0.5))))
    assert any("run together" in message for message in warnings_of(caplog)) == told


@pytest.mark.parametrize("objective", [PrefixLM(), pytest.param(NextToken(), marks=pytest.mark.slow)])
def test_pairs_without_an_end_between_them_are_refused(tmp_path, objective):
    """(ab, c) and (a, bc) would be one row."""
    (tmp_path / "p.csv").write_text("q,a\n" + "".join(f"{i}?,{i * i}\n" for i in range(31)))
    pairs = Table(str(tmp_path / "p.csv"), "q", "a")
    config = dataclasses.replace(text(tmp_path, pairs, sampling=Examples(joined=True)), objective=objective)
    with pytest.raises(
        InputError, match=r"\(ab, c\) and \(a, bc\) would be the same row; set data.tokenizer.end_token=true"
    ):
        jaxformer.train(config)
    assert not (tmp_path / "run").exists()
    jaxformer.train(config, {"data.tokenizer.end_token": True, "train.steps": 5})


# --- schedules


def rate_at(schedule, step, steps):
    return float(schedule(jnp.int32(step), jnp.int32(steps)))


@pytest.mark.parametrize("kind", [WarmupLinear, WarmupCosine, WSD])
def test_a_warm_up_as_long_as_the_run_is_a_tenth_of_it(kind):
    """100 of 80 steps become 8; a shorter one stays; without `shortens` both do."""
    long, short = kind(peak=1.0, final=0.1, warmup_steps=100), kind(peak=1.0, final=0.1, warmup_steps=8)
    for step in range(81):
        assert rate_at(long, step, 80) == rate_at(short, step, 80)
    assert rate_at(long, 80, 80) == pytest.approx(0.1) and rate_at(long, 8, 80) == 1.0
    assert rate_at(long, 99, 101) == pytest.approx(100 / 101)
    kept = dataclasses.replace(long, shortens=False)
    assert rate_at(kept, 79, 80) == pytest.approx(80 / 101) and kept.notice(80) is None
    assert long.notice(80) == "warmup_steps=100 is too long for a run of 80 steps: it is shortened to 8"
    assert long.notice(100) and long.notice(101) is None and Constant().notice(1) is None


def test_a_shortened_warm_up_is_told_once_and_an_extended_run_says_both_rates(tmp_path, caplog):
    config = dataclasses.replace(text(tmp_path), optimizer=AdamW(WarmupCosine(peak=1e-2, final=1e-3, warmup_steps=50)))
    dry_run(config)
    assert len(warnings_of(caplog)) == 1
    caplog.clear()
    jaxformer.train(config)
    notice = "optimizer.learning_rate.warmup_steps=50 is too long for a run of 20 steps: it is shortened to 2"
    assert warnings_of(caplog).count(notice) == 1
    caplog.clear()
    jaxformer.train(config, {"train.steps": 30})
    (told,) = (message for message in warnings_of(caplog) if message.startswith("train.steps"))
    rates = [rate_at(config.optimizer.learning_rate, *at) for at in ((19, 20), (20, 30))]
    at = f"the learning rate goes from {rates[0]:.3g} at step 20 to {rates[1]:.3g} at step 21"
    assert told == f"train.steps was 20 and is 30 from here on; {at}" and abs(rates[0] - rates[1]) > 1e-4
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {row["step"]: row["learning_rate"] for row in logged if row["split"] == "train"}
    assert logged[20] == pytest.approx(rates[0]) and f"{rates[0]:.3g}" in told


def test_another_sampler_is_no_other_run(tmp_path, caplog):
    """It shows its texts along the way, and does not make the training."""
    config = text(tmp_path)
    shown = {"train.steps": 20, "train.sample_tokens": 3}
    caplog.set_level(logging.INFO)
    whole = jaxformer.train(config, shown, tmp_path / "whole")
    jaxformer.train(config, {"train.steps": 10, "sampler": "test_notices:Fixed", "sampler.id": "7"})
    run = jaxformer.train(config, {**shown, "sampler": Fixed(9)})
    assert sha256(run.state) == sha256(whole.state) and run.tokenizer.decode([9] * 3) in caplog.text
    assert jaxformer.open_run(tmp_path / "run").sample(tokens=3) == run.tokenizer.decode([9] * 3)


# --- runs of before


def as_of_format_1(directory):
    """A run as it was stored before there were formats and manifests: by the record of then beside each state."""
    path = directory / "config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("format") == 4 and stored["data"].pop("valid_tokens") is None
    assert stored["optimizer"]["learning_rate"].pop("shortens") is False
    path.write_text(json.dumps(stored))
    for manifest in (directory / "checkpoints").glob("*/manifest.json"):
        step = manifest.parent
        state = jaxformer.open_run(directory, int(step.name)).state
        record = {"state_sha256": sha256(state), "rank": json.loads(manifest.read_text())["rank"]}
        (step / "info").mkdir()
        (step / "info" / "metadata").write_text(json.dumps(record))
    for manifest in (directory / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()


def test_a_run_of_before_keeps_its_split_and_its_warm_up(tmp_path, caplog):
    """The same command goes on with it, again and again, to the bits that it would have had."""
    config = table(tmp_path, split_seed=None)
    rate = dataclasses.replace(config.optimizer.learning_rate, shortens=False)
    old = dataclasses.replace(config, optimizer=AdamW(rate))
    whole = jaxformer.train(old, {"train.steps": 40}, tmp_path / "whole")
    jaxformer.train(old, {"train.steps": 10})
    as_of_format_1(tmp_path / "run")
    now = table(tmp_path)  # which draws its split and shortens its warm-up
    caplog.clear()
    for steps in (20, 40):
        run = jaxformer.train(now, {"train.steps": steps})
    assert sha256(run.state) == sha256(whole.state) and "warmup" not in caplog.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["format"] == 1
    assert run.evaluate() == whole.evaluate()
    assert jaxformer.open_run(tmp_path / "run").evaluate()["examples"] == 20
    with pytest.raises(InputError, match=r"data.split_seed was None and is 3"):
        jaxformer.train(now, {"data.split_seed": 3})


def test_a_step_of_before_is_opened_checked_and_ranked(tmp_path):
    old = dataclasses.replace(table(tmp_path, split_seed=None), optimizer=AdamW(WarmupCosine(shortens=False)))
    state = jaxformer.train(old).state
    as_of_format_1(tmp_path / "run")
    directory = tmp_path / "run" / "checkpoints"
    assert Checkpoints(directory).best()[0] == 20 and sha256(jaxformer.open_run(tmp_path / "run").state) == sha256(
        state
    )
    writer = CheckpointWriter(directory, 9)
    writer.add_rank(10, -5.0)
    writer.close()
    assert Checkpoints(directory).best() == (10, -5.0) and not (directory / "10" / "manifest.json").exists()
    record = directory / "20" / "info" / "metadata"
    record.write_text(record.read_text().replace('state_sha256": "', 'state_sha256": "0'))
    with pytest.raises(InputError, match="is damaged"):
        jaxformer.open_run(tmp_path / "run", 20)


def test_a_format_of_the_future_is_refused(tmp_path):
    path = tmp_path / "config.json"
    config_lib.save(text(tmp_path), path, 9)
    with pytest.raises(InputError, match="format=9 must be at most 4; take the jaxformer that wrote it"):
        config_lib.read(path)


# --- code, devices, readers

HELP = "def same(x):\n    return x * 1\n"
MODULE = """
from edited_help import same
from jaxformer.model.positions import NoPosition
from jaxformer.model.kernels import Softmax

FACTOR = 1.0


class Decay(NoPosition):
    def bias(self, params, view, new, seen):
        return same(-0.5 * FACTOR * view.distance())


class Same(Softmax):
    pass
"""


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        pytest.param(("-0.5", "-0.7"), "edited_parts:Decay", marks=pytest.mark.slow),
        pytest.param(("= 1.0", "= 1.5"), "edited_parts", marks=pytest.mark.slow),
        (("x * 1", "x * 2"), "edited_help"),
        pytest.param(("", ""), None, marks=pytest.mark.slow),
    ],
)
def test_code_that_was_edited_is_named_when_a_run_goes_on(tmp_path, monkeypatch, caplog, edit, named):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "edited_parts.py").write_text(MODULE)
    (tmp_path / "edited_help.py").write_text(HELP)
    overrides = {"model.position": "edited_parts:Decay", "model.kernel": "edited_parts:Same"}

    def go_on(steps):
        for name in ("edited_parts", "edited_help"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        importlib.import_module("linecache").checkcache()
        jaxformer.train(text(tmp_path), overrides | {"train.steps": steps})

    go_on(10)
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text().splitlines()[-1])
    assert set(start["sources"]) == {"edited_help", "edited_parts", "edited_parts:Decay", "edited_parts:Same"}
    for name, code in (("edited_parts", MODULE), ("edited_help", HELP)):
        (tmp_path / f"{name}.py").write_text(code.replace(*edit) if edit[0] else code)
        os.utime(tmp_path / f"{name}.py", ns=(1, 1))
    for steps in (15, 20):  # told once: the next start compares with this one
        caplog.clear()
        go_on(steps)
        told = [message for message in warnings_of(caplog) if "the code has changed" in message]
        assert [message.split(": ")[0] for message in told] == ([named] if named and steps == 15 else [])


@pytest.mark.slow
def test_of_attention_is_told_where_there_is_some(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    told = {}
    models = {
        "decoder": Decoder(**SIZES, context_length=7, kernel=(Uniform(), Softmax())),
        "feed-forward alone": Decoder(**SIZES, context_length=7, kernel=None),
        "bigram": Bigram(context_length=7),
    }
    for name, model in models.items():
        caplog.clear()
        config = dataclasses.replace(text(tmp_path), model=model, directory=str(tmp_path / name))
        jaxformer.train(config, {"train.steps": 1} | ({"model.n_layers": 2} if name == "decoder" else {}))
        told[name] = [message for message in caplog.messages if message.startswith("attention")]
    assert told == {"decoder": [f"{'attention':10} Softmax, Uniform"], "feed-forward alone": [], "bigram": []}


@pytest.mark.slow
def test_the_devices_that_are_used_are_told_and_those_that_are_idle(tmp_path):
    text(tmp_path)
    code = "import jaxformer; from jaxformer import *; import logging; logging.getLogger('jaxformer').setLevel(20)\n"
    code += "from jaxformer.data.corpora import TextFiles\n"
    code += (
        "c = Config('run', Decoder(n_layers=1, n_heads=1, d_model=2, context_length=3), Data(TextFiles('lines.txt')),"
    )
    code += " train=Train(steps=2, sample_tokens=0))\njaxformer.train(c)\n"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(r"device +1 × cpu \(", done.stderr) and "4 × cpu" not in done.stderr
    assert "3 of 4 devices are idle; --mesh.fsdp=-1 or --mesh.data=-1 takes them all" in done.stderr
    (start,) = map(json.loads, (tmp_path / "run" / "starts.jsonl").read_text().splitlines())
    assert len(start["devices"]) == 1 and start["idle_devices"] == 3


@pytest.mark.slow
def test_a_run_is_opened_while_it_trains(tmp_path):
    """Each save replaces the one before; whoever reads a step keeps it, and what is gone is no damage."""
    run = jaxformer.train(text(tmp_path), {"train.steps": 5})
    directory, stop = tmp_path / "run" / "checkpoints", threading.Event()
    writer, step = CheckpointWriter(directory, 1), 5

    def train():
        nonlocal step
        while not stop.is_set():
            step += 1
            writer.save(run.state, step)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        found = [jaxformer.open_run(run.config.directory) for _ in range(25)]
    finally:
        stop.set()
        thread.join()
        writer.close()
    assert all(sha256(each.state) == sha256(run.state) for each in found) and step > 15
    assert Checkpoints(directory).steps() == [5, step]  # the best, the newest, and none set aside
    assert not list(directory.glob("*.damaged"))


def test_what_vanishes_while_it_is_read_is_gone_and_not_damaged(tmp_path, monkeypatch, caplog):
    """A newer step has come: it is taken, and nothing is said."""
    import shutil

    from jaxformer.run import checkpoint

    run = jaxformer.train(text(tmp_path))
    directory = tmp_path / "run" / "checkpoints"
    shutil.copytree(directory / "20", tmp_path / "30")
    restore, calls = checkpoint.ocp.Checkpointer.restore, []

    def vanish(self, path, *a, **k):
        calls.append(Path(path).name)
        if len(calls) == 1:
            (tmp_path / "30").rename(directory / "30")
            checkpoint._remove(directory / "20")
        return restore(self, path, *a, **k)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", vanish)
    caplog.clear()
    assert sha256(jaxformer.open_run(tmp_path / "run").state) == sha256(run.state)
    assert calls == ["20", "30"] and not warnings_of(caplog)


def test_a_step_without_a_manifest_is_none(tmp_path):
    """Orbax may have been killed before the manifest was written; the run comes to that step again."""
    whole = jaxformer.train(text(tmp_path))
    (tmp_path / "run" / "checkpoints" / "20" / "manifest.json").unlink()
    assert int(jaxformer.open_run(tmp_path / "run").state.step) == 10
    assert sha256(jaxformer.train(text(tmp_path)).state) == sha256(whole.state)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [10, 20]
