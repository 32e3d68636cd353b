"""The reference of benchmarks/ is the same model as jaxformer's; what is found is told and compared right."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ids, loud

from jaxformer import config as config_lib
from jaxformer.data.sources import Source
from jaxformer.model.masks import places
from jaxformer.run.plan import Judged, evaluate, planned_recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402
import gate  # noqa: E402
import gpu_traffic  # noqa: E402
import recipe  # noqa: E402
from peers import bare_jax, flax_linen, ours, sizes, timing  # noqa: E402
from peers.recipes import Recipe  # noqa: E402

SIZE = sizes.Size(layers=2, heads=3, width=15, context=11, vocabulary=29, batch=2, tokens=7)


@pytest.fixture(autouse=True)
def _ranks_are_promoted():
    """The reference is written as NumPy is."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def pair():
    """jaxformer's model with its parameters, and the reference's with the same numbers."""
    model = ours.planned(SIZE, {})[1].model
    params = loud(model)
    stack = params["decoder"]["layers"]["block0"]

    def layer(i):
        own = jax.tree.map(lambda a: a[i], stack)
        project, width = own["attention"]["project"], SIZE.width
        return {
            "qkv": jnp.concatenate([project[n].reshape(width, -1) for n in "qkv"], 1),
            "out": project["o"].reshape(-1, width),
            **own["feed_forward"],
            "norm_attention": own["norm_attention"]["scale"],
            "norm_feed": own["norm_feed_forward"]["scale"],
        }

    bare = {
        "tokens": params["embedding"]["table"],
        "positions": params["decoder"]["position"]["table"],
        "norm": params["decoder"]["norm"]["scale"],
        "layers": [layer(i) for i in range(SIZE.layers)],
    }
    return model, params, bare


def test_the_reference_computes_what_jaxformer_computes(pair):
    model, params, bare = pair
    chex.assert_trees_all_equal_shapes(bare, jax.eval_shape(lambda: bare_jax.init(SIZE, jax.random.key(0))))
    assert sum(a.size for a in jax.tree.leaves(params)) == SIZE.params
    tokens = ids(2, 7)
    h, _ = jax.jit(bare_jax.hidden, static_argnums=2)(bare, tokens, SIZE.heads)
    own = jax.jit(
        lambda params: model.logits(params, model.hidden(params, tokens, places(jnp.ones((2, 7), jnp.int32)))[0])
    )(params)
    np.testing.assert_allclose(h @ bare["tokens"].T, own, rtol=2e-5, atol=2e-5)


def test_the_reference_decodes_what_its_full_pass_says(pair, monkeypatch):
    monkeypatch.setattr(bare_jax, "TOP_K", 1)
    bare, lengths = jax.tree.map(lambda a: 3 * a, pair[2]), np.array([2, 5], np.int32)
    prompts = np.asarray(ids(2, 5)) * (np.arange(5) < lengths[:, None])
    drawn = np.asarray(bare_jax.generated(bare, prompts, lengths, SIZE, 6, jax.random.key(0))).T  # [B, new]
    for prompt, length, new in zip(prompts, lengths, drawn, strict=True):
        text = np.zeros((1, SIZE.context), np.int32)  # of one length, to compile once
        text[0, : length + 6] = [*prompt[:length], *new]
        h, _ = jax.jit(bare_jax.hidden, static_argnums=2)(bare, text, SIZE.heads)
        np.testing.assert_array_equal((h[0] @ bare["tokens"].T).argmax(-1)[length - 1 : length + 5], new)


def test_work_is_that_of_the_formulas():
    size = dataclasses.replace(SIZE, batch=1, tokens=2)
    products = 2 * (12 * 15 * 15) + 29 * 15  # layers and head
    assert sizes.work_of_step(size).flops == 2 * (6 * products + 12 * 2 * 15 * 2)
    texts = sizes.Texts(batch=3, prompt=5, new=4, ragged=True)
    assert [len(p) for p in texts.prompts(29)] == [1, 3, 5]
    seen = 1 + 3 + 5 + 3 * 2
    work = sizes.work_of_token(size, texts, "bfloat16")
    assert work == sizes.Work(2 * 3 * products + 2 * 2 * 2 * 15 * seen, 2 * (products + 2 * 2 * 15 * seen))


