"""Comparing runs: what makes a group, what is said of the difference between two, and what is not."""

import csv
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, Train
from jaxformer import config as config_lib
from jaxformer.commands import main
from jaxformer.config import resolve
from jaxformer.data.batches import Examples, PackedDocuments, ShuffledWindows
from jaxformer.data.corpora import Mixture, TextFiles, TextLines
from jaxformer.data.tables import Fold, Table
from jaxformer.data.tokenizers import Characters, TokenizerFile
from jaxformer.lab.compare import judge
from jaxformer.lab.groups import told
from jaxformer.lab.intervals import estimate, paired_difference, welch_difference
from jaxformer.lab.tables import aligned_table
from jaxformer.learning.objectives import Contrastive, NextToken
from jaxformer.model.heads import EmbeddingHead
from jaxformer.model.implementations import Blocked, Plain
from jaxformer.model.kernels import Softmax
from jaxformer.model.positions import ALiBi, NoPosition, Rotary
from jaxformer.run.starts import sources
from jaxformer.spec import dumps
from jaxformer.user_code import digests
from jaxformer.writers import Writer

STEPS, LAST = 60, 3
BASE = Config(
    "unused",
    Decoder(n_layers=2, n_heads=2, d_model=12, context_length=7),
    Data(TextFiles("one.txt"), batch_size=3),
    train=Train(steps=STEPS, eval_every=STEPS // LAST),
)
TEXTS = {"corpus_sha256": "c0" * 32, "valid_sha256": None, "valid_tokens": 101}


def put(folder, seed, losses, changes=None, texts=None, tokenizer="{}", more=None):
    """A run as it would have left its files: losses are those of its evaluations, the last at the last step."""
    folder.mkdir(parents=True)
    config = resolve(BASE, {**(changes or {}), "train.seed": seed, "directory": str(folder)})
    config_lib.save(config, folder / "config.json")
    (folder / "data.json").write_text(json.dumps(TEXTS | (texts or {})))
    (folder / "tokenizer.json").write_text(tokenizer)
    rows = [{"step": 0, "split": "train", "loss": 9.0, "seconds": 0.5}]
    for step, loss in zip(range(config.train.eval_every, 10**6, config.train.eval_every), losses, strict=False):
        bits = None if loss is None else loss * 2
        rows.append({"step": step, "split": "valid", "loss": loss, "bits_per_byte": bits, "tokens": 101})
    rows[-1] |= more or {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def put_seeds(folder, losses, changes=None, seeds=None, **more):
    for seed, loss in zip(seeds or range(len(losses)), losses, strict=True):
        put(folder / f"seed-{seed}", seed, [loss + 0.5, loss - 0.25, loss], changes, **more)


NEAR, FAR = [2.0, 2.1, 2.3], [1.0, 1.1, 1.4]
ROTARY = {"model.position": Rotary()}


# --- numbers


def test_intervals_and_tests_are_those_of_the_textbook():
    """Here SciPy's, at any error; a mean's interval misses it as often as it says."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, m, error = rng.integers(2, 9), rng.integers(2, 9), rng.uniform(0.01, 0.2)
        a, b, c = rng.normal(2, 0.1, n), rng.normal(2, 0.3, m), rng.normal(2, 0.3, n)
        found = estimate(a, error)
        low, high = stats.t.interval(1 - error, n - 1, a.mean(), stats.sem(a))
        np.testing.assert_allclose([found.mean, found.deviation], [a.mean(), a.std(ddof=1)])
        np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high])
        welch, paired = stats.ttest_ind(b, a, equal_var=False), stats.ttest_rel(c, a)
        for found, wanted in ((welch_difference(a, b, error), welch), (paired_difference(a, c, error), paired)):
            interval = wanted.confidence_interval(1 - error)
            np.testing.assert_allclose(found.p_value, wanted.pvalue)
            np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], interval)
    draws = rng.normal(0, 1, (4000, 3))
    missed = np.mean([abs(found.mean) > found.half_width for found in map(estimate, draws)])
    assert 0.04 < missed < 0.06


def test_few_or_equal_numbers_have_no_interval_and_no_verdict():
    for first, second in (([1.0], [2.0]), ([1.0], [2.0, 3.0]), ([1.0, 1.0], [2.0, 2.0]), ([1.0, 1.0], [1.0, 1.0])):
        for seeds in (0, 7):  # paired, where there are as many, and not
            verdict = judge(dict(enumerate(first)), dict(enumerate(second, seeds)))
            assert not verdict.differ and verdict.said.startswith("no verdict: ")
            assert verdict.difference.half_width is verdict.difference.p_value is None
    assert estimate([1.0]).half_width is estimate([1.0]).deviation is None and estimate([1.0, 1.0]).half_width is None


# --- what is called different, by losses that were measured

# Seeds 0 to 31 of python scripts/train.py configs/shakespeare_cpu.py --model.n_layers=3 --model.d_model=32
# --model.context_length=8 --model.unroll=3 --data.batch_size=32 --optimizer.learning_rate.peak=0.01
# --optimizer.learning_rate.final=0 --train.steps=5000 --seeds=32, as `jaxformer compare --csv` has them
MEASURED = """
    2.0166 2.0157 2.0219 2.0264 2.0280 2.0153 2.0117 2.0127 2.0137 2.0161 2.0043 2.0226 2.0266 2.0163 2.0051 2.0059
    2.0123 2.0188 2.0301 2.0323 2.0107 2.0062 2.0242 2.0145 2.0167 2.0212 2.0208 2.0246 2.0228 2.0108 2.0185 2.0232
"""
LOSSES = np.array(MEASURED.split(), float)


LIKE_EACH_OTHER = 0.61  # correlation of seeds 0 to 7 with those of --model.norm.eps=1.1e-5; with Rotary it is 0.02


def measured(rng, n, count):
    """Groups of n seeds, none of which is in two."""
    return rng.permutation(LOSSES)[: n * count].reshape(count, n)


def normal(rng, n, count):
    """Groups of seeds that there might be as well."""
    return rng.normal(LOSSES.mean(), LOSSES.std(ddof=1), (count, n))


def correlated(rng, n, count):
    """The same seeds in each group, as like each other as those of configs that hardly differ."""
    common, own = normal(rng, n, 1), normal(rng, n, count)
    return np.sqrt(LIKE_EACH_OTHER) * common + np.sqrt(1 - LIKE_EACH_OTHER) * own


def share_called_different(draw, n, paired, pairs, count=2, planted=0.0):
    """Of comparisons of a group with count - 1 others, those in which some is called different."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(pairs):
        first, *others = draw(rng, n, count)
        group = dict(enumerate(first))
        more = [dict(enumerate(other + planted, 0 if paired else n)) for other in others]
        called += any(judge(group, each, tests=len(more)).differ for each in more)
    return called / pairs


DRAWS = [(measured, False), (normal, False), (normal, True), (correlated, True)]


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize(("draw", "paired"), DRAWS)
def test_seldom_is_one_of_equal_configs_called_different(draw, paired, n):
    """5 % are meant; in 200 pairs one may see up to 8 %. Of three tests at once no more."""
    assert share_called_different(draw, n, paired, pairs=200) <= 0.08
    assert 0.02 < share_called_different(draw, n, paired, pairs=800) <= 0.065
    assert share_called_different(draw, n, paired, pairs=200, count=4) <= 0.08


@pytest.mark.parametrize(("draw", "paired"), DRAWS)
def test_a_difference_of_two_hundredths_of_a_nat_is_found_with_eight_seeds(draw, paired):
    for planted in (0.02, -0.02):
        assert share_called_different(draw, 8, paired, pairs=200, planted=planted) >= 0.8


# --- what makes a group


def test_seeds_places_and_what_changes_no_number_make_no_group(tmp_path):
    free = {
        "train.log_every": 3,
        "train.keep": 5,
        "train.steps_per_call": 1,
        "model.unroll": 1,
        "train.sample_tokens": 1,
    }
    put(tmp_path / "a" / "seed-10", 10, NEAR)
    put(tmp_path / "a" / "seed-2", 2, NEAR, free)
    put(tmp_path / "b-0", 0, NEAR, ROTARY)
    put(tmp_path / "b-1", 1, NEAR, ROTARY | {"data.corpus.path": "moved.txt"})
    put(tmp_path / "c", 5, NEAR, {"data.corpus.path": "other.txt"}, {"corpus_sha256": "d1" * 32})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text("{}")  # of something else
    found = jaxformer.compare(tmp_path)
    assert [line["seed"] for line in csv.DictReader(found.csv().splitlines())] == ["2", "10", "0", "1", "5"]
    assert [(row["name"].removeprefix(f"{tmp_path}/"), row["seeds"]) for row in found.rows] == [
        ("a", [2, 10]),
        ("b", [0, 1]),
        ("c", [5]),
    ]
    rotary = {"class": "jaxformer.model.positions:Rotary"}
    assert {path: values for path, values in found.differences.items() if path != "model.position"} == {
        "data.corpus.path": ["one.txt", "one.txt", "other.txt"],
        "data.corpus_sha256": ["c0" * 6, "c0" * 6, "d1" * 6],
    }
    assert [value.items() >= rotary.items() for value in found.differences["model.position"]] == [False, True, False]


def test_the_code_of_what_does_not_train_is_not_recorded():
    config = dataclasses.replace(BASE, writers=(Nowhere(),), model=dataclasses.replace(BASE.model, position=Own()))
    names = sources(config)
    assert {**digests(config), **names} == digests(config)
    assert any(name.endswith(":Own") for name in names) and not any("Nowhere" in name for name in names)


class Own(NoPosition):
    """A stranger's."""


class Nowhere(Writer):
    def open(self, directory, config, step):
        raise NotImplementedError


def test_runs_of_other_code_are_another_group(tmp_path):
    """Of one of the user's parts: its class is the same in both configs, and was edited between."""
    for name in ("a", "b"):
        put_seeds(tmp_path / name, NEAR)
        for seed in range(3):
            start = json.dumps({"step": 0, "sources": {"mine:Part": name * 64}})
            (tmp_path / name / f"seed-{seed}" / "starts.jsonl").write_text(f"{start}\n")
    found = jaxformer.compare(tmp_path)
    assert [row["seeds"] for row in found.rows] == [[0, 1, 2]] * 2
    assert found.differences == {"sources.mine:Part": ["a" * 12, "b" * 12]}


def test_a_run_that_went_on_with_other_code_is_of_neither(tmp_path):
    """A start that made no step, as of a part that failed, does not count."""
    starts = {
        "new": [(0, "a"), (0, "b")],
        "both": [(0, "a"), (20, "b")],
        "old": [(0, "a"), (20, "a"), (STEPS, "b")],  # the last for an evaluation that was owed
        "newer": [(0, "b")],
    }
    for name, rows in starts.items():
        put(tmp_path / name, 0 if name != "newer" else 1, [2.0, 2.0, 2.0])
        lines = [json.dumps({"step": step, "sources": {"mine:Part": code * 64}}) for step, code in rows]
        (tmp_path / name / "starts.jsonl").write_text("\n".join(lines))
    found = jaxformer.compare(tmp_path)
    assert [[Path(record.directory).name for record in group.records] for group in found.groups] == [
        ["both"],
        ["new", "newer"],
        ["old"],
    ]
    assert found.differences["sources.mine:Part"][0] == f"{'a' * 12}, then {'b' * 12}"


def test_the_first_group_with_a_number_is_compared_with_and_seeds_are_in_order(tmp_path):
    put(tmp_path / "a" / "seed-0", 0, [2.0])  # unfinished
    for seed in (2, 0, 1):
        put(tmp_path / "b" / f"{2 - seed}", seed, [0.0] * 2 + [NEAR[seed]], ROTARY)
    put_seeds(tmp_path / "c", FAR, {"model.position": ALiBi()})
    found = jaxformer.compare(tmp_path)
    assert [row["seeds"] for row in found.rows] == [[0, 1, 2], [0, 1, 2], []]
    assert found.verdicts[0].said == "lower" and "no run with" in found.verdicts[1].said
    assert json.loads(found.json())["groups"][0]["final"] == NEAR


@pytest.mark.parametrize("changes", [{"train.guard.spike": 3.0}, {"train.guard": None}])
def test_what_may_change_when_a_run_resumes_but_changes_what_is_learned_makes_a_group(tmp_path, changes):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, changes)
    assert [row["seeds"] for row in jaxformer.compare(tmp_path).rows] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("several", [False, True])
def test_how_attention_is_computed_makes_no_group(tmp_path, several):
    """That of one kernel, or of one of several."""
    for name, seeds, implementation in (("a", (0, 1), Plain()), ("b", (2, 3), Blocked(7))):
        kernel = Softmax(implementation=implementation)
        for seed in seeds:
            changes = {"model.kernel": (kernel, Softmax()) if several else kernel}
            put(tmp_path / name / str(seed), seed, [1.0, 1.0, 1.0], changes)
    assert [row["seeds"] for row in jaxformer.compare(tmp_path).rows] == [[0, 1, 2, 3]]


def test_the_first_that_is_named_comes_first_and_each_counts_once(tmp_path):
    put_seeds(tmp_path / "a", FAR)
    put_seeds(tmp_path / "b", NEAR, ROTARY)
    names = lambda *paths: [row["name"].removeprefix(f"{tmp_path}/") for row in jaxformer.compare(paths).rows]
    assert names(tmp_path) == names(tmp_path / "a", tmp_path / "b") == ["a", "b"]
    again = [str(tmp_path / "b" / "seed-1"), tmp_path, tmp_path / "a" / ".." / "b"]
    assert names(*again) == ["b", "a"]
    assert [row["seeds"] for row in jaxformer.compare(again).rows] == [[0, 1, 2]] * 2


def test_a_split_that_follows_the_seed_is_no_other_config(tmp_path):
    """As `Row.also` makes it; its groups are compared where the seeds, and so the splits, are the same."""
    documents = {"data.sampling": PackedDocuments()}
    for name, changes in (("a", {}), ("b", ROTARY)):
        for seed in range(3):
            own = documents | changes | {"data.split_seed": seed}
            put(tmp_path / name / f"seed-{seed}", seed, [1.0, 1.0, 1 + seed / 9 + len(changes) + seed**2 / 99], own)
    found = jaxformer.compare(tmp_path)
    assert [row["seeds"] for row in found.rows] == [[0, 1, 2]] * 2 and found.verdicts[0].paired
    assert found.differences.keys() == {"model.position"}
    put(tmp_path / "c" / "seed-7", 7, [1.0, 1.0, 1.0], documents | {"data.split_seed": 7, "model.d_ff": 11})
    put(tmp_path / "c" / "seed-8", 8, [1.0, 1.0, 1.1], documents | {"data.split_seed": 8, "model.d_ff": 11})
    assert jaxformer.compare(tmp_path).verdicts[1].said == "no verdict: the validation texts differ"


def test_seeds_of_their_own_part_of_a_table_begun_with_runs_of_their_own_are_a_group(tmp_path):
    """As the experiments' rows are: the fold follows the seed, and so do the tokenizer and where a run begins."""
    for name, changes in (("a", {}), ("b", ROTARY)):
        for seed in range(3):
            lender = f"runs/lender/seed-{seed}"
            own = {"data.corpus": Fold("t.csv", "text", fold=seed), "data.split_seed": seed, "init_from": lender}
            own |= changes | {"data.tokenizer": TokenizerFile(f"{lender}/tokenizer.json")}
            losses, texts = [1.0, 1.0, 1 + seed / 9 + len(changes) + seed**2 / 99], {"corpus_sha256": f"{seed}c" * 32}
            put(tmp_path / name / f"seed-{seed}", seed, losses, own, texts, f'{{"of": {seed}}}')
    found = jaxformer.compare(tmp_path)
    assert [row["seeds"] for row in found.rows] == [[0, 1, 2]] * 2 and found.verdicts[0].paired
    assert found.differences.keys() == {"model.position"}


def test_seeds_begun_with_one_run_are_a_group_whatever_its_seed(tmp_path):
    for name, changes in (("a", {}), ("b", ROTARY)):
        for seed in range(3):
            own = {"init_from": "runs/lender/seed-0"} | changes
            own |= {"data.tokenizer": TokenizerFile("runs/lender/seed-0/tokenizer.json")}
            put(tmp_path / name / f"seed-{seed}", seed, [1.0, 1.0, 1 + seed / 9 + len(changes) + seed**2 / 99], own)
    found = jaxformer.compare(tmp_path)
    assert [row["seeds"] for row in found.rows] == [[0, 1, 2]] * 2 and found.differences.keys() == {"model.position"}
    put(tmp_path / "c" / "seed-1", 1, [1.0, 1.0, 1.0], ROTARY | {"init_from": "runs/lender/seed-1"})
    put(tmp_path / "c" / "seed-2", 2, [1.0, 1.0, 1.0], ROTARY | {"init_from": "runs/lender/seed-0"})
    assert [row["seeds"] for row in jaxformer.compare(tmp_path / "c").rows] == [[1], [2]]


def test_what_differs_is_told_by_path_as_deep_as_the_classes_are_the_same(tmp_path):
    for i, changes in enumerate(
        (
            {"model.position": (Rotary(), NoPosition())},
            {"model.position": (Rotary(base=500.0), NoPosition()), "model.dropout": 0.5},
            {"model.position": (Rotary(), ALiBi())},
            {"model.position": Rotary()},
        )
    ):
        put(tmp_path / str(i), 0, NEAR, changes)
    named = lambda *which: jaxformer.compare([tmp_path / i for i in which]).differences
    assert named("0", "1") == {"model.dropout": [0.0, 0.5], "model.position.0.base": [10000.0, 500.0]}
    assert list(named("0", "2")) == ["model.position.1"] and list(named("0", "1", "3")) == [
        "model.dropout",
        "model.position",
    ]
    texts = [told(value) for value in named("1", "2", "3")["model.position"]]
    assert texts == ["Rotary(base=500.0), NoPosition()", "Rotary(), ALiBi()", "Rotary()"]


def test_parts_of_a_module_that_is_not_there_are_compared_as_they_are_stored(tmp_path):
    put_seeds(tmp_path / "a", NEAR, ROTARY)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    for path in tmp_path.glob("b/*/config.json"):
        stored = json.loads(path.read_text())
        stored["model"]["position"] = {"class": "nowhere:Decay", "rate": 0.5}
        path.write_text(json.dumps(stored))
    found = jaxformer.compare(tmp_path)
    (difference,) = found.differences.items()
    assert difference[0] == "model.position" and told(difference[1][1]) == "Decay(rate=0.5)"
    assert found.verdicts[0].said == "lower" and "nowhere" not in sys.modules


# --- what is said of a difference


def test_final_and_best_of_each_group_and_the_verdict(tmp_path):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    put_seeds(tmp_path / "c", [2.0, 2.2, 2.2], {"model.dropout": 0.5})
    put_seeds(tmp_path / "d", [2.0, 2.1, 2.2, 2.3], {"model.dropout": 0.25})
    found = jaxformer.compare(tmp_path)
    for row, losses in zip(found.rows, (NEAR, FAR, [2.0, 2.2, 2.2], [2.0, 2.1, 2.2, 2.3]), strict=True):
        interval = stats.t.interval(0.95, len(losses) - 1, np.mean(losses), stats.sem(losses))
        wide = np.ptp(interval) / 2
        wanted = [np.mean(losses), wide, np.mean(losses) - 0.25, wide, np.std(losses, ddof=1)]
        names = ("final_loss", "final_half_width", "best_loss", "best_half_width", "final_deviation")
        np.testing.assert_allclose([row[name] for name in names], wanted)
    assert [(v.said, v.paired) for v in found.verdicts] == [
        ("lower", True),
        ("no difference shown", True),
        ("no difference shown", False),
    ]
    paired = stats.ttest_rel(FAR, NEAR)
    np.testing.assert_allclose(found.rows[1]["p_value"], paired.pvalue)
    low, high = paired.confidence_interval(1 - 0.05 / 3)  # of three tests
    np.testing.assert_allclose(found.rows[1]["difference_half_width"], (high - low) / 2)
    assert "intervals are at 98.33 %" in str(found)


def test_more_is_better_of_an_accuracy_and_the_whole_split_counts(tmp_path):
    for name, changes in (("a", {}), ("b", {"model.dropout": 0.5})):
        for seed in range(3):
            whole = {"split": "valid_full", "step": STEPS, "loss": 3.0, "accuracy": 0.5 + seed / 100, "tokens": 999}
            own = changes | {"data.valid_tokens": 50}
            put(tmp_path / name / str(seed), seed, [1.0, 1.0, 1.0], own, more={"accuracy": 0.6})
            with open(tmp_path / name / str(seed) / "metrics.jsonl", "a") as file:
                file.writelines(
                    json.dumps(row) + "\n" for row in ({"split": "valid", "step": 1, "accuracy": 0.9}, whole)
                )
    (row, _) = jaxformer.compare(tmp_path, by="accuracy").rows
    assert row["final_accuracy"] == pytest.approx(0.51) and row["best_accuracy"] == pytest.approx(0.9)
    assert "best accuracy: the greatest of" in str(jaxformer.compare(tmp_path, by="accuracy"))
    assert jaxformer.compare(tmp_path).rows[0]["final_loss"] == 3.0
    assert jaxformer.compare(tmp_path).rows[0]["best_loss"] == 1.0


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"tokenizer": "other"}, "the tokenizers differ, and so do their tokens; compare with by=bits_per_byte"),
        ({"changes": {"data.valid_fraction": 0.2}}, "the validation texts differ"),
        ({"texts": {"corpus_sha256": "d1" * 32}}, "the validation texts differ"),
        ({"changes": {"data.sampling": PackedDocuments()}}, "the validation texts differ"),
        ({"changes": {"data.sampling": ShuffledWindows()}}, None),
        ({"changes": {"objective": NextToken(z_loss=0.1)}}, None),
        ({"changes": {"data.split_seed": 5, "model.dropout": 0.5}}, None),  # draws no windows
        ({"changes": {"train.steps": 90, "train.eval_every": 30}}, None),
    ],
)
def test_only_what_measures_the_same_is_compared(tmp_path, second, said):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, **second)
    found = jaxformer.compare(tmp_path)
    assert found.verdicts[0].said == (f"no verdict: {said}" if said else "lower")
    assert (found.verdicts[0].difference is None) == (said is not None)
    if "tokenizer" in second:
        bits = jaxformer.compare(tmp_path, by="bits_per_byte")
        assert bits.verdicts[0].said == "lower" and any("Tokenizers differ" in note for note in bits.notes)
    assert any("different numbers of steps (60, 90)" in n for n in found.notes) == ("train.steps" in str(second))


