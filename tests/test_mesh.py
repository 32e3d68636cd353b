"""A run on several devices is the run on one: its losses, its state, its batches. Processes of their own simulate eight
devices on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshed import CASES, SIZES, STEPS, T, batches, decoder, hyper

from jaxformer import Config, Data, Decoder, Train
from jaxformer.commands.arguments import simulated
from jaxformer.config import resolve
from jaxformer.declarations import by_path
from jaxformer.lab.check import check
from jaxformer.learning.adafactor import Adafactor
from jaxformer.learning.groups import Groups
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedule_free import ScheduleFree
from jaxformer.mesh import Mesh, constrained, partition, partitions, placed, split
from jaxformer.run.inspection import describe, render
from jaxformer.run.plan import check_mesh, planned_recipe
from jaxformer.run.step import init_state, train_steps
from jaxformer.spec import InputError, checked

SIZES_OF_TWO = {"data": 1, "fsdp": 2, "tensor": 4}


def process(*arguments, timeout=600):
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here)))}
    done = subprocess.run(
        [sys.executable, str(here / "meshed.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return process("quick")


def test_losses_are_those_of_one_device(found):
    losses = found["losses"]
    np.testing.assert_allclose(losses["fsdp"], losses["alone"], rtol=1e-5)
    assert losses["alone"][1] < losses["alone"][0]


def test_what_the_program_of_an_fsdp_step_does(found):
    """It gathers parameters, reduces each gradient once (on CPU an all-reduce and a slice, of which GPU and TPU make a
    reduce-scatter), and gathers no activation and no logits."""
    ops, params = found["program"]["ops"], found["program"]["params"]
    rows, sizes = batches(decoder(), 1)["tokens"].shape[1], SIZES
    layer = lambda path, shape: shape[1:] if "/layers/" in path else shape
    flat = {path: int(np.prod(layer(path, shape))) for path, shape in params.items()}
    gathered = [int(np.prod(shape)) for shape in ops["all-gather"]]
    for path, size in flat.items():
        if path != "embedding/table":  # as a head it is gathered, as an embedding its rows are exchanged
            assert size in gathered, f"{path} is not gathered"
    assert flat["embedding/table"] in gathered
    ids = rows * T
    assert {size for size in gathered if size not in flat.values()} <= {ids}, "something besides parameters is gathered"
    assert not any(shape and shape[-1] == sizes["vocab_size"] for shape in ops["all-gather"] if len(shape) > 2)
    reduced = sorted(int(np.prod(shape)) for shape in ops["all-reduce"] if shape)
    assert reduced == sorted(flat.values()), "not each gradient is reduced just once"
    assert not ops.get("collective-permute")


def test_a_device_holds_its_share(found):
    assert found["program"]["bytes"] == pytest.approx(found["program"]["fair"], rel=0.02)


def test_a_checkpoint_is_the_same_on_other_devices(found):
    assert len(found["checkpoint"]) == 4 and len(set(found["checkpoint"].values())) == 1


# --- letters to axes


@pytest.mark.parametrize(
    ("letters", "shape", "spec"),
    [
        ("LDHK", (3, 32, 8, 4), P(None, "fsdp", "tensor", None)),
        ("LHKD", (3, 8, 4, 32), P(None, "tensor", None, "fsdp")),
        ("DF", (32, 48), P("fsdp", "tensor")),
        ("VD", (40, 32), P("tensor", "fsdp")),
        ("VD", (41, 32), P(None, "fsdp")),  # a vocabulary that is not divided stays whole
        ("V", (40,), P("fsdp")),
        ("VGK", (40, 4, 4), P("fsdp", "tensor", None)),
        ("DD", (32, 32), P("fsdp", None)),
        ("RH", (7, 8), P(None, "tensor")),
        ("LM", (3, 2), P(None, None)),
        ("", (), P()),
    ],
)
def test_letters_say_what_is_split(letters, shape, spec):
    assert partition(letters, shape, SIZES_OF_TWO) == spec
    assert partition(letters, shape, {"data": 8, "fsdp": 1, "tensor": 1}) == P(*[None] * len(shape))


def test_a_size_that_an_axis_does_not_divide_is_told():
    with pytest.raises(InputError, match=re.escape("mesh.tensor=4 must divide G=2 of a/k (letters DGK); 2 would do")):
        partition("DGK", (32, 2, 4), SIZES_OF_TWO, "a/k")
    with pytest.raises(InputError, match=re.escape("mesh.fsdp=2 must divide D=31 of a/k (letters DF); 1 would do")):
        partition("DF", (31, 48), SIZES_OF_TWO, "a/k")


@pytest.mark.parametrize("optimizer", [AdamW(), Groups(), ScheduleFree(), Adafactor()], ids=lambda o: type(o).__name__)
def test_what_an_optimizer_keeps_lies_as_its_parameter_does(optimizer):
    recipe = decoder()
    declared = recipe.model.declared()
    state = jax.eval_shape(lambda: init_state(recipe, hyper(optimizer)._replace(ema_decay=np.float32(0.9))))
    of = lambda tree: by_path(partitions(tree, declared, SIZES_OF_TWO))
    params = of(state.params)
    assert all("fsdp" in spec for path, spec in params.items())
    assert of(state.ema) == params
    kept, shapes = of(state.opt_state), {path: a.shape for path, a in by_path(state.opt_state).items()}
    follow = {path: name for path in kept for name in params if path.endswith(f"/{name}")}
    assert {follow[path]: kept[path] for path in follow} == ({} if isinstance(optimizer, Adafactor) else params)
    assert all(kept[path] == P() for path in kept.keys() - follow)
    if not isinstance(optimizer, Adafactor):
        assert all(np.prod(shapes[path]) <= 1 for path in kept.keys() - follow)
    members = jax.tree.map(lambda a: jax.ShapeDtypeStruct((5, *a.shape), a.dtype), state.params)
    assert of(members) == {path: P(None, *spec) for path, spec in params.items()}


# --- the mesh


def test_a_mesh_takes_what_is_left():
    assert Mesh(fsdp=-1).sizes(8) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert Mesh(data=-1, fsdp=2, tensor=2).sizes(8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert Mesh(data=-1, fsdp=3).sizes(8) == {"data": 2, "fsdp": 3, "tensor": 1}  # two are idle
    assert Mesh(tensor=2).sizes(8) == {"data": 1, "fsdp": 1, "tensor": 2}
    with pytest.raises(
        InputError, match=r"mesh.fsdp=8 · mesh.tensor=2 needs 16 devices, but there are 8; mesh.fsdp=8 or "
    ):
        Mesh(fsdp=8, tensor=2).sizes(8)
    with pytest.raises(InputError, match=r"mesh.fsdp=8 needs 8 devices, but there is 1; .*--simulate_devices=8"):
        Mesh(fsdp=8).sizes(1)
    for mesh, words in (
        (Mesh(fsdp=0), "mesh.fsdp=0 must be at least 1"),
        (Mesh(-1, -1), "mesh.data and mesh.fsdp are"),
    ):
        with pytest.raises(InputError, match=words):
            checked(mesh, "mesh.")


def test_what_a_mesh_does_not_divide_is_told_before_a_run():
    model = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = Config("run", Decoder(**model), Data(batch_size=12), train=Train(accumulation=3))
    recipe = decoder()

    def refused(**changes):
        with pytest.raises(InputError) as error:
            check_mesh(resolve(config, changes), recipe, 8)
        return str(error.value)

    assert check_mesh(resolve(config, {"mesh.fsdp": 4}), recipe, 8)["fsdp"] == 4
    told = (
        "data.batch_size=12 / train.accumulation=3 must be a multiple of mesh.data=1 · mesh.fsdp=8; data.batch_size=24"
    )
    assert refused(**{"mesh.fsdp": -1}).startswith(told)
    assert "needs 16 devices" in refused(**{"mesh.data": 16})
    assert "mesh.tensor=5 must divide G=8 of decoder/layers/block0/attention" in refused(**{"mesh.tensor": 5})


def test_without_a_mesh_a_program_says_nothing_of_one():
    recipe = decoder()
    x, state = np.ones((4, 2, 3)), jax.eval_shape(lambda: init_state(recipe, hyper()))
    assert constrained(x, "BTD") is x and split(state, None) is state and placed({"x": x})["x"] is x
    text = train_steps.lower(recipe, state, batches(recipe, 1), np.int32(1), hyper()).as_text()
    assert "sharding" not in text and "mesh" not in text
    with Mesh().entered(), Mesh(data=-1).entered():  # of one device
        assert constrained(x, "BTD") is x


@pytest.mark.slow
def test_a_mesh_of_one_that_is_forced_gives_the_same_numbers():
    recipe, losses = decoder(n_layers=1), []
    for mesh in (Mesh(), Mesh(forced=True)):
        with mesh.entered():
            state = init_state(recipe, hyper())
            lowered = train_steps.lower(recipe, state, placed(batches(recipe, 2), 1), np.int32(1), hyper())
            assert ("sharding" in lowered.as_text()) == mesh.forced
            losses.append(train_steps(recipe, state, placed(batches(recipe, 2), 1), np.int32(2), hyper())[0])
    chex.assert_trees_all_equal(*losses)


# --- all of it

SOME = ("groups and muon",)
COARSE = {"bfloat16", "contrastive"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SOME else pytest.mark.rare) for c in CASES]
)
def test_losses_on_every_mesh(case):
    """Loss of step 1 within 1e-5, of step 50 within 1e-4; a hundred times that in half precision, and of pairs, whose
    loss is near 0 by then."""
    found = process("whole", case)[case]
    alone = np.array(found.pop("alone"))
    coarse = 100 if case in COARSE else 1
    assert len(alone) == STEPS and len(found) >= 4
    for name, losses in found.items():
        np.testing.assert_allclose(losses[0], alone[0], rtol=1e-5 * coarse, err_msg=name)
        np.testing.assert_allclose(losses[-1], alone[-1], rtol=1e-4 * coarse, err_msg=name)
        if name == "forced":
            assert losses == alone.tolist()


def command(*arguments, **environment):
    """What a command of a process of its own writes to stderr, and to stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxformer", *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, done.stdout


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