def test_the_gate_fails_from_5_percent_on():
    before = {"step": [1.0, 0.9, 1.1], "decode": [0.5]}
    assert gate.fallen(before, {"step": [0.96], "decode": [0.7]}) == []
    assert gate.fallen(before, {"step": [0.94], "decode": [0.7]}) == ["step: 1.000 before, 0.940 now, -6.0%"]


def test_what_is_found_is_told():
    contestants = tuple(compare.Contestant(name, name) for name in ("ours", "theirs", "broken"))
    measurement = compare.Measurement("step x", "step", SIZE, contestants, 1)
    found = lambda *seconds: [{"seconds": each, "compile": 2.0, "memory": 3e6} for each in seconds]
    rows = [
        compare.Row("ours", "float32", found(1.0, 2.0, 3.0)),
        compare.Row("theirs", "float32", found(2.0, 8.0, 3.0)),
        compare.Row("broken", "float32", failed="no such module"),
    ]
    limits = {"float32": sizes.work_of_step(SIZE).flops, "bytes": 1e30}  # a step takes a second
    text = compare.table(compare.told(measurement, rows, limits)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text]
    assert cells[2] == ["ours", "7 (5 to 14)", "1.00 (1.00 to 1.00) ×", "50%", "2.0 s", "3 MB"]
    assert cells[3] == ["theirs", "5 (2 to 7)", "2.00 (1.00 to 4.00) ×", "33%", "2.0 s", "3 MB"]
    assert text[-1] == "broken failed: no such module"
    assert "jaxformer is" not in compare.table(compare.told(measurement, rows[::-1], limits))


def test_a_block_takes_the_place_of_its_own():
    page = "# Benchmarks\n\nWords.\n"
    for block in ("## A, 2 cores\n\nold\n", "## B\n\nother\n", "## A, 2 cores\n\nnew\n"):
        page = compare.placed(page, block)
    assert page == "# Benchmarks\n\nWords.\n\n## A, 2 cores\n\nnew\n\n## B\n\nother\n"


def test_tables_take_the_places_of_their_own():
    """Given names, the others of the block stay, and its words."""
    page = "# B\n\n## A\n\nhow, when\n\nWords.\n\n**x: a**\n\n| 1 |\n\n**y: b**\n\n| 2 |\n\n## C\n\nother\n"
    new = "## A\n\nnow\n\n**y: c**\n\n| 3 |\n\n**z: d**\n\n| 4 |\n"
    tables = "**x: a**\n\n| 1 |\n\n**y: c**\n\nnow\n\n| 3 |\n\n**z: d**\n\nnow\n\n| 4 |\n"
    page = compare.added(page, new)
    assert page == f"# B\n\n## A\n\nhow, when\n\nWords.\n\n{tables}\n## C\n\nother\n"
    assert compare.added(page, new) == page and compare.added("# B\n", new) == "# B\n\n" + new


@pytest.mark.parametrize("name", sizes.SIZES)
def test_a_size_is_put_on_a_config_at_its_own_settings(name):
    """Everything else is as a user has it; but an encoder has the table of positions that its peers have."""
    size = sizes.SIZES[name]
    config = ours.planned(size, {})[0]
    changed = set(config_lib.differences(config_lib.resolve(size.config), config))
    assert changed <= {
        *(f"model.{field}" for field in ("n_layers", "n_heads", "d_model", "context_length", "head.classes")),
        *(f"data.{field}" for field in ("batch_size", "window")),
        *(() if size.causal else ("model.position", "model.embedding.scaled")),
    }


def test_a_share_of_the_data_sheet_is_told_of_steps_in_their_dtype():
    contestants = (compare.Contestant("ours", "ours"),)
    limits = {"float32": 0.0, "bytes": 0.0, "datasheet": {"float32": sizes.work_of_step(SIZE).flops, "bfloat16": 1.0}}
    row = [compare.Row("ours", "float32", [{"seconds": 2.0, "compile": 1.0, "memory": 1.0}])]
    told = lambda what, texts: compare.told(
        compare.Measurement("x", what, SIZE, contestants, 1, texts=texts), row, limits
    )["rows"][0]
    assert told("step", None)["mfu"] == 0.5
    assert "mfu" not in told("decode", sizes.Texts(1, 2, 3))