EXAMPLES = {"data.sampling": Examples()}
PAIRS = EXAMPLES | {
    "data.corpus": Table("pairs.csv", target="answer"),
    "model": Encoder(n_layers=1, n_heads=2, d_model=12, context_length=7, head=EmbeddingHead()),
    "objective": Contrastive(),
}


@pytest.mark.parametrize(
    ("both", "second", "said"),
    [
        (
            EXAMPLES,
            {"changes": {"data.window": 5}, "more": {"tokens": 77}},
            "the validation texts are cut at other lengths",
        ),
        (EXAMPLES, {"changes": {"data.window": 5}}, None),  # none is as long
        (PAIRS, {"changes": {"data.batch_size": 5}}, "the objectives differ, and so does what is measured"),
        (
            PAIRS,
            {"changes": {"data.sampling": Examples(n_buckets=2)}},
            "the objectives differ, and so does what is measured",
        ),
        (PAIRS, {"changes": ROTARY}, None),
    ],
)
def test_what_an_evaluation_asks_is_part_of_what_it_measures(tmp_path, both, second, said):
    put_seeds(tmp_path / "a", NEAR, both)
    put_seeds(tmp_path / "b", FAR, **second | {"changes": both | second["changes"]})
    assert jaxformer.compare(tmp_path).verdicts[0].said == (f"no verdict: {said}" if said else "lower")


