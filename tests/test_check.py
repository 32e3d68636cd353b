"""`jaxformer check`: every preset can be made small, known mistakes are found, and no sound part raises an alarm."""

import dataclasses
import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import pytest
from tiny import SIZES

from jaxformer import config as config_lib
from jaxformer.commands import main
from jaxformer.data.batches import Examples
from jaxformer.lab import check as check_lib
from jaxformer.lab.check import Checked, Finding, check
from jaxformer.lab.devices import batches
from jaxformer.lab.probe import ROWS, Inapplicable, Probe, Wrong, small, with_part
from jaxformer.lab.properties import CHECKS
from jaxformer.learning.by_depth import ByDepth
from jaxformer.learning.groups import Everything, Group, Groups, Lettered
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.model.implementations import Blocked, CuDNN
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import MLP
from jaxformer.model.masks import Both, Local, Prefix
from jaxformer.model.models import Decoder
from jaxformer.run import starts
from jaxformer.run.starts import moved, starts_of
from jaxformer.run.step import Recipe
from jaxformer.spec import InputError

ROOT = Path(__file__).parent.parent
PRESETS = config_lib.presets()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_made_small(name, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFORMER_DATA", str(tmp_path))  # no corpus is read
    config = small(config_lib.resolve(name))
    model = Probe(config).model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert max(model.d_model, model.dims.get("F", 0)) <= 64 and model.n_layers <= 6
    assert sum(a.size for a in jax.tree.leaves(shapes)) < 400_000


def test_masks_at_any_depth_reach_five_tokens_and_dropout_at_any_depth_is_off():
    model = Decoder(**SIZES | {"n_layers": 1}, mask=Both((Prefix(), Local(100))), dropout=0.3)
    config = small(config_lib.Config("x", model))
    assert config.model.mask == Both((Prefix(), Local(5)))
    head = Probe(small(config_lib.resolve("help_topics"))).model.heads[0]
    assert head.dropout == 0.0


def test_layers_that_stay_as_they_are_leave_one_that_learns():
    for optimizer in (ByDepth(still=3), Groups(groups=(Group(Everything(), ByDepth(still=3)),))):
        found = small(config_lib.resolve("quickstart", {"optimizer": optimizer}))
        assert "still=1" in repr(found.optimizer) and found.model.n_layers == 2


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("outside:LearnedPace", "position"),
        ("outside:SinkWithStatistic", "kernel"),
        ("ideas:Experts", "feed_forward"),
        ("ideas:GatedLinear", "mixer"),
        ("ideas:HyperConnections", "residual"),
        ("jaxformer.model.masks:Bidirectional", "mask"),
        ("jaxformer.model.layers:SiLU", "feed_forward.activation"),
        ("jaxformer.model.heads:ClassificationHead", "head"),
    ],
)
def test_a_part_finds_its_place_in_a_model(name, path):
    module, _, part = name.partition(":")
    found = with_part(name).model
    for field in path.split("."):
        found = getattr(found, field)
    assert isinstance(found, getattr(importlib.import_module(module), part))


def test_what_is_no_part_is_refused(capsys):
    assert main.run("check", ["outside:nothing"]) == 2
    assert main.run("check", ["no_such_preset"]) == 2
    assert "neither a file nor a preset" in capsys.readouterr().err


