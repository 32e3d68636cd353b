import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
import tiny

from jaxformer.config import Config, Data, Train, differences, may_change, read, resolve
from jaxformer.data.corpora import Mixture, PythonTopics, TextLines, TinyShakespeare
from jaxformer.declarations import Declared, is_declared, map_declared
from jaxformer.learning.guards import Guard
from jaxformer.learning.optimizers import SGD, AdamW, Optimizer, decayed
from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.model.implementations import Blocked, Plain
from jaxformer.model.kernels import SoftCapped, Softmax
from jaxformer.model.masks import Bidirectional, Causal, Window
from jaxformer.model.models import Decoder
from jaxformer.model.positions import Learned, Position, Rotary
from jaxformer.overrides import field_comments, listing, override
from jaxformer.run.dry_run import dry_run
from jaxformer.spec import (
    InputError,
    Spec,
    checked,
    dumps,
    from_json,
    known_specs,
    to_json,
)
from jaxformer.writers import TensorBoard, WandB

HOSTILE = ["os:system", "subprocess:Popen", "antigravity:x", "builtins:eval", "this:s", "jaxformer.commands.main:main"]


class Twice(Softmax):
    pass


Other = type("Twice", (Softmax,), {"__module__": "elsewhere"})


class NoUpdates(Optimizer):
    """A stranger's, who has forgotten something."""


class EmbedsPerLayer(Learned):
    per_layer = True


CONFIG = Config(
    "runs/a", Decoder(12, 7, n_layers=2, n_heads=3, mask=(Window(5), Causal()), position=outside.LearnedPace())
)


def test_numbers_are_leaves_and_the_rest_is_structure():
    assert len(jax.tree.leaves(AdamW())) == 7  # five numbers and the schedule's two
    assert len(jax.tree.leaves(AdamW(clip=None))) == 6
    assert jax.tree.structure(AdamW(b1=0.5)) == jax.tree.structure(AdamW())
    assert jax.tree.structure(WarmupCosine(warmup_steps=3)) != jax.tree.structure(WarmupCosine())
    assert hash(AdamW()) == hash(AdamW()) and AdamW() == AdamW()