def test_a_number_that_nothing_was_asked_for_is_no_divergence(tmp_path):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    put(tmp_path / "b" / "seed-3", 3, [2.0, None], ROTARY, more={"tokens": 0})
    put(tmp_path / "b" / "seed-4", 4, [2.0, 1.9], ROTARY, more={"split": "train", "loss": None, "weight": 0})
    found = jaxformer.compare(tmp_path)
    left_out = [note.removeprefix(f"left out: {tmp_path}/b/") for note in found.notes if "left out" in note]
    assert left_out == [f"seed-{i}: seed {i} unfinished: at step 40 of 60" for i in (3, 4)]
    assert found.verdicts[0].said == "lower"


def test_a_group_without_a_number_on_the_way_has_the_last_as_its_best(tmp_path):
    changes = {"data.valid_tokens": 7}
    put(tmp_path / "a" / "seed-0", 0, [None, None, 2.0], changes, more={"split": "valid_full"})
    (row,) = jaxformer.compare(tmp_path).rows
    assert row["final_loss"] == row["best_loss"] == 2.0


def test_a_tokenizer_that_has_gained_a_field_is_the_same(tmp_path):
    now = dumps(Characters(alphabet="ab"))
    before = json.dumps({name: value for name, value in json.loads(now).items() if name != "unknown_token"})
    for seed, tokenizer in enumerate((before, now)):
        put(tmp_path / str(seed), seed, [2.0, 1.9, 1.8], tokenizer=tokenizer)
    assert before != now and jaxformer.compare(tmp_path).rows[0]["seeds"] == [0, 1]