def test_a_peer_draws_what_attention_drops_for_every_weight():
    size = dataclasses.replace(SIZE, causal=False, dropout=0.3)
    block, x = flax_linen.Block(size), jnp.ones((2, 7, 15))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    program = str(jax.make_jaxpr(lambda: block.init(keys, x, jnp.ones((2, 1, 7, 7))))())
    assert re.search(r"u32\[2,3,7,7\] = random_bits", program)


def test_a_baseline_of_another_machine_is_seen_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "run", lambda *_: {"device": "this"})
    monkeypatch.setattr(gate, "ratios", lambda _: pytest.fail("it measures"))
    path = tmp_path / "baseline.json"
    ratios = {each.name: [1.0] for each in gate.MEASUREMENTS}
    for stored, told in (
        ({"machine": "that", "ratios": ratios}, "is of another machine: that; this is this"),
        ({}, "no baseline can be read"),
        ({"machine": "this", "ratios": {"renamed": [1.0]}}, "no baseline can be read"),
    ):
        path.write_text(json.dumps(stored))
        monkeypatch.setattr(sys, "argv", ["gate.py", str(path)])
        assert gate.main() == 2 and told in capsys.readouterr().err


def test_a_product_that_would_take_too_long_is_left_out():
    """As of a dtype for which the processor has no units; a contestant that would need it is not run."""
    found, tried = {"float32": 0.0, "bfloat16": 0.0}, []
    for dtype, side in timing.sides_of(found, 3, found):
        tried.append((dtype, side))
        found[dtype] = 1e12 if dtype == "float32" else 1e9
    assert tried == [("float32", 1024), ("float32", 2048), ("float32", 4096), ("bfloat16", 1024)]
    half = compare.Contestant("half", "pytorch", {"dtype": "bfloat16"})
    measurement = compare.Measurement("x", "step", SIZE, (half,), 1)
    (row,) = compare.measured(measurement, 1, compare.Clock(), emulated=["pytorch"])
    assert not row.found and "emulated" in row.failed