def test_a_whole_number_where_a_float_belongs_is_cast():
    spec = checked(AdamW(weight_decay=0))
    assert type(spec.weight_decay) is float


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.n_layer", "3", "model.n_layer: Decoder has no such field; did you mean n_layers?"),
        ("modle.n_layers", "3", "did you mean model?"),
        ("seed", "1", "seed: Config has no such field; did you mean --train.seed?"),
        ("seed", 1, "did you mean train.seed?"),  # from Python
        ("n_layers", "3", "did you mean --model.n_layers?"),
        ("n_layer", "3", "did you mean --model.n_layers?"),
        ("lr", "1e-3", "did you mean --optimizer.learning_rate.peak?"),
        ("train.lr", "1e-3", "train.lr: Train has no such field; did you mean --optimizer.learning_rate.peak?"),
        ("learning_rate", "Constant", "did you mean --optimizer.learning_rate?"),
        ("eps", "1e-9", "did you mean --model.norm.eps or --optimizer.eps?"),
        ("size", "3", "did you mean --model.mask.0.size?"),
        (
            "optimizer.learning_rate",
            "1e-3",
            "optimizer.learning_rate=1e-3: a part is no number; give a field of it, "
            "optimizer.learning_rate.peak or optimizer.learning_rate.final",
        ),
        (
            "data.corpus",
            "notes.txt",
            "is a path, and must be a class; give --data.corpus=TextFiles --data.corpus.path=notes.txt",
        ),
        ("data.corpus", "a/b.jsonl.gz", "give --data.corpus=JSONLines --data.corpus.path=a/b.jsonl.gz"),
        ("data.tokenizer", "tokenizer.json", "give --data.tokenizer=TokenizerFile --data.tokenizer.path=tokenizer"),
        ("model.kernel", "my_module.Sink", "a module with a colon; give --model.kernel=my_module:Sink"),
        ("model.kernel", "a/b.py", "model.kernel='a/b.py' must be one of "),
        ("train.steps", "1e-3", "train.steps='1e-3' must be a whole number"),
        ("model.n_layers", "three", "model.n_layers='three' must be a whole number"),
        ("model.n_layers", 2.5, "model.n_layers=2.5 must be a whole number"),
        ("model.n_layers", True, "model.n_layers=True must be a whole number"),
        pytest.param(
            "model.n_layers",
            10**5000,
            "model.n_layers is a whole number of 16610 bits, and must be less than 2**63",
            id="huge",
        ),
        pytest.param(
            "optimizer.clip",
            10**5000,
            "optimizer.clip is a whole number of 16610 bits, and must be less than 2**63",
            id="hugefloat",
        ),
        pytest.param(
            "n_layer", 10**400, "n_layer: Config has no such field; did you mean model.n_layers?", id="misspelt"
        ),
        ("train.compute_dtype", np.arange(2), "train.compute_dtype=[0, 1] must be float32, bfloat16 or float16"),
        ("model.d_ff", "x", "model.d_ff='x' must be a whole number or None"),
        ("model.n_layers.x", 3, "model.n_layers=2 has no fields"),
        ("model.n_heads", 5, "model.n_heads=5 must divide model.d_model=12; 4 does"),
        ("model.context_length", 10**18, "model.context_length=1000000000000000000 must be less than 2**31"),
        ("model.n_heads", 0, "model.n_heads=0 must be at least 1"),
        ("model.n_kv_heads", 2, "model.n_kv_heads=2 must divide model.n_heads=3"),
        ("model.dropout", 1, "model.dropout=1.0 must be at least 0 and less than 1"),
        ("model.dropout", float("nan"), "model.dropout=nan must be a finite number in float32"),
        ("model.position", Learned, "model.position="),
        ("model.norm.eps", "-1", "model.norm.eps=-1.0 must be more than 0"),
        ("model.initializer.std", "-1", "model.initializer.std=-1.0 must be at least 0"),
        ("optimizer.learning_rate.peak", "1e300", "must be a finite number in float32"),
        ("model.unroll", 0, "model.unroll=0 must be at least 1"),
        ("data.corpus", "Corpus", "data.corpus=Corpus: Corpus is abstract until it defines documents; define that"),
        (
            "writers",
            "Writer",
            "writers=Writer: Writer is abstract until it defines open; define that, or take another ",
        ),
        ("optimizer", "NoUpdates", "optimizer=NoUpdates: NoUpdates is abstract until it defines transform; define"),
        (
            "optimizer",
            "test_spec:NoUpdates",
            "defines transform; define that, or take another class, of Adafactor, AdamW, ",
        ),
        ("optimizer", "Adam", "optimizer='Adam' must be one of Adafactor, AdamW, "),
        ("model.norm", "rmsnorm", "or module:Class of such a part; did you mean RMSNorm?"),
        (
            "model.mask.2.size",
            "5",
            "model.mask.2.size: model.mask has 2 parts; give model.mask.0.FIELD to model.mask.1",
        ),
        ("model.kernel", "Twice", "model.kernel='Twice' has several classes of that name; give elsewhere:Twice or"),
        ("model.mask", (), "make 0 kinds of layers"),
        ("model.mask", (Window(0), Causal()), "model.mask.0.size=0 must be at least 1"),
        ("model.mask", (Window(2),) * 3, "model.feed_forward make 3 kinds of layers, which must divide the 2 layers"),
        ("optimizer.b2", "1", "optimizer.b2=1.0 must be at least 0 and less than 1"),
        ("optimizer.clip", "0", "optimizer.clip=0.0 must be more than 0; None turns it off"),
        ("optimizer.learning_rate.final", "1", "optimizer.learning_rate.final=1.0 must lie between 0 and"),
        ("train.seed", -1, "train.seed=-1 must be at least 0"),
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("train.steps", 2**31, "train.steps=2147483648 must be less than 2**31"),
        ("model.position", EmbedsPerLayer(), "model.position=EmbedsPerLayer embeds above the layers"),
        ("train.accumulation", 3, "train.accumulation=3 must divide data.batch_size=16"),
        ("train.compute_dtype", "float8", "train.compute_dtype='float8' must be float32, bfloat16 or float16"),
        (
            "train.product_dtype",
            "float16",
            "train.product_dtype='float16' must be bfloat16 or None",
        ),
        ("train.compute_dtype", 8, "train.compute_dtype=8 must be float32, bfloat16 or float16"),
        ("data.window", 8, "data.window=8 must be at most model.context_length=7"),
        ("data.valid_fraction", 1, "data.valid_fraction=1.0 must lie between 0 and 1"),
        ("directory", "", "directory='' must name a folder"),
        ("directory", "a\0b", "must name a folder"),
        ("directory", "a\ud800", "must name a folder"),
        ("directory", "a\udcff😀", "must name a folder"),
    ],
)
def test_a_bad_value_gets_one_sentence(path, value, message):
    with pytest.raises(InputError) as error:
        checked(override(CONFIG, path, value))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_odd_width_cannot_be_rotated():
    with pytest.raises(
        InputError,
        match=r"model.position turns 3 of the 3 numbers of a head, which must be even",
    ):
        checked(Config("runs/a", Decoder(12, 7, n_layers=2, n_heads=4, position=Rotary())))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.position", "Rotary", Rotary()),
        ("model.position", "jaxformer.model.positions:Learned", Learned()),
        ("model.position", "outside:TurnPerLayer", outside.TurnPerLayer()),
        ("model.mask", "Causal", Causal()),
        ("model.mask", "Window, Causal", (Window(), Causal())),
        ("model.mask.0.size", "3", (Window(3), Causal())),
        ("optimizer.learning_rate", "Constant", Constant()),
        ("writers", "TensorBoard", (TensorBoard(),)),
        ("writers", "TensorBoard,WandB", (TensorBoard(), WandB())),
        ("writers", "", ()),
    ],
)
def test_a_part_is_set_by_the_name_of_its_class(path, text, expected):
    config = checked(override(CONFIG, path, text))
    for name in path.removesuffix(".0.size").split("."):
        config = getattr(config, name)
    assert config == expected