class Focused(NextToken):
    gamma: float = 2.0
    measures = NextToken


class Halved(Focused):
    """It may ask for other tokens, and does not say that it measures the same."""


def test_an_objective_may_say_that_it_measures_what_another_does(tmp_path):
    """A class that is not imported cannot say it: then it is told which module to import."""
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, {"objective": Focused()})
    found = jaxformer.compare(tmp_path)
    assert found.verdicts[0].said == "lower" and list(found.differences) == ["objective"]
    put_seeds(tmp_path / "c", FAR, {"objective": Halved()})
    assert jaxformer.compare(tmp_path).verdicts[1].said.endswith("the objectives differ, and so does what is measured")
    shutil.rmtree(tmp_path / "c")
    for path in tmp_path.glob("b/*/config.json"):
        path.write_text(path.read_text().replace(f"{Focused.__module__}:Focused", "their_loss:Focused"))
    assert jaxformer.compare(tmp_path).verdicts[0].said == (
        "no verdict: the objectives differ, and so does what is measured; --import=their_loss may tell more"
    )


def test_an_objective_of_another_kind_measures_something_else(tmp_path):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    for path in tmp_path.glob("b/*/config.json"):
        path.write_text(path.read_text().replace("objectives:NextToken", "objectives:PrefixLM"))
    assert jaxformer.compare(tmp_path).verdicts[0].said == (
        "no verdict: the objectives differ, and so does what is measured"
    )


