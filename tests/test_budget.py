"""What a plan says of memory is what XLA is given, and what JAX keeps for the backward pass."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.commands import main
from jaxformer.config import presets, resolve
from jaxformer.declarations import by_path, map_declared, trained, updated
from jaxformer.lab.probe import Probe, small
from jaxformer.learning.adapters import LoRA
from jaxformer.learning.by_depth import ByDepth
from jaxformer.mesh import Mesh
from jaxformer.run.budget import POLICIES, amount, budget, needs, plan, render, saved
from jaxformer.run.plan import abstract_batches, abstract_state, hyper_of
from jaxformer.run.step import Recipe, train_steps
from jaxformer.spec import InputError

QUICK = {
    "decoder": ("shakespeare_cpu", {"train.ema_decay": 0.9}),
}
MORE = {name: (name, {}) for name in presets()} | {
    "groups, accumulation, remat": (
        "gpt2_124m",
        {
            "optimizer": "Groups",
            "train.accumulation": 2,
            "model.remat": "dots_saveable",
            "train.compute_dtype": "float32",
        },
    ),
    "adafactor": ("gpt2_124m", {"optimizer": "Adafactor"}),
    "schedule-free": ("gpt2_124m", {"optimizer": "ScheduleFree"}),
    "everything anew": ("llama_1b", {"model.remat": "nothing_saveable"}),
    "plain": ("llama_1b", {"model.kernel.implementation": "Plain"}),
    "dropout": ("shakespeare_cpu", {"model.dropout": 0.1}),
    "half precision": ("shakespeare_cpu", {"train.compute_dtype": "bfloat16"}),
    "products of halves": ("shakespeare_cpu", {"train.product_dtype": "bfloat16"}),
}


def made(name, overrides):
    """A small config with its recipe, that no corpus is read for."""
    own = {path: value for path, value in overrides.items() if path != "train.accumulation"}
    probe = Probe(small(resolve(name, own)))
    train = dataclasses.replace(probe.config.train, accumulation=overrides.get("train.accumulation", 1))
    config = dataclasses.replace(probe.config, train=train)
    how = {"guard": train.guard, "product_dtype": train.product_dtype}
    return config, Recipe(config.model, config.objective, train.compute_dtype, train.accumulation, **how)


def residuals(config, recipe, rows, capsys):
    """Bytes of what `print_saved_residuals` lists, but for arguments and single numbers; and of a batch, of which it
    lists views as well."""
    declared = recipe.model.declared()
    params = map_declared(
        lambda box: jax.ShapeDtypeStruct(box.value.shape, recipe.dtype_of(box) if box.trained else "float32"), declared
    )
    batch = {
        n: jax.ShapeDtypeStruct((rows, *a.shape[2:]), a.dtype) for n, a in abstract_batches(config, recipe, 1).items()
    }
    example = jax.eval_shape(lambda batch: recipe.objective.prepare(batch, jax.random.key(0)), batch)

    def loss(moved, params, example):
        return recipe.objective.loss(recipe.model, updated(params, moved), example, jax.random.key(0)).minimised

    moved = trained(params, config.optimizer.frozen(declared))
    capsys.readouterr()
    jax.ad_checkpoint.print_saved_residuals(loss, moved, params, example)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    found = [re.match(r"(\w+)\[([\d,]*)\]", line) for line in lines]
    kinds = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4, "s32": 4, "u32": 4, "pred": 1, "bool": 1, "i8": 1}
    sizes = [kinds[f[1]] * int(np.prod([int(n) for n in f[2].split(",")])) for f in found if f and f[2]]
    return sum(sizes), sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(example))


def compare(config, recipe, capsys):
    found = needs(config, recipe, 1)
    state = abstract_state(config, recipe)
    batches = abstract_batches(config, recipe, min(config.train.steps_per_call, config.train.steps))
    hyper = hyper_of(config)
    memory = train_steps.lower(recipe, state, batches, np.int32(1), hyper).compile().memory_analysis()
    arrays = found["params_bytes"] + found["optimizer_bytes"] + found["ema_bytes"] + found["batches_bytes"]
    numbers = sum(jnp.asarray(a).nbytes for a in jax.tree.leaves((hyper, 0)))
    skips = sum(a.size * 4 for a in jax.tree.leaves((state.step, state.skips)))
    assert 0 <= memory.argument_size_in_bytes - arrays <= numbers + skips, "what a step is given"
    rows = config.data.batch_size // config.train.accumulation
    kept = sum(a.size * a.dtype.itemsize for a in saved(config, recipe, rows) if a.shape)
    listed, views = residuals(config, recipe, rows, capsys)
    assert 0 <= listed - kept <= views, "what is kept for the backward pass"
    working = found["estimated_bytes"] - arrays
    return working / memory.temp_size_in_bytes


def test_an_adapter_makes_what_has_gradients_of_its_own():
    """Matrices are made once a step, and lie beside those of the base, as do their gradients; what layers keep for the
    backward pass is no more than without it."""
    config, plain = made("shakespeare_cpu", {})
    recipe = dataclasses.replace(plain, adapter=LoRA(2))
    without, found = needs(config, plain, 1), needs(dataclasses.replace(config, adapter=LoRA(2)), recipe, 1)
    boxes = by_path(plain.model.declared()).values()
    matrices = sum(4 * box.value.size for box in boxes if box.letters.into and "L" in box.letters.batch)
    assert found["gradients_bytes"] == found["params_bytes"] - without["params_bytes"] + matrices
    assert found["cast_bytes"] == matrices and found["activations_bytes"] <= without["activations_bytes"]


@pytest.mark.parametrize("case", QUICK)
def test_bytes_are_those_of_xla(case, capsys):
    assert 0.5 < compare(*made(*QUICK[case]), capsys) < 2


SOME = "birth_places", "disaster_tweets_contrastive", "groups, accumulation, remat", "everything anew", "dropout"


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SOME else pytest.mark.rare) for c in MORE]
)
def test_bytes_are_those_of_xla_everywhere(case, capsys):
    ratio = compare(*made(*MORE[case]), capsys)
    with capsys.disabled():
        print(f"\n{case}: planned working memory {ratio:.2f} × XLA's")
    assert 0.5 < ratio < 2


@pytest.mark.slow
def test_a_plan_says_what_would_fit():
    config, recipe = made("gpt2_124m", {})
    whole = budget(config, recipe, 1)
    room = whole["estimated_bytes"] - 1
    assert "it fits" in budget(config, recipe, 1, 2.0 * room)["advice"]
    found = budget(config, recipe, 1, room, 1e12)
    assert [row["remat"] for row in found["policies"]] == [*POLICIES]
    assert found["seconds_at_peak"] == found["flops_per_step"] / 1e12
    for row in found["policies"]:
        model = dataclasses.replace(recipe.model, remat=row["remat"])
        rows = lambda n: dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=n))
        of = lambda n: needs(rows(n), dataclasses.replace(recipe, model=model), 1)  # noqa: B023
        slack = of(row["rows"])["batches_bytes"] - found["batches_bytes"]  # which grow a little with rows
        assert of(row["rows"])["estimated_bytes"] - slack <= room < of(row["rows"] + 1)["estimated_bytes"]
    assert found["advice"] == "it does not fit; it would with --model.remat=dots_saveable"
    few = found["estimated_bytes"] - found["activations_bytes"] - found["logits_bytes"]
    assert (
        "not even with --train.accumulation=4 --model.remat=nothing_saveable;"
        in budget(config, recipe, 1, few)["advice"]
    )
    text = render(found)
    assert "remat=none" in text and f"{'advice':18} it does not fit" in text


@pytest.mark.parametrize(
    ("preset", "overrides", "memory", "advice"),
    [
        (
            "disaster_tweets_contrastive",
            {"data.tokenizer": "Bytes", "data.tokenizer.mask_token": True},
            1e6,
            ", not even with --model.remat=nothing_saveable; take more devices under mesh.fsdp",
        ),
        (
            "shakespeare_cpu",
            {"data.tokenizer": "Bytes", "model.unroll": 4},
            30e6,
            "; it would with --model.remat=nothing_saveable --model.unroll=1",
        ),
    ],
)
def test_a_plan_advises_nothing_that_is_refused(preset, overrides, memory, advice):
    """No slices of what compares rows, and a scan for what is computed anew."""
    assert plan(preset, overrides, device_memory=memory)["advice"] == f"it does not fit{advice}"


@pytest.mark.slow
def test_the_slices_that_a_plan_advises_fit():
    """Their gradients lie beside the sum of them."""
    config, recipe = made("gpt2_124m", {"model.remat": "nothing_saveable"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    short = budget(config, recipe, 1)["estimated_bytes"] - 1
    slices = re.search(r"accumulation=(\d+)", budget(config, recipe, 1, short)["advice"])
    assert slices
    train = dataclasses.replace(config.train, accumulation=int(slices[1]))
    fewer = dataclasses.replace(recipe, slices=train.accumulation)
    assert "it fits" in budget(dataclasses.replace(config, train=train), fewer, 1, short)["advice"]


@pytest.mark.slow
def test_devices_share_out_what_a_plan_says():
    config, recipe = made("gpt2_124m", {"train.accumulation": 1})
    one = needs(config, recipe, 1)
    eight = lambda **axes: needs(dataclasses.replace(config, mesh=Mesh(**axes)), recipe, 8)
    split, copies, heads = eight(fsdp=4), eight(data=4), eight(tensor=2)
    assert split["params_bytes"] == pytest.approx(one["params_bytes"] / 4, rel=0.05)  # biases stay whole
    assert copies["params_bytes"] == one["params_bytes"] > heads["params_bytes"]
    assert split["activations_bytes"] == copies["activations_bytes"] < one["activations_bytes"] / 3
    assert one["activations_bytes"] / 2 < heads["activations_bytes"] < one["activations_bytes"]
    sent = lambda found: [found[f"sent_{axis}_bytes"] for axis in ("data", "fsdp", "tensor")]
    assert sent(one) == [0, 0, 0]
    assert sent(copies)[0] == round(2 * 3 / 4 * copies["params_bytes"] / 2)  # ring; gradients in bfloat16
    assert sent(split)[1] > 0 and sent(split)[2] == 0 and sent(heads)[:2] == [0, 0] and sent(heads)[2] > 0
    frozen = dataclasses.replace(config, optimizer=ByDepth(still=recipe.model.n_layers), mesh=Mesh(data=4))
    assert 0 < sent(needs(frozen, recipe, 8))[0] < sent(copies)[0] / 100
    with pytest.raises(InputError, match=r"data.batch_size=4 must be a multiple of .*mesh.fsdp=8"):
        eight(fsdp=8)


def test_amounts():
    assert amount("80GB", "x") == 80e9 and amount("989e12", "x") == 989e12 and amount("7kb", "x") == 7e3
    for wrong in ("80XB", "GB", "-1", "nan"):
        with pytest.raises(InputError, match="device_memory="):
            amount(wrong, "device_memory")


@pytest.mark.slow
def test_the_plans_of_the_docs_are_made(capsys):
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text().replace("\\\n", " ")
    plans = [line.split()[2:] for line in text.splitlines() if line.startswith("jaxformer plan ")]
    assert len(plans) == 3
    for arguments in plans:
        assert main.run("plan", arguments) == 0
        assert "estimated_bytes" in capsys.readouterr().out


def test_a_plan_of_what_is_not_there_is_refused(capsys):
    assert main.run("plan", ["quickstart", "--devices", "7"]) == 2
    assert "data.batch_size=16 must be a multiple of mesh.data=1 · mesh.fsdp=7" in capsys.readouterr().err
    assert main.run("plan", ["quickstart", "--mesh.fsdp=8"]) == 2
    assert "mesh.fsdp=8 needs 8 devices, but there is 1" in capsys.readouterr().err