QUICKLY = (
    *("--train.steps=6", "--train.steps_per_call=3", "--train.eval_every=6", "--train.save_every=3"),
    *("--train.log_every=1", "--data.valid_tokens=2000", "--train.sample_tokens=8", "--data.batch_size=16"),
)


@pytest.mark.rare
@pytest.mark.parametrize("preset", ["reverse", "quickstart", "help_topics"])
def test_runs_on_eight_devices_resume_on_others(preset, tmp_path):
    """Training, evaluation and generation under a mesh; what is saved on 8 devices goes on on 8, on 4 and on 1, from
    the same parameters and with the same batches; inspecting, evaluating, sampling and predicting need no mesh."""
    on8, hashes, found = tmp_path / "on8", set(), {}
    half = [each if "steps=6" not in each else "--train.steps=3" for each in QUICKLY]
    err, _ = command("train", preset, *half, f"--directory={on8}", "--simulate_devices=8", "--mesh.fsdp=8")
    assert "8 × cpu" in err and "mesh       data 1, fsdp 8, tensor 1" in err
    meshes = {
        "on8": ["--simulate_devices=8", "--mesh.fsdp=8"],
        "on4": ["--simulate_devices=4", "--mesh.fsdp=2", "--mesh.tensor=2"],
        "on1": [],
    }
    for name in ("on4", "on1"):
        shutil.copytree(on8, tmp_path / name)
    for name in meshes:
        hashes.add(json.loads(command("inspect", str(tmp_path / name), "--json")[1])["state_sha256"])
    assert len(hashes) == 1
    for name, arguments in meshes.items():
        command("train", preset, *QUICKLY, f"--directory={tmp_path / name}", *arguments)
        found[name] = rows_of(tmp_path / name)
    for name in ("on4", "on1"):
        assert [row["step"] for row in found[name]] == [row["step"] for row in found["on8"]]
        losses = [[row["loss"] for row in found[each]] for each in (name, "on8")]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    loss = json.loads(command("evaluate", str(on8), "--json")[1])["loss"]
    assert loss == pytest.approx(found["on1"][-1]["loss"], rel=1e-4)
    if preset == "help_topics":
        assert command("predict", str(on8), "--text=a list of numbers")[1]
    else:
        assert command("sample", str(on8), "--prompt=12", "--tokens=5")[1]