def test_runs_without_a_final_number_are_told_and_do_not_count(tmp_path):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    put(tmp_path / "b" / "seed-3", 3, [2.0, 1.5], ROTARY)
    put(tmp_path / "b" / "seed-4", 4, [], ROTARY)
    (tmp_path / "b" / "seed-4" / "metrics.jsonl").unlink()
    put(tmp_path / "b" / "twice", 1, [5.0, 5.0, 5.0], ROTARY)
    found = jaxformer.compare(tmp_path)
    assert found.rows[1]["seeds"] == [0, 1, 2] and found.verdicts[0].said == "lower" and found.verdicts[0].paired
    left_out = [note.removeprefix(f"left out: {tmp_path}/b/") for note in found.notes if "left out" in note]
    assert left_out == [
        "seed-3: seed 3 unfinished: at step 40 of 60",
        "seed-4: seed 4 has no rows: not begun",
        f"twice: seed 1 counts already, in {tmp_path}/b/seed-1",
    ]
    put(tmp_path / "b" / "seed-5", 5, [2.0, 1.5, None], ROTARY)
    put(tmp_path / "b" / "seed-6", 6, [2.0, None], ROTARY)
    put(tmp_path / "c" / "seed-0", 0, [2.0, 1.5], {"model.dropout": 0.5})
    put(tmp_path / "d" / "seed-0", 0, [2.0, 1.5, 1.4], {"model.dropout": 0.25}, more={"accuracy": 0.5})
    found = jaxformer.compare(tmp_path, by="accuracy")
    assert f"left out: {tmp_path}/a/seed-0: seed 0 has no accuracy" in found.notes
    shutil.rmtree(tmp_path / "d")
    found = jaxformer.compare(tmp_path)
    assert f"left out: {tmp_path}/b/seed-5: seed 5 diverged: no finite number at step 60" in found.notes
    assert f"left out: {tmp_path}/b/seed-6: seed 6 diverged: no finite number at step 40" in found.notes
    assert [v.said for v in found.verdicts] == [
        "no verdict: a run diverged, and the mean of the others would hide it",
        "no verdict: no run with a final number",
    ]
    assert found.rows[2]["final_loss"] is None and "nan" not in str(found) + found.json()


