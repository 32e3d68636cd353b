"""Adapters: parameters of a base that stays as it is, and of little beside it; for every family, and any letters."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZES, decoder, loud

import jaxformer
from jaxformer import Config, Data, Encoder, EncoderDecoder, Train, open_run
from jaxformer.commands.main import main
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TextFiles
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import BPE, TokenizerFile
from jaxformer.declarations import Declared, Letters, by_path
from jaxformer.learning.adapters import BESIDE, LoRA
from jaxformer.learning.groups import Everything, Hidden, Lettered, Path
from jaxformer.learning.objectives import Classification
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.mesh import partitions
from jaxformer.model.baselines import LSTM
from jaxformer.model.heads import ClassificationHead
from jaxformer.run.checkpoint import save_once
from jaxformer.run.dry_run import dry_run
from jaxformer.run.manifest import sha256
from jaxformer.run.plan import planned_recipe
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps
from jaxformer.run.warm_start import compare, open_source
from jaxformer.spec import InputError

HEAD = ClassificationHead("kind", ("a", "b"))
MODELS = {
    "decoder": decoder(n_layers=2, n_heads=2),
    "encoder": Encoder(**SIZES | {"n_layers": 2, "head": HEAD}),
    "encoder-decoder": EncoderDecoder(**SIZES | {"n_layers": 1}),
    "lstm": LSTM(32, 13, 29, n_layers=2),
}


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("trained", [(), (Path("*bias"),)], ids=["nothing", "biases"])
def test_at_first_the_parameters_are_those_of_the_base(model, trained):
    """And each array of the model is either in the base or trained itself."""
    lora, of_model, params = LoRA(3, trained=trained, targets=Everything()), model.declared(), loud(model)
    own, base = lora.begin(of_model, params, jax.random.key(1)), lora.base(of_model, params)
    chex.assert_trees_all_equal(lora.whole(of_model, own, base), params)
    beside = own.pop(BESIDE)
    assert sorted([*by_path(own), *by_path(base)]) == sorted(by_path(params))
    assert set(by_path(own)) == {p for p in by_path(params) if trained and p.endswith("bias")}
    matrices = {path for path, box in by_path(of_model).items() if box.letters.into and path not in by_path(own)}
    assert {path.rpartition("/")[0] for path in by_path(beside)} == matrices
    declared = by_path(lora.declared(of_model)[BESIDE])
    assert {path: a.shape for path, a in by_path(beside).items()} == {p: b.value.shape for p, b in declared.items()}


@pytest.mark.parametrize("letters", ["D->HK", "HK->D", "L|D->F", "LE|D->F", "D->D", "E|DK->KH"])
def test_each_matrix_gains_its_own_product(letters):
    """Against NumPy, each of a batch by itself; letters may come twice."""
    sizes, rng = {"D": 7, "H": 3, "K": 2, "F": 11, "L": 2, "E": 5}, np.random.default_rng(0)
    of = Letters.of(letters)
    shape = lambda some: tuple(sizes[letter] for letter in some)
    width = lambda some: int(np.prod(shape(some)))
    value = jax.ShapeDtypeStruct(shape(of.all), jnp.float32)
    box = Declared(value, of, True, None, width(of.into), True, None, (0, 1))
    lora = LoRA(4, alpha=6.0)
    boxes = (
        lora.beside("x", box) if "L" in letters else dataclasses.replace(lora, targets=Everything()).beside("x", box)
    )
    own = {name: rng.normal(size=each.value.shape).astype(np.float32) for name, each in boxes.items()}
    w = rng.normal(size=value.shape).astype(np.float32)
    n = width(of.batch)
    a, b = own["a"].reshape(n, width(of.into), 4), own["b"].reshape(n, 4, width(of.out))
    want = w.reshape(n, width(of.into), -1) + 1.5 * np.stack([a[i] @ b[i] for i in range(n)])
    found = lora.made(box, jnp.asarray(w), {name: jnp.asarray(array) for name, array in own.items()})
    np.testing.assert_allclose(found, want.reshape(w.shape), atol=1e-5)


def test_a_is_drawn_by_its_fan_in_each_layer_for_itself():
    own = LoRA(64, targets=Lettered(("D->F",))).begin(
        MODELS["decoder"].declared(), loud(MODELS["decoder"]), jax.random.key(2)
    )
    (a,) = (array for path, array in by_path(own).items() if path.endswith("/a"))
    assert a.shape == (2, 84, 64) and abs(float(a.std()) * 84**0.5 - 1) < 0.03
    assert not np.array_equal(a[0], a[1])


def test_a_step_moves_what_is_trained_and_nothing_else():
    """With gradients as the chain rule has them, of a product with B = 0: none of A, of B those of W by A."""
    model, rate = MODELS["decoder"], 0.5
    lora = LoRA(2, alpha=2.0, targets=Lettered(("D->F",)), trained=(Path("*gain"),))
    whole, own = Recipe(model), Recipe(model, adapter=lora)
    hyper = Hyper(np.uint32(0), np.int32(9), SGD(Constant(rate)))
    batch = {"tokens": np.random.default_rng(1).integers(0, 29, (1, 3, 14), np.int32)}
    params = loud(model)
    before, full = init_state(own, hyper, params), init_state(whole, hyper, params)
    start = jax.tree.map(np.array, before)  # a step uses its state up
    after, _ = train_steps(own, before, batch, np.int32(1), hyper)
    full, _ = train_steps(whole, full, batch, np.int32(1), hyper)
    chex.assert_trees_all_equal(after.base, start.base)
    moved, old, exact = by_path(after.params), by_path(start.params), by_path(full.params)
    path = "adapters/decoder/layers/block0/feed_forward/up/"
    np.testing.assert_array_equal(moved[path + "a"], old[path + "a"])
    gradient = (np.array(by_path(params)[path[9:-1]]) - np.array(exact[path[9:-1]])) / rate
    want = np.einsum("LDr,LDF->LrF", old[path + "a"], gradient)
    np.testing.assert_allclose(-np.array(moved[path + "b"]) / rate, want, atol=2e-5)
    for gain in (p for p in old if p.endswith("gain")):
        np.testing.assert_allclose(moved[gain], exact[gain], atol=1e-5)


def test_an_optimizer_keeps_nothing_of_the_base():
    recipe = Recipe(decoder(n_layers=2, n_heads=2), adapter=LoRA(1))
    state = jax.eval_shape(lambda: init_state(recipe, Hyper(np.uint32(0), np.int32(9), AdamW(), 0.9)))
    assert count(state.opt_state) - 1 == 2 * count(state.params) == 2 * count(state.ema)
    assert count(state.params) < 0.1 * count(state.base)


# --- runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    (path / "text.txt").write_text("".join(f"{i} and {i}\n" for i in range(211)))
    data = Data(TextFiles(str(path / "text.txt")), batch_size=3)
    model = decoder(n_layers=1, n_heads=2, n_kv_heads=None, d_model=14, vocab_size=None)
    config = Config("x", model, data, optimizer=AdamW(Constant(3e-3)), train=knobs())
    jaxformer.train(config, directory=path / "source")
    return path


def knobs(**more):
    steps = {"steps": 6, "steps_per_call": 3, "eval_every": 6, "save_every": 3, "sample_tokens": 0}
    return Train(**steps | {"ema_decay": 0.9, "best_by": "bits_per_byte"} | more)


def tuned(home, name, **more):
    config = jaxformer.config.read(home / "source" / "config.json")
    fields = {"directory": str(home / name), "init_from": str(home / "source"), "adapter": LoRA(2)}
    return dataclasses.replace(config, **fields | more)


def test_a_run_keeps_its_base_once_and_opens_with_all_of_it(home):
    """What is sampled, evaluated and begun with is the model with the product in place."""
    run = jaxformer.train(tuned(home, "run"))
    assert {name.split("/")[0] for name in checkpoint_arrays(home / "run", 6)} == {
        "step",
        "params",
        "opt_state",
        "ema",
        "skips",
    }
    assert all("/adapters/" in name for name in checkpoint_arrays(home / "run", 6) if name.startswith("params/"))
    opened, source = open_run(home / "run"), open_run(home / "source")
    assert sha256(opened.state) == sha256(run.state)
    old, new = by_path(source.eval_params), by_path(opened.eval_params)
    adapted = {path.removeprefix("adapters/").rpartition("/")[0] for path in by_path(opened.state.params)}
    assert {path for path in new if not np.array_equal(old[path], new[path])} == adapted
    assert opened.evaluate()["loss"] == pytest.approx(json_rows(home / "run")[-1]["loss"], abs=1e-6)
    chex.assert_trees_all_equal(open_source(str(home / "run")).state.params, opened.eval_params)
    assert opened.eval_params is opened.eval_params  # made once


def test_a_run_resumes_to_the_same_bits(home):
    jaxformer.train(tuned(home, "part", train=knobs(steps=3)))
    assert sha256(jaxformer.train(tuned(home, "part")).state) == sha256(open_run(home / "run").state)


def checkpoint_arrays(directory, step):
    return json.loads((directory / "checkpoints" / str(step) / "manifest.json").read_text())["arrays"]


def json_rows(directory):
    return [
        row
        for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        if "valid" in row["split"]
    ]


@pytest.mark.parametrize("damage", ["gone", "changed", "another"])
def test_a_run_without_its_base_is_refused(home, damage):
    name = f"damaged-{damage}"
    shutil.copytree(home / "run", home / name)
    if damage == "gone":
        shutil.rmtree(home / name / "base")
    elif damage == "another":  # sound in itself
        params = jax.tree.map(lambda a: np.asarray(a) + 1, open_run(home / "run").state.base)
        save_once(home / name, params, "base")
    else:
        manifest = home / name / "base" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(InputError, match="base, the parameters that the run leaves as they are, cannot be restored"):
        open_run(home / name)


def test_a_wrong_adapter_is_refused(home):
    config = tuned(home, "wrong")
    with pytest.raises(
        InputError, match="adapter=LoRA leaves parameters as they are: init_from=None must name the run"
    ):
        jaxformer.train(dataclasses.replace(config, init_from=None))
    with pytest.raises(InputError, match=r"adapter.rank=0 must be at least 1"):
        jaxformer.train(dataclasses.replace(config, adapter=LoRA(0)))
    with pytest.raises(InputError, match="the model has no array for it"):
        jaxformer.train(dataclasses.replace(config, adapter=LoRA(targets=Path("nowhere"))))
    with pytest.raises(InputError, match=r"adapter.trained: the model has no array for Path"):
        jaxformer.train(dataclasses.replace(config, adapter=LoRA(trained=(Path("nowhere"),))))
    assert not (home / "wrong").exists()


def test_what_the_other_run_lacks_must_be_trained(home):
    """A head that is new would stay as it was drawn."""
    (home / "kinds.tsv").write_text("text\tkind\n" + "".join(f"{i} and {i}\t{'ab'[i % 2]}\n" for i in range(40)))
    source = jaxformer.config.read(home / "source" / "config.json")
    tokenizer = TokenizerFile(str(home / "source" / "tokenizer.json"))
    table = Table(str(home / "kinds.tsv"), labels=("kind",))
    data = Data(table, tokenizer=tokenizer, sampling=Examples(), batch_size=3)
    model = dataclasses.replace(source.model, head=ClassificationHead("kind"))
    config = tuned(home, "kinds", data=data, model=model, objective=Classification())
    wrong = r"gives no head_classes_of_kind/.* at random; have it trained, as --adapter.trained=Path,"
    source = open_source(str(home / "source"))
    with pytest.raises(InputError, match=wrong):
        compare(planned_recipe(config), source, True)
    adapter = LoRA(1, targets=Hidden(), trained=(Path("head_*"), Path("embedding*")))
    recipe = planned_recipe(dataclasses.replace(config, adapter=adapter))
    assert compare(recipe, source, True)["taken"]
    names = {path.split("/")[0] for path in by_path(recipe.declared())}
    assert names == {"adapters", "head_classes_of_kind", "embedding"}


def test_a_base_lies_over_a_mesh_as_its_model_does():
    """Also where an array beside it is trained itself."""
    recipe = Recipe(decoder(n_layers=2, n_heads=2), adapter=LoRA(2, trained=(Path("*norm*"), Path("*bias"))))
    state = jax.eval_shape(lambda: init_state(recipe, Hyper(np.uint32(0), np.int32(3), AdamW())))
    found = by_path(partitions(state, recipe.every_declared(), {"data": 1, "fsdp": 2, "tensor": 1}))
    assert "fsdp" in found["base/decoder/layers/block0/attention/project/q"]


def test_a_dry_run_compares_tokenizers_as_training_does(home, monkeypatch):
    """A learned one is fitted first: its embedding fits that of the other run."""
    monkeypatch.chdir(home)
    data = Data(TextFiles(str(home / "text.txt")), tokenizer=BPE(300), batch_size=2)
    config = Config("bpe", decoder(vocab_size=None, n_layers=1), data, optimizer=AdamW(), train=Train(steps=1))
    jaxformer.train(config)
    dry_run(config, {"directory": "new", "init_from": "bpe", "adapter": "LoRA"})


def test_a_dry_run_tells_how_many_are_trained(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    (home / "config.py").write_text(
        "from jaxformer.config import read\nconfig = read(__import__('pathlib').Path('source/config.json'))\n"
    )
    monkeypatch.setattr(
        "sys.argv",
        [
            "jaxformer",
            "train",
            "config.py",
            "--directory=dry",
            "--init_from=source",
            "--adapter=LoRA",
            "--adapter.rank=2",
            "--dry_run",
        ],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    numbers = dict(line.split(None, 1) for line in out.splitlines() if line.startswith("n_"))
    assert ended.value.code == 0 and int(numbers["n_trained"].replace(",", "")) < int(
        numbers["n_params"].replace(",", "")
    )