def test_names_select():
    assert [each.name for each in compare.selected(["small", "step"])] == ["step small"]
    assert [each.name for each in compare.selected(["ragged", "124M"])] == ["decode 124M 32 ragged"]
    assert not any("gpu" in each.name for each in compare.selected([]))
    also = compare.selected(["gpu", "step"], ["model.remat=all"])[0].contestants[-1]
    assert also.arguments["overrides"] == {"model.remat": "all"}
    for names in (["medium"], ["small", "encoder"], ["gpu", "small"]):
        with pytest.raises(SystemExit, match=" ".join(names)):
            compare.selected(names)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param("step small", marks=pytest.mark.slow),
        *(pytest.param(names, marks=pytest.mark.rare) for names in ("decode small ragged", "checkpoint")),
    ],
)
def test_a_measurement_runs(names, tmp_path):
    """Of what needs no PyTorch: without it the others are told to have failed."""
    command = [sys.executable, BENCHMARKS / "compare.py", *names.split(), "--quick", "--json", tmp_path / "found.json"]
    subprocess.run([*command, "--markdown", tmp_path / "page.md"], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"]: row for row in found["measurements"][0]["rows"]}
    jax_rows = [row for name, row in rows.items() if name.startswith(("jaxformer", "bare JAX", "Flax", "Orbax"))]
    assert len(jax_rows) >= 2 and all(row["seconds"][0] > 0 and row["memory"] > 1e6 for row in jax_rows)
    assert f"## {found['limits']['device']}" in (tmp_path / "page.md").read_text()


def test_a_peer_trains_what_the_config_says():
    config = config_lib.resolve("shakespeare_cpu", {"train.steps": 300, "train.seed": 3, "data.batch_size": 7})
    found = recipe.recipe_of(config)
    assert (found.batch, found.seed, found.hidden, found.clip, found.muon, found.modern) == (7, 3, 512, 1.0, None, None)
    rate = lambda step: float(config.optimizer.learning_rate(np.int32(step), np.int32(300)))
    np.testing.assert_allclose(found.adam.rates, [rate(step) for step in range(300)], rtol=1e-6)
    assert Recipe.of(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    with pytest.raises(ValueError, match=r"model\.residual=.*has PreNorm and nothing else"):
        recipe.recipe_of(config_lib.resolve(config, {"model.residual": "PostNorm"}))


def test_runs_are_told_beside_the_first():
    runs = lambda *pairs: [{"seed": seed, "seconds": each[0], "loss": each[1]} for seed, each in enumerate(pairs)]
    failed = {"seed": -1, "seconds": 5.0, "loss": 9.0}  # of a seed that the others lack
    rows = [
        {"name": "theirs", "steps": 2000, "runs": [failed, *runs((100.0, 1.9), (200.0, 1.8))], "failed": None},
        {"name": "ours", "steps": 500, "runs": runs((30.0, 1.7), (20.0, 1.7)), "failed": None},
        {"name": "broken", "steps": 500, "runs": [], "failed": "no such module"},
    ]
    text = recipe.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text]
    paired = ["0.20 (0.10 to 0.30) ×", "0.150 (0.100 to 0.200)"]
    assert cells[3] == ["ours", "500", "25.0 (20.0 to 30.0)", "1.700 (1.700 to 1.700)", *paired]
    assert text[-1] == "broken failed: no such module"


@pytest.mark.slow
def test_adapters_train_less_than_all():
    command = [sys.executable, BENCHMARKS / "adapters.py", "--small", "--tokens=32", "--rounds=1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[4:]]
    trained = [int(cells[1].partition(" ")[0].replace(",", "")) for cells in rows]
    assert trained[0] > 100 * trained[1] and trained[3] == 4 * trained[2] == 16 * trained[1] > 0


@pytest.mark.rare
def test_recipes_run(tmp_path):
    """On both sides; without PyTorch on one."""
    command = [sys.executable, BENCHMARKS / "recipe.py", "fast", "--seeds=1", "--steps=2"]
    subprocess.run([*command, "--json", tmp_path / "found.json", "--markdown", tmp_path / "page.md"], check=True)
    _, theirs, ours, again = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert ours["runs"][0]["loss"] == again["runs"][0]["loss"] and not ours["failed"]
    assert ours["runs"][0]["tokens"] > 100_000 and "Time to a loss" in (tmp_path / "page.md").read_text()
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    assert theirs["runs"][0]["tokens"] == ours["runs"][0]["tokens"] and theirs["runs"][0]["loss"] < 4.3


@pytest.mark.slow
def test_pytorch_has_the_same_loss():
    """Of the same weights, over a whole split whose last window is not full."""
    torch = pytest.importorskip("torch")
    from peers import pytorch_recipe

    config = config_lib.resolve("shakespeare_cpu", {"model.n_layers": 2, "model.d_model": 16})
    given, own_recipe = recipe.recipe_of(config), planned_recipe(config, ours.NoTokenizer(29))
    params, peer = loud(own_recipe.model), pytorch_recipe.Baseline(given, 29)
    stack, copy = params["decoder"]["layers"]["block0"], lambda to, a: to.copy_(torch.from_numpy(np.array(a)))
    with torch.no_grad():
        copy(peer.tokens.weight, params["embedding"]["table"])
        copy(peer.positions.weight, params["decoder"]["position"]["table"])
        copy(peer.norm.weight, params["decoder"]["norm"]["scale"])
        for i, block in enumerate(peer.blocks):
            layer = jax.tree.map(lambda a, i=i: np.array(a[i]), stack)
            project = layer["attention"]["project"]
            copy(block.qkv.weight, np.concatenate([project[name].reshape(16, -1).T for name in "qkv"]))
            copy(block.out.weight, project["o"].reshape(-1, 16).T)
            copy(block.up.weight, layer["feed_forward"]["up"].T)
            copy(block.down.weight, layer["feed_forward"]["down"].T)
            copy(block.norm_attention.weight, layer["norm_attention"]["scale"])
            copy(block.norm_feed_forward.weight, layer["norm_feed_forward"]["scale"])
    tokens = np.asarray(ids(1, 1003))[0] % 29
    judged = Judged((Source(tokens.astype(np.uint8), np.zeros(1, np.int64)),), (1.0,), ("",))
    (found,) = evaluate(own_recipe, params, judged, config, ours.NoTokenizer(29))
    theirs = pytorch_recipe.evaluated(peer, torch.from_numpy(tokens).long(), given.context)
    assert theirs["tokens"] == found["tokens"] == 1002
    assert theirs["loss"] == pytest.approx(found["loss"], rel=1e-5)


PROGRAM = """HloModule jit_step, is_scheduled=true

%cut (param_0.1: f32[12,64], param_1.1: s32[]) -> f32[1,64] {
  %param_0.1 = f32[12,64]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  ROOT %cut.1 = f32[1,64]{1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,64}
}

%write (param_0.2: bf16[12,64], param_1.2: bf16[1,64], param_2.2: s32[]) -> bf16[12,64] {
  %param_0.2 = bf16[12,64]{1,0} parameter(0)
  %param_1.2 = bf16[1,64]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  ROOT %write.1 = bf16[12,64]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2)
}

%product (param_0.3: bf16[64,64], param_1.3: bf16[64,64]) -> (bf16[64,64], s8[4096]) {
  %param_0.3 = bf16[64,64]{1,0} parameter(0)
  %param_1.3 = bf16[64,64]{1,0} parameter(1)
  %gemm.1 = (bf16[64,64]{1,0}, s8[4096]{0}) custom-call(%param_0.3, %param_1.3), custom_call_target="__cublas$lt$matmul"
  %first.1 = bf16[64,64]{1,0} get-tuple-element(%gemm.1), index=0
  %room.1 = s8[4096]{0} get-tuple-element(%gemm.1), index=1
  ROOT %both.1 = (bf16[64,64]{1,0}, s8[4096]{0}) tuple(%first.1, %room.1)
}

%body (at: (s32[], f32[12,64], bf16[12,64], bf16[64,64])) -> (s32[], f32[12,64], bf16[12,64], bf16[64,64]) {
  %at = (s32[], f32[12,64]{1,0}, bf16[12,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%at), index=0
  %stack = f32[12,64]{1,0} get-tuple-element(%at), index=1
  %halves = bf16[12,64]{1,0} get-tuple-element(%at), index=2
  %square = bf16[64,64]{1,0} get-tuple-element(%at), index=3
  %cut-start = ((f32[12,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%cut
  %cut-done = f32[1,64]{1,0} fusion-done(%cut-start)
  %half = bf16[1,64]{1,0} convert(%cut-done), metadata={op_name="jit(train_step)/convert"}
  %written = bf16[12,64]{1,0} fusion(%halves, %half, %i), kind=kLoop, calls=%write
  %gemm = (bf16[64,64]{1,0}, s8[4096]{0}) fusion(%square, %square), kind=kCustom, calls=%product
  %found = bf16[64,64]{1,0} get-tuple-element(%gemm), index=0
  ROOT %next = (s32[], f32[12,64]{1,0}, bf16[12,64]{1,0}, bf16[64,64]{1,0}) tuple(%i, %stack, %written, %found)
}

ENTRY %main (p: (s32[], f32[12,64], bf16[12,64], bf16[64,64])) -> (s32[], f32[12,64], bf16[12,64], bf16[64,64]) {
  %p = (s32[], f32[12,64]{1,0}, bf16[12,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[12,64]{1,0}, bf16[12,64]{1,0}, bf16[64,64]{1,0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""  # noqa: E501


def test_traffic_of_a_program_for_a_gpu():
    """Of slices what is cut or written, in all turns of a loop; of a product no room to work in."""
    found = {each.name: each for each in gpu_traffic.traffic(PROGRAM)}
    assert {name: each.bytes / 12 for name, each in found.items()} == {
        "cut-start": 64 * 4 + 64 * 4 + 4,
        "half": 64 * 4 + 64 * 2,
        "written": 64 * 2 + 64 * 2 + 4,
        "gemm": 3 * 64 * 64 * 2,
    }
    assert {each.turns for each in found.values()} == {12} and found["half"].source == "jit(train_step)/convert"
    assert {name for name, each in found.items() if each.of} == {"gemm"}