def test_a_run_that_the_guard_has_ended_is_no_unfinished_one(tmp_path):
    """Its losses may all be finite."""
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    put(tmp_path / "b" / "seed-3", 3, [2.0, 1.5], ROTARY, more={"split": "diverged"})
    found = jaxformer.compare(tmp_path)
    assert (
        f"left out: {tmp_path}/b/seed-3: seed 3 diverged: too many updates skipped in a row at step 40" in found.notes
    )
    assert found.verdicts[0].said.startswith("no verdict: a run diverged")


@pytest.mark.parametrize("weights", [(0.5, 0.5), (2.0, 6.0)])
def test_mixtures_are_compared_if_their_texts_count_alike(tmp_path, weights):
    parts = TextLines("a.txt"), TextLines("b.txt")
    loss = {"loss_a": 1.0}
    put(tmp_path / "a" / "0", 0, [2.0, 1.9, 1.8], {"data.corpus": Mixture(parts, (0.25, 0.75))}, more=loss)
    put(tmp_path / "b" / "0", 0, [2.0, 1.9, 1.7], {"data.corpus": Mixture(parts, weights), **ROTARY}, more=loss)
    said = lambda by: jaxformer.compare(tmp_path, by=by).verdicts[0].said
    assert "one seed" in said("loss_a") and ("shares" in said("loss")) == (weights == (0.5, 0.5))