def test_fields_may_be_given_before_the_part_that_has_them():
    fields = {"data.corpus.weights": "0.7,0.3", "model.position.base": "500", "model.position": "Rotary"}
    fields |= {"data.corpus": "Mixture", "data.corpus.corpora": "PythonTopics,TinyShakespeare"}
    config = resolve(CONFIG, fields)
    assert config.model.position == Rotary(500.0)
    assert config.data.corpus == Mixture((PythonTopics(), TinyShakespeare()), (0.7, 0.3))


def test_the_listing_says_what_the_command_line_takes():
    """Every field, by its path; set to the value that stands there, nothing changes."""
    config = resolve(
        CONFIG,
        {
            "data.corpus": "Mixture",
            "data.corpus.corpora": "PythonTopics,TinyShakespeare",
            "data.corpus.weights": "0.7,0.3",
        },
    )
    rows = {path: (value, meaning) for path, value, meaning in listing(config)}
    assert rows["model.mask.0.size"][0] == "5" and rows["data.corpus.weights"][0] == "0.7,0.3"
    assert rows["model.norm"] == ("LayerNorm", "how branches are normalised; of LayerNorm, NoNorm, RMSNorm")
    assert rows["train.compute_dtype"][1].endswith("; one of float32, bfloat16, float16")
    assert rows["optimizer"][0] == "AdamW"
    assert {"AdamW", "SGD"} <= {*rows["optimizer"][1].rpartition("of ")[2].split(", ")}
    assert "Optimizer" not in rows["optimizer"][1]  # nor any other class that could not be made
    assert rows["model.head.tied"] == ("True", "the matrix is that of the embedding")
    assert {path.split(".")[0] for path in rows} == {field.name for field in dataclasses.fields(Config)}
    for path, (value, _) in rows.items():
        if not re.fullmatch(r"(?!None|True|False)[A-Z]\w+(,[A-Z]\w+)*", value):  # a part begins with its defaults
            assert checked(override(config, path, value)) == config, path


def test_what_must_be_given_is_listed_so():
    rows = {path: (value, meaning) for path, value, meaning in listing(override(CONFIG, "data.corpus", "Mixture"))}
    assert rows["data.corpus.weights"] == ("", "must be given; the share of each in the rows of a batch, as 0.7,0.3")
    assert rows["data.corpus.names"][0] == "None" and "must" not in rows["data.corpus.names"][1]


