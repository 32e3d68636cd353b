"""Runs that were stored before classes and fields were what they are now."""

import dataclasses
import json

import pytest

from jaxformer import config as config_lib
from jaxformer.config import Config, Data, read, resolve, save
from jaxformer.data.corpora import JSONLines, Mixture, TextFiles
from jaxformer.learning.objectives import Classification, NextToken
from jaxformer.learning.optimizers import AdamW
from jaxformer.model import residuals
from jaxformer.model.baselines import LSTM
from jaxformer.model.heads import ClassificationHead, MeanPooling
from jaxformer.model.layers import MLP, ReLU
from jaxformer.model.models import Decoder, Embedding, Encoder
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.directory import read_classes, read_imported, verify_data
from jaxformer.run.metrics import read_rows
from jaxformer.run.starts import last_start
from jaxformer.spec import InputError, Spec, class_name


class Scaling(Spec):
    scaled: bool = False
    norm: int = 1


class Halved(Decoder):
    """Had fields that are a part's now."""

    scaling: Scaling = Scaling()


class Plain(NextToken):
    """Had a field that meant nothing."""


CONFIG = Config("runs/a", Halved(12, 7, n_layers=2, n_heads=3, scaling=Scaling(True)), objective=Plain())


def stored(path, **changes):
    """The config as a run of before holds it: with {path: value} instead of what stands there."""
    save(CONFIG, path)
    value = json.loads(path.read_text())
    del value["model"]["scaling"]
    for name, new in changes.items():
        value[name].update(new)
    path.write_text(json.dumps(value))
    return path


M, L, H = "jaxformer.model", "jaxformer.model.layers:", "jaxformer.model.heads:"
BEFORE = {  # as a run was stored before feed-forwards, poolings and embeddings were parts by role; the rest is as it is
    "format": 2,
    "class": "jaxformer.config:Config",
    "directory": "runs/a",
    "model": {
        **{"class": f"{M}.models:Encoder", "d_model": 12, "context_length": 7, "n_layers": 2, "n_heads": 3},
        "head": {"class": f"{H}ClassificationHead", "column": "label", "pooling": {"class": f"{H}Pooling"}},
        "feed_forward": {"class": f"{L}FeedForward", "activation": {"class": f"{L}ReLU"}, "bias": True},
        "norm": {"class": f"{L}LayerNorm", "bias": True, "eps": 1e-05},
        **{"scale_embedding": True, "embedding_norm": False, "n_parts": 2},
    },
    "objective": {"class": "jaxformer.learning.objectives:Classification", "label_smoothing": 0.1, "z_loss": 0.0},
}


def test_a_run_of_before_parts_had_roles_opens(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BEFORE))
    model = Encoder(
        *(12, 7, None, ClassificationHead(pooling=MeanPooling())),
        **{"n_layers": 2, "n_heads": 3, "feed_forward": MLP(ReLU(), bias=True)},
        embedding=Embedding(scaled=True, token_types=2),
    )
    assert read(path) == Config("runs/a", model, objective=Classification(0.1))
    path.write_text(json.dumps(BEFORE | {"objective": BEFORE["objective"] | {"z_loss": 0.1}}))
    with pytest.raises(InputError, match=r"z_loss=0\.1 is known no more"):
        read(path)


def test_a_folder_of_before_is_read_with_what_is_skipped_since(tmp_path):
    """Runs of format 2 looked into all visible folders; what they had from the user is theirs."""
    folders = Mixture((TextFiles("a"), JSONLines("b")), (1.0, 1.0))
    config = dataclasses.replace(CONFIG, data=Data(folders, TextFiles("c"), split_seed=None))
    save(config, tmp_path / "config.json")
    value = json.loads((tmp_path / "config.json").read_text())
    for corpus in (*value["data"]["corpus"]["corpora"], value["data"]["valid"]):
        del corpus["skip"], corpus["suffixes"]
    (tmp_path / "config.json").write_text(json.dumps(value | {"format": 2}))
    old = read(tmp_path / "config.json")
    first, second = old.data.corpus.corpora
    assert first.skip == second.skip == old.data.valid.skip == () and second.suffixes == (".jsonl", ".ndjson")
    assert config_lib.as_begun(config, old, 2) == old
    now = dataclasses.replace(config, data=dataclasses.replace(config.data, split_seed=0))
    assert config_lib.as_begun(now, old, 2) == dataclasses.replace(
        old, data=dataclasses.replace(old.data, split_seed=0)
    )
    assert config_lib.as_begun(now, old, 1) == old