def test_a_mixture_whose_files_were_moved_is_of_its_group(tmp_path):
    for seed, folder in enumerate(("x", "y")):
        corpus = Mixture((TextLines(f"{folder}/a.txt"), TextLines(f"{folder}/b.txt")), (0.5, 0.5))
        put(tmp_path / str(seed), seed, [2.0, 1.9, 1.8], {"data.corpus": corpus})
    assert jaxformer.compare(tmp_path).rows[0]["seeds"] == [0, 1]


def test_losses_of_other_tokenizers_are_not_compared_where_no_bytes_are_counted(tmp_path):
    for name, tokenizer, changes in (("a", "{}", None), ("b", '{"x": 1}', ROTARY)):
        put_seeds(tmp_path / name, NEAR, changes, tokenizer=tokenizer)
        for path in (tmp_path / name).rglob("metrics.jsonl"):
            path.write_text(re.sub(r'"bits_per_byte": [^,]*, ', "", path.read_text()))
    (verdict,) = jaxformer.compare(tmp_path).verdicts
    assert verdict.said == "no verdict: the tokenizers differ, and so do their tokens"


def test_a_spread_that_is_but_rounding_is_none():
    alike = lambda *values: dict(enumerate(values))
    for first, second in ((alike(*[0.2] * 3), alike(*[0.9] * 3)), (alike(0.1, 0.2, 0.3), alike(0.2, 0.3, 0.4))):
        assert judge(first, second).said == "no verdict: the seeds are all alike"
    assert judge(alike(*[0.7] * 3), alike(*[0.1] * 4)).said == "no verdict: the seeds are all alike"


# --- forms


@pytest.fixture
def three(tmp_path):
    put_seeds(tmp_path / "a", NEAR)
    put_seeds(tmp_path / "b", FAR, ROTARY)
    put(tmp_path / "c|d", 0, [1.0, 1.0, 1.5], {"model.dropout": 0.5})
    return tmp_path