@pytest.mark.slow
def test_seeds_together_on_eight_devices(tmp_path):
    arguments = "train", "quickstart", "--seeds=2", *QUICKLY
    command(*arguments, f"--directory={tmp_path / 'on1'}")
    command(*arguments, f"--directory={tmp_path / 'on8'}", "--simulate_devices=8", "--mesh.data=2", "--mesh.fsdp=4")
    for seed in ("seed-0", "seed-1"):
        losses = [[row["loss"] for row in rows_of(tmp_path / name / seed)] for name in ("on8", "on1")]
        np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_check_compares_one_device_with_several():
    _, out = command("check", "quickstart", "--devices=4")
    assert [line.split(":")[0] for line in out.splitlines()[1:-1]] == [
        "ok      1 device = mesh.data=4",
        "ok      1 device = mesh.fsdp=4",
        "ok      1 device = mesh.fsdp=2 mesh.tensor=2",
    ]


def test_a_check_needs_its_devices():
    with pytest.raises(InputError, match="devices=8 must be at least 2 and at most 1, as many as there are"):
        check("quickstart", devices=8)


def test_what_simulates_devices_is_a_number():
    assert simulated(["a", "--b=c"]) == ["a", "--b=c"]
    for wrong in (["--simulate_devices=0"], ["--simulate_devices", "x"], ["--simulate_devices"]):
        with pytest.raises(InputError, match="simulate_devices="):
            simulated(wrong)


def test_inspect_tells_the_layout():
    own = {"mesh.fsdp": 4, "mesh.tensor": 2, "data.batch_size": 16}
    config = resolve("quickstart", {"data.tokenizer": "Bytes"} | own)
    found = describe(config, planned_recipe(config))
    rows = {row["name"]: row for row in found["table"]}
    q = rows["decoder/layers/block0/attention/project/q"]
    assert q["split"] == "D/4 H/2" and q["device_bytes"] == 4 * q["count"] // 8
    assert found["device_bytes"] == found["params_bytes"] // 8
    assert "D/4 H/2" in render(found)
    alone = describe(resolve(config, {"mesh": Mesh()}), planned_recipe(config))
    assert "split" not in alone["table"][0] and "device_bytes" not in alone