def test_an_lstm_of_before_had_no_bias_of_its_own_for_forget_gates(tmp_path):
    config = dataclasses.replace(CONFIG, model=LSTM(d_model=8, context_length=7))
    save(config, tmp_path / "config.json")
    value = json.loads((tmp_path / "config.json").read_text())
    assert value["model"].pop("forget_bias") == 1.0
    (tmp_path / "config.json").write_text(json.dumps(value | {"format": 3}))
    assert read(tmp_path / "config.json").model.forget_bias is None


@pytest.fixture
def changed(monkeypatch):
    monkeypatch.setattr(config_lib, "RENAMED", {"gone:Fast": class_name(AdamW)})
    moved = (Halved, "scale", "scaling", "scaled"), (Halved, "scale_norm", "scaling", "norm")
    monkeypatch.setattr(config_lib, "MOVED_INTO", moved)
    monkeypatch.setattr(config_lib, "DROPPED", ((NextToken, "smoothing", 0.0),))


@pytest.mark.usefixtures("changed")
def test_what_was_renamed_moved_and_dropped_is_found(tmp_path):
    path, moved = tmp_path / "config.json", {"scale": True, "scale_norm": 5}
    found = read(stored(path, model=moved, optimizer={"class": "gone:Fast"}, objective={"smoothing": 0.0}))
    assert found == resolve(CONFIG, {"model.scaling.norm": 5})
    save(found, path)
    assert read(path) == found  # what is stored now is read as it is
    assert not read(stored(path, model={"scale": False})).model.scaling.scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"smoothing": 0.1}}, "Plain.smoothing=0.1 is known no more; take the jaxformer that wrote it"),
        ({"optimizer": {"smoothing": 0.0}}, "AdamW.smoothing: no such field"),
        ({"model": {"scale": 3, "scaling": 3}}, "model.scaling.scaled=3 must be true or false"),
        ({"model": {"scale": {"scale": [True]}}}, "class=None is no spec"),
        ({"model": {"class": ["gone:Fast"]}}, "is no spec"),
    ],
)
@pytest.mark.usefixtures("changed")
def test_what_cannot_be_brought_up_to_date_gets_one_sentence(tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        read(stored(tmp_path / "config.json", **changes))
    assert message in str(error.value) and "config.json: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["PreNorm", "PostNorm", "SandwichNorm", "Parallel"])
def test_residual_rules_of_before_had_another_file(tmp_path, name):
    rule = getattr(residuals, name)()
    path = stored(tmp_path / "config.json", model={"residual": {"class": f"{M}.blocks:{name}"}})
    assert read(path).model.residual == rule


@pytest.mark.parametrize("text", ["{", "9" * 5000, "[" * 100_000])
def test_a_file_that_is_no_json_is_named_and_a_line_that_is_none_is_left_out(tmp_path, text):
    (tmp_path / "7").mkdir()
    for name in ("config.json", "data.json", "imported.json", "metrics.jsonl", "starts.jsonl", "7/manifest.json"):
        (tmp_path / name).write_text(text)
    of_config, of_data = lambda folder: read(folder / "config.json"), lambda folder: verify_data(folder, {})
    for reader in (of_config, of_data, read_classes, read_imported):
        with pytest.raises(InputError, match=r"json:? cannot be read"):
            reader(tmp_path)
    assert read_rows(tmp_path / "metrics.jsonl") == ([], 1) and last_start(tmp_path) == {}
    with pytest.raises(InputError, match=r"7/manifest\.json is damaged"):
        Checkpoints(tmp_path).restore({}, 7)