def test_a_finding_is_told_with_where_to_look_and_status_1(monkeypatch, capsys):
    def passes(probe):
        return "fine"

    def fails(probe):
        raise Wrong("1.0 and not 2.0")

    def breaks(probe):
        raise KeyError("x")

    def says_nothing(probe):
        raise Inapplicable("it has none")

    checks = tuple((f.__name__, "the code", f) for f in (passes, fails, breaks, says_nothing))
    monkeypatch.setattr(check_lib, "CHECKS", checks)
    with pytest.raises(SystemExit) as exit_:
        main.run("check", ["quickstart"])
    assert exit_.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "ok      passes: fine",
        "FAILED  fails: 1.0 and not 2.0",
        "        look at the code",
        "FAILED  breaks: KeyError: 'x'",
        "        look at the code",
        "-       says_nothing: it has none",
        "1 passed, 2 failed in 0 s",
    ]
    monkeypatch.setattr(check_lib, "CHECKS", checks[:1])
    assert main.run("check", ["quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True


def test_fields_are_set_beside_a_part(monkeypatch):
    monkeypatch.setattr(check_lib, "CHECKS", (("it", "x", lambda probe: type(probe.model.norm).__name__),))
    assert check("outside:LearnedPace", {"model.norm": "RMSNorm"}).findings[0].detail == "RMSNorm"
    assert check("outside:LearnedPace").findings[0].detail == "LayerNorm"


def test_an_optimizer_that_forgets_its_weight_decay_is_found():
    probe = Probe(small(config_lib.resolve("quickstart", {"optimizer": AdamW(weight_decay=0.1)})))
    run = {name: function for name, _, function in CHECKS}["weight decay as declared"]
    assert "arrays decay" in run(probe)
    forgets = Probe(small(config_lib.resolve("quickstart", {"optimizer": Forgetful(weight_decay=0.1)})))
    with pytest.raises(Wrong, match="does not decay, and is declared to"):
        run(forgets)


def test_groups_of_which_one_decays_nothing_are_no_mistake():
    """Whose optimizer may be of a kind that has no weight decay."""
    groups = Group(Lettered(("F",)), AdamW(weight_decay=0.1)), Group(Everything(), SGD())
    changes = {"optimizer": Groups(groups=groups), "model.feed_forward": MLP(bias=True)}
    probe = Probe(small(config_lib.resolve("quickstart", changes)))
    run = {name: function for name, _, function in CHECKS}["weight decay as declared"]
    assert run(probe).startswith("0 of ")


class Forgetful(AdamW):
    def transform(self, declared, step, steps):
        return dataclasses.replace(AdamW(), weight_decay=0.0).transform(declared, step, steps)


def test_products_of_no_dtype_that_was_asked_for_are_found(monkeypatch):
    config = small(config_lib.resolve("quickstart", {"train.product_dtype": "bfloat16"}))
    run = {name: function for name, _, function in CHECKS}["dtypes as told"]
    assert "or bfloat16" in run(Probe(config))
    monkeypatch.setattr(Recipe, "cast", lambda self, params: params)
    with pytest.raises(Wrong, match=r"none of .* products is in bfloat16"):
        run(Probe(config))


def test_batches_of_unlike_shapes_are_no_mistake():
    changes = {"data.sampling": Examples(n_buckets=2, bucket_steps=1)}
    run = {name: function for name, _, function in CHECKS}["batches follow from the step"]
    run(Probe(small(config_lib.resolve("help_topics", changes))))


def test_batches_of_a_sampling_that_depends_on_the_call_are_found():
    """One check as it is run, on a mistake: the cheapest."""
    probe = Probe(small(config_lib.resolve("quickstart")))
    run = {name: function for name, _, function in CHECKS}["batches follow from the step"]
    assert run(probe).endswith("tokens, each once")
    kind = type(probe.config.data.sampling)
    whole = kind.full_pass
    try:
        kind.full_pass = lambda self, source, size, batch_size, share=1.0: list(whole(self, source, size, batch_size))[
            1:
        ]
        with pytest.raises(Wrong, match="tokens never, and for 0 twice"):
            run(probe)
    finally:
        kind.full_pass = whole


@pytest.mark.parametrize("implementation", [Blocked(), CuDNN()], ids=lambda each: type(each).__name__)
def test_an_implementation_without_dropout_is_checked_with_dropout(implementation):
    """By another; evaluations by its own."""
    config = config_lib.resolve("quickstart", {"model.n_layers": 2})
    kernel = dataclasses.replace(config.model.kernel, implementation=implementation)
    probe = Probe(small(dataclasses.replace(config, model=dataclasses.replace(config.model, kernel=kernel))))
    assert type(probe.model.kernel.implementation) is type(implementation)
    run = {name: function for name, _, function in CHECKS}
    for name in ("scan = unrolled", "dropout as told"):
        run[name](probe)


@pytest.mark.parametrize(
    "what",
    [
        *(pytest.param(what, marks=pytest.mark.rare) for what in ("quickstart", "reverse", "help_topics")),
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("outside:SinkWithStatistic", "ideas:Differential")),
    ],
)
def test_what_is_sound_raises_no_alarm(what):
    found = check(what)
    assert found.sound, str(found)
    assert sum(each.status == "passed" for each in found.findings) >= 12


def test_what_several_checks_stumble_over_is_told_once():
    statuses = ("passed", "failed", "failed", "not applicable", "failed")
    details = ("it holds", "no head", "no head", "no head", "a leak")
    findings = (
        Finding(name, *told, f"part {name}", 0.5) for name, *told in zip("abcde", statuses, details, strict=True)
    )
    assert str(Checked("what", "small", tuple(findings))).splitlines() == [
        "what: small",
        "ok      a: it holds",
        "FAILED  b; c: no head",
        "-       d: no head",
        "FAILED  e: a leak",
        "        look at part e",
        "1 passed, 3 failed in 2 s",
    ]


class Normed(Softmax):
    """What follows the sum of values, in the formula."""

    def formula(self, params, look, key, rate):
        out = super().formula(params, look, key, rate)
        return out._replace(h=out.h / (1e-3 + abs(out.h).mean(-1, keepdims=True)))


def test_a_formula_of_ones_own_is_not_compared_with_another():
    probe = Probe(small(config_lib.resolve("quickstart", {"model.kernel": Normed()})))
    (function,) = (function for name, _, function in CHECKS if name == "attention = its plain form")
    with pytest.raises(Inapplicable, match="its `formula` is its own"):
        function(probe)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask_off_by_one", "cache_slot_late")),
        pytest.param("norms_decay", marks=pytest.mark.rare),
    ],
)
def test_a_mistake_is_found(name, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
    mutations = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = mutations
    spec.loader.exec_module(mutations)
    expected = {
        "mask_off_by_one": "no token sees a later one",
        "cache_slot_late": "cache = full pass",
        "norms_decay": "weight decay as declared",
    }
    assert mutations.found(name)[0] == expected[name]


def test_every_mutation_still_fits_the_source():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
    mutations = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = mutations
    spec.loader.exec_module(mutations)
    assert len(mutations.MUTATIONS) >= 25
    for name, own in mutations.MUTATIONS.items():
        assert own.right in (ROOT / "jaxformer" / own.file).read_text(), name


def test_a_run_that_moves_to_another_machine_says_so(tmp_path):
    config = config_lib.Config(str(tmp_path), Decoder(**SIZES))
    assert moved(config, (), (0,)) is None
    row = {"processor": "Another, 64 cores", "versions": {"jax": "0.0.1"}, "devices": ["gpu:H100"], "code": "0f"}
    starts_of(config.directory).write_text(json.dumps(row | {"XLA_FLAGS": "--of=another"}) + "\n")
    told = moved(config, jax.devices()[:1], (0,))
    assert told.startswith("processor Another, 64 cores then, ")
    assert all(name in told for name in ("devices", "versions", "XLA_FLAGS", "the code of jaxformer"))


def test_a_run_that_goes_on_with_other_code_or_flags_says_so(tmp_path, monkeypatch):
    """Of the package's files, whose version may be the same: of those that a step depends on, not of commands."""
    config = config_lib.Config(str(tmp_path), Decoder(**SIZES))
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b=2")
    starts.record_start(config, 0, (0,), jax.devices(), None)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x  --b=2 --a=1")
    assert moved(config, jax.devices(), (0,)) is None
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    assert moved(config, jax.devices(), (0,)) == "XLA_FLAGS --a=1 --b=2 then, --a=1 now"
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b=2")
    row = json.loads(starts_of(config.directory).read_text())
    starts_of(config.directory).write_text(
        json.dumps({name: value for name, value in row.items() if name != "code"}) + "\n"
    )
    assert moved(config, jax.devices(), (0,)) == "the code of jaxformer"  # of then nothing is known

    package = tmp_path / "jaxformer"
    shutil.copytree(ROOT / "jaxformer", package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, other in {"commands/train.py": False, "declarations.py": True, "model/layers.py": True}.items():
        before = starts.code(package)
        with open(package / file, "a") as written:
            written.write("# changed\n")
        assert (starts.code(package) != before) is other


@pytest.mark.parametrize("devices", range(1, 9))
def test_every_device_has_as_many_rows(devices):
    """Else the rows of a batch are not split, and one device is compared with itself."""
    assert batches(devices) * ROWS % devices == 0


def test_a_field_that_no_check_could_be_made_of_is_refused():
    with pytest.raises(InputError, match="no model takes it"):
        with_part("jaxformer.run.step:Recipe")