def test_every_field_that_a_user_may_set_says_what_it_means():
    inner = {"Parts", "BlockSpec", "Subwords", "Recipe"}  # made by the library
    for spec in known_specs():
        if spec.__module__.startswith("jaxformer.") and spec.__name__ not in inner:
            meanings = field_comments(spec)
            for field in dataclasses.fields(spec):
                assert meanings.get(field.name), f"{spec.__name__}.{field.name} has no comment"
                assert "pyright" not in meanings[field.name] and len(meanings[field.name].split()) > 1


def test_a_longer_remat_needs_a_scan():
    model = Decoder(12, 7, n_layers=4, n_heads=3, unroll=4, remat="dots_saveable")
    with pytest.raises(InputError, match=r"remat='dots_saveable' needs a scan: model.unroll=4 must be less; 1"):
        checked(dataclasses.replace(CONFIG, model=model))


def test_numpy_numbers_are_numbers():
    assert type(checked(override(CONFIG, "train.steps", np.int64(7))).train.steps) is int


def test_strings_are_read_as_the_type_of_the_field():
    config = CONFIG
    texts = {"model.d_ff": "none", "optimizer.clip": "1e-3", "model.head.tied": "False", "model.feed_forward": "None"}
    for path, text in texts.items():
        config = override(config, path, text)
    config = override(override(config, "train.steps", "12"), "directory", "12")
    assert (config.model.d_ff, config.optimizer.clip, config.model.head.tied) == (None, 1e-3, False)
    assert config.model.feed_forward is None
    assert (config.train.steps, config.directory) == (12, "12")
    assert override(config, "train.steps", "1e3").train.steps == 1000
    assert override(config, "model.d_ff", "2.4e1").model.d_ff == 24
    assert checked(override(config, "train.steps", 1e3)).train.steps == 1000
    checked(config)


def test_a_part_that_lacks_a_method_gets_one_sentence_from_a_file(tmp_path):
    sentence = "NoUpdates is abstract until it defines transform; define that, or take another class"
    (tmp_path / "config.py").write_text("import test_spec\n\noptimizer = test_spec.NoUpdates()\n")
    with pytest.raises(InputError, match=f"config.py, line 3: {sentence}"):
        resolve(tmp_path / "config.py")
    with pytest.raises(InputError, match=f"^config.json: {sentence}"):
        from_json(broken(lambda c: c.update(optimizer={"class": "test_spec:NoUpdates"})), Config, "config.json")


def test_another_class_keeps_the_fields_that_were_set_and_mean_the_same():
    config = resolve("configs/shakespeare_cpu.py", {"model.dropout": 0.25, "optimizer.learning_rate.peak": 0.5})
    encoder = resolve(config, {"objective": "Masked", "model": "Encoder", "model.n_heads": "2"}).model
    kept = ("d_model", "n_layers", "context_length", "dropout", "unroll")
    assert [getattr(encoder, n) for n in kept] == [getattr(config.model, n) for n in kept]
    assert encoder.n_heads == 2 and encoder.mask == Bidirectional()  # as no other mask was set
    bigram = resolve(config, {"model": "Bigram"}).model
    assert (bigram.context_length, bigram.d_model) == (64, None)  # whose width is the vocabulary's
    assert dry_run(config, {"model": "Bigram", "data.tokenizer": "Bytes"})["n_params"] == 256 * 256
    assert resolve(config, {"optimizer": "SGD"}).optimizer == SGD(config.optimizer.learning_rate)
    assert resolve(config, {"optimizer": SGD()}).optimizer == SGD()
    assert resolve(config, {"optimizer.learning_rate": "Constant"}).optimizer.learning_rate == Constant()
    fixed = resolve(config, {"model.kernel": Softmax(scale=0.34)})
    assert resolve(fixed, {"model.kernel": "SoftCapped"}).model.kernel == SoftCapped(scale=0.34)


def test_a_base_is_no_choice_even_if_no_method_is_missing():
    shown = {path: comment for path, _, comment in listing(CONFIG)}["model.position"]
    choices = shown.rpartition("of ")[2].split(", ")
    assert "Learned" in choices and "Position" not in choices
    with pytest.raises(InputError, match="Position is abstract; take another class"):
        Position()
    with pytest.raises(InputError, match=r"model\.position=Position: Position is abstract"):
        override(CONFIG, "model.position", "Position")