def command(*arguments):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main.run("compare", list(map(str, arguments))) == 0
    return out.getvalue()


def test_the_command_prints_what_python_gives_in_every_form(three):
    found, before = jaxformer.compare(three), sorted(three.rglob("*"))
    assert command(three) == f"{found}\n" and command(three, "--markdown") == f"{found.markdown()}\n"
    told = json.loads(command(three, "--json"))
    assert told["differences"] == found.differences and told["notes"] == found.notes
    for row, group, losses in zip(told["groups"], found.rows, (NEAR, FAR, [1.5]), strict=True):
        assert row["final"] == losses and row.items() >= group.items()
        assert [path.rpartition("/")[0] for path in row["runs"]][:1] == [row["runs"][0].rpartition("/")[0]]
    text = str(found)
    for part in ("2.1333 ± 0.3795", "-0.9667 ± ", "lower", "no verdict: one seed", "95 % confidence", "optimistic"):
        assert part in text
    assert text.count("± ") == 6 and "c\\|d" in found.markdown()  # two means, two bests, a difference, the note
    assert sorted(three.rglob("*")) == before
    only = jaxformer.compare(three / "a")
    assert "differs" not in str(only) and "Against" not in str(only) and "t-tests" not in str(only)


def test_a_line_for_each_run_and_the_curves(three, tmp_path):
    command(three, f"--csv={tmp_path / 'all.csv'}", f"--picture={tmp_path / 'all.png'}")
    lines = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [float(line["final"]) for line in lines] == [*NEAR, *FAR, 1.5]
    assert [line["seed"] for line in lines] == ["0", "1", "2", "0", "1", "2", "0"]
    assert {line["model.position"] for line in lines if line["group"] == "2"} == {"Rotary()"}
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = jaxformer.compare(three).figure().axes
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "validation loss (nats per token)"
    curves = [line.get_xydata() for line in axes.get_lines()]
    np.testing.assert_allclose(curves[1], [[20, 1.5 + 1 / 6], [40, 11 / 12], [60, 7 / 6]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"{i} {three / name}" for i, name in enumerate(("a", "b", "c|d"), 1)
    ]
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.max() - 1.5 - 1 / 6 == pytest.approx(estimate(FAR).half_width)
    assert np.ptp(axes.collections[2].get_paths()[0].vertices[:, 1]) == pytest.approx(0.5)  # one seed: no band


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is no folder; give the directory of a run"),
        (["empty"], "'empty' holds no run, no config.json beside a data.json"),
        (["a", "--by=acuracy"], "by='acuracy' must be a number of the runs' evaluations: bits_per_byte, loss"),
        (["a", "--json", "--markdown"], "json must not be given beside markdown"),
        (["a", "--csv=x.csv", "--picture=nowhere/x.png"], "picture='nowhere/x.png' must be a file in a folder that"),
        (
            ["a", "--csv=nowhere/x.csv", "--picture=x.png"],
            "csv='nowhere/x.csv' must be a file in a folder that is there",
        ),
        (["a", "--csv=x.csv", "--picture=x.docx"], "picture='x.docx' must end in one of ."),
        (["broken"], "broken/config.json: cannot be read"),
        (["strange"], "strange/config.json: holds no config of a run"),
        (["unfinished", "--csv=x.csv"], "csv: no run has a final loss yet"),
        ([], "the following arguments are required: runs"),
    ],
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capfd, arguments, message):
    put_seeds(tmp_path / "a", NEAR)
    put(tmp_path / "unfinished", 0, [1.0])
    for name, text in (("empty", "{"), ("broken", "{"), ("strange", '{"model": {"class": "x"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        if name != "empty":
            (tmp_path / name / "data.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main.run("compare", list(arguments)) == 2
    out, err = capfd.readouterr()
    assert message in err and err.count("\n") == 1 and out == "" and sorted(tmp_path.rglob("*")) == before


def test_columns_stand_below_each_other():
    text = aligned_table([{"a": 1, "long name": "x"}, {"a": 22222, "long name": ""}])
    assert text == "a      long name\n1      x\n22222"


if __name__ == "__main__":  # the table of docs/experiments.md, of 4,000 pairs in each cell
    columns = [f"{draw.__name__}, {'paired' if paired else 'Welch'}" for draw, paired in DRAWS]
    for planted in (0.0, 0.02):
        for n in (3, 5, 8):
            shares = [share_called_different(*how[:1], n, how[1], 4000, planted=planted) for how in DRAWS]
            shown = ", ".join(f"{name} {share:.1%}" for name, share in zip(columns, shares, strict=True))
            print(f"{planted} nats apart, {n} seeds: called different: {shown}")