def test_stored_form_comes_back_as_it_was():
    stored = json.loads(dumps(CONFIG))
    again = from_json(stored, Config, "config.json")
    assert again == checked(CONFIG) and hash(again) == hash(checked(CONFIG))


def broken(change):
    stored = json.loads(dumps(CONFIG))
    return change(stored) or stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["position"].update({"class": "os:system"}), "class='os:system' is no spec"),
        (lambda c: c["model"].update({"class": ["x"]}), "is no spec"),
        (lambda c: c["model"].pop("class") and None, "class=None is no spec"),
        (lambda c: c["model"].update(n_layer=3), "Decoder.n_layer: no such field; did you mean n_layers?"),
        (lambda c: c["model"].pop("d_model") and None, "d_model"),
        (lambda c: c["model"].update(n_layers="3"), "model.n_layers='3' must be a whole number"),
        (lambda c: c["model"].update(position=c["optimizer"]), "model.position="),
        (lambda c: c["model"], "holds Decoder, not a Config"),
        (lambda c: [c], "holds tuple, not a Config"),
        (lambda c: "x", "holds str, not a Config"),
        (lambda c: [json.loads("[" * 60 + "]" * 60)], "nested deeper"),
    ],
)
def test_a_hostile_stored_form_gets_one_sentence(change, message):
    with pytest.raises(InputError) as error:
        from_json(broken(change), Config, "config.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fifty_hostile_configs_import_nothing_and_run_nothing(tmp_path, monkeypatch):
    """A class of any module in any place, nested, mistyped, or not JSON at all: one sentence, and nothing else."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    plain = dumps(CONFIG)
    hostile = []
    for name in [*HOSTILE, "evil:Position", "evil:__init__", "..evil:x", ":", "", "jaxformer.spec:Spec"]:
        for place in ("model", "data", "optimizer"):
            value = json.loads(plain)
            value[place]["class"] = name
            hostile.append(json.dumps(value))
    for path in (
        "model.position",
        "data.corpus.path",
        "directory",
        "writers",
        "train.steps",
        "data.tokenizer.alphabet",
    ):
        value = part = json.loads(plain)
        *parents, last = path.split(".")
        for parent in parents:
            part = part[parent]
        part[last] = {"class": "evil:Position", "__reduce__": ["os.system", "touch run"]}
        hostile.append(json.dumps(value))
    hostile += [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"class":' * 5000,
        "\ud800",
        plain[:-9],
        "\0",
        "!!python/object:evil",
    ]
    hostile += [plain.replace('"steps": 1000', f'"steps": {n}') for n in ("NaN", "1e999", "-1", '"1000"', "9" * 5000)]
    assert len(hostile) >= 50
    modules = set(sys.modules)
    for i, text in enumerate(hostile):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(InputError) as error:
            read(tmp_path / "config.json")
        assert "config.json" in str(error.value) and "\n" not in str(error.value), i
    new = {name for name in set(sys.modules) - modules if name.split(".")[0] not in ("json", "encodings")}
    assert not new and not (tmp_path / "run").exists()


def test_a_class_that_another_process_cannot_find_is_not_stored():
    class Local(Constant):
        pass

    with pytest.raises(InputError, match="define it at the top level of a module"):
        to_json(AdamW(learning_rate=Local()))


def test_a_strangers_declarations_are_known_everywhere():
    model = tiny.decoder(position=outside.LearnedPace(), kernel=outside.SinkWithStatistic())
    declared = model.declared()
    assert jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0))) == jax.tree.structure(decayed(declared))
    attention = declared["decoder"]["layers"]["block0"]["attention"]
    letters = map_declared(lambda box: str(box.letters), attention)
    assert letters["kernel_params"] == {"sink": "L|H"}
    assert letters["position_params"] == {"gate": "L|GK", "slope": "L|H"}
    assert letters["project"] == {"q": "L|D->HK", "k": "L|D->GK", "v": "L|D->GK", "o": "L|HK->D"}
    decay = map_declared(lambda box: box.decay, attention)
    assert not decay["kernel_params"]["sink"] and all(decay["project"].values())
    assert map_declared(lambda box: box.decay, declared)["embedding"]["table"] is True
    for box in jax.tree.leaves(declared, is_leaf=is_declared):
        assert all((model.dims | {"L": 5})[letter] == size for letter, size in box.sizes().items())


def test_initial_values_depend_on_path_and_layer_alone():
    """So that adding a part or a layer leaves the other arrays as they were."""
    init = lambda **fields: jax.jit(tiny.decoder(**fields).init)(jax.random.key(3))
    plain, more = init(), init(bias=True, n_layers=7, position=outside.LearnedPace())
    layers = [p["decoder"]["layers"]["block0"]["attention"]["project"] for p in (plain, more)]
    assert jnp.array_equal(layers[0]["q"], layers[1]["q"][:5])
    assert not jnp.array_equal(layers[0]["q"][0], layers[0]["q"][1])
    assert not jnp.array_equal(layers[0]["k"], layers[0]["v"])
    assert jnp.array_equal(plain["embedding"]["table"], more["embedding"]["table"])


def test_gpt2_initialisation():
    """0.02, and for what writes to the residual stream 0.02 / √(2 · layers); biases 0, gains 1."""
    model = tiny.decoder(d_model=66, d_ff=131, bias=True, n_layers=8)
    params = jax.jit(model.init)(jax.random.key(0))
    block = params["decoder"]["layers"]["block0"]
    std = {name: float(a.std()) for name, a in block["attention"]["project"].items()}
    assert std["q"] == pytest.approx(0.02, rel=0.05) and std["k"] == pytest.approx(0.02, rel=0.05)
    assert std["o"] == pytest.approx(0.02 / 4, rel=0.05)
    assert float(block["feed_forward"]["down"].std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(params["embedding"]["table"].std()) == pytest.approx(0.02, rel=0.05)
    assert std["q_bias"] == std["o_bias"] == 0 and (block["norm_attention"]["scale"] == 1).all()


def test_string_annotations_are_understood(tmp_path, monkeypatch):
    """A module with `from __future__ import annotations` has strings for annotations."""
    (tmp_path / "postponed.py").write_text(
        "from __future__ import annotations\nfrom jaxformer.spec import Spec\n\n\nclass Late(Spec):\n"
        "    rate: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import postponed

    assert jax.tree.leaves(postponed.Late()) == [0.5]


def test_subclasses_are_frozen_dataclasses():
    class Part(Spec):
        size: int = 3

    with pytest.raises(dataclasses.FrozenInstanceError):
        Part().size = 4
    assert Part(4) != Part() and issubclass(Declared, object)


@pytest.mark.parametrize(
    ("path", "value", "may"),
    [
        ("train.log_every", 7, True),
        ("train.guard", None, None),
        ("train.guard.spike", 6.0, None),
        ("train.guard.most", 3, None),
        ("data.corpus.corpora.1.path", "moved", None),
        ("data.corpus.weights", (0.5, 0.5), False),
        ("model.mask.1.size", 5, False),
        ("model.kernel.1.implementation", Plain(), None),
        ("model.kernel.1.implementation.size", 32, None),
        ("mesh.data", 2, None),
    ],
)
def test_what_may_change_when_a_run_resumes(path, value, may):
    """Freely, with a notice (None), or not at all; of what holds several parts, that of the part."""
    corpus = Mixture((TextLines("a"), TextLines("b")), (0.3, 0.7))
    several = {"mask": (Causal(), Window(4)), "kernel": (Softmax(), Softmax(implementation=Blocked()))}
    model = Decoder(n_layers=2, n_heads=2, d_model=14, context_length=8, **several)
    old = Config("run", model, Data(corpus), train=Train(guard=Guard()))
    (found,) = differences(old, override(old, path, value))
    assert (found, may_change(found)) == (path, may)


@pytest.mark.parametrize(
    ("path", "may"),
    [
        ("train.guard.patience", None),
        ("model.kernel.implementation.depth", None),
        ("model.cross_kernel.1.implementation.inner.depth", None),
        ("mesh.pipeline", None),
        ("sampler.width", True),
        ("train.guards", False),
        ("train.seed", False),
    ],
)
def test_what_may_change_may_with_what_is_inside(path, may):
    """Also the fields of a class of one's own."""
    assert may_change(path) is may
