"""Models in Hugging Face's layout: read as PyTorch computes them, written as they were read, refused in a sentence.

The stored ones, and what PyTorch makes of them: python scripts/parity.py all --fixtures tests/fixtures/interop.
"""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tiny import decoder, loud

from jaxformer import Config, Data, Train
from jaxformer.commands.main import run as command
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import Mixture, PythonTopics, TextFiles
from jaxformer.data.dialogues import PythonQuestions
from jaxformer.data.tables import Table
from jaxformer.data.templates import PLAIN
from jaxformer.data.tokenizers import BPE, Bytes, Characters, NoTokenizer, Subwords, TokenizerFile
from jaxformer.declarations import by_path
from jaxformer.interop.architecture import Options, explicit
from jaxformer.interop.bert import Bert
from jaxformer.interop.export_folder import QWEN, export_run
from jaxformer.interop.families import ARCHITECTURES
from jaxformer.interop.import_folder import _chat_template, import_run, parameters, read_folder
from jaxformer.interop.llama import Llama, _masks, _position
from jaxformer.interop.tensors import Written, read_header, write_file
from jaxformer.learning.objectives import Masked
from jaxformer.model.heads import (
    ClassificationHead,
    EmbeddingHead,
    FirstToken,
    LanguageHead,
    MaskedLanguageHead,
    MultiLabelHead,
    TokenClassificationHead,
)
from jaxformer.model.layers import MLP, GatedFeedForward, LayerNorm, RMSNorm, SiLU, Tanh
from jaxformer.model.masks import Causal, Window, one_document, places
from jaxformer.model.models import Decoder
from jaxformer.model.positions import ALiBi, Rotary
from jaxformer.run import warm_start
from jaxformer.run.manifest import sha256
from jaxformer.run.opened import Run, open_run
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "fixtures" / "interop"
KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "bert")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import corruption  # noqa: E402
import parity  # noqa: E402


def imported(folder, directory, **how):
    import_run(folder, directory, **how)
    return open_run(directory)


def made(folder, **fields):
    """A run in memory of a small model."""
    tokenizer = fields.pop("tokenizer", NoTokenizer(29))
    model = decoder(**{"n_layers": 2, "vocab_size": None, "norm": RMSNorm()} | fields)
    config = Config(str(folder), model, Data(PythonTopics(), tokenizer=tokenizer), train=Train(steps=1))
    whole = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    return Run(config, tokenizer, TrainState(np.zeros((), np.int32), loud(whole), ()))


def slow_but(*kinds):
    """All kinds, of which these alone are in the default suite: the others differ from them in what forward shows."""
    return [kind if kind in kinds else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def compared(kind, directory, tokens=0, training=False):
    """Differences from PyTorch that are too large; and all of them."""
    expected = dict(np.load(STORED / kind / "expected.npz"))
    mine = parity.ours(imported(STORED / kind, directory), expected, tokens, training)
    found = parity.differences(mine, expected, expected["real"])
    return {name: value for name, value in found.items() if not value <= parity.LIMITS[name]}, found


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_gives_what_its_original_gives(kind, tmp_path):
    wrong, found = compared(kind, tmp_path / "run")
    assert not wrong and found.keys() == {"logits", "hidden"}


@pytest.mark.parametrize("kind", slow_but("mistral"))
def test_an_imported_model_learns_as_its_original_does(kind, tmp_path):
    wrong, found = compared(kind, tmp_path / "run", training=True)
    assert not wrong and found.keys() == {"logits", "hidden", "gradients", "losses"}


@pytest.mark.parametrize("kind", slow_but("gpt2")[:-1])
def test_an_imported_model_writes_what_its_original_writes(kind, tmp_path):
    wrong, found = compared(kind, tmp_path / "run", tokens=24)
    assert not wrong and "greedy" in found
    assert np.load(STORED / kind / "expected.npz")["certain"] >= 20


@pytest.mark.parametrize("kind", slow_but("gpt2"))
def test_what_is_imported_is_exported_byte_for_byte(kind, tmp_path):
    whole, half, back = (tmp_path / name for name in ("whole", "half", "back"))
    run = imported(STORED / kind, tmp_path / "run")
    export_run(run, whole)
    original, again = (read_header(folder / "model.safetensors") for folder in (STORED / kind, whole))
    assert {n: (t.dtype, t.shape) for n, t in original.items()} == {n: (t.dtype, t.shape) for n, t in again.items()}
    for name, tensor in original.items():
        pairs = zip(tensor.rows(), again[name].rows(), strict=True)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in pairs), name
    kinds = [json.loads((folder / "config.json").read_text())["model_type"] for folder in (STORED / kind, whole)]
    assert kinds == [kind, kind]
    about = export_run(run, half, "bfloat16", 4000)
    assert about["files"] > 1 and about["total_bytes"] == 2 * about["n_params"]
    run = imported(half, tmp_path / "again")
    assert export_run(run, back, shard_size=4000)["dtype"] == "bfloat16"
    for path in half.glob("*.safetensors"):
        assert path.read_bytes() == (back / path.name).read_bytes()
    assert json.loads((half / "config.json").read_text()) == json.loads((back / "config.json").read_text())


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in STORED.rglob("*") if path.is_file()) < 300_000


def changed(folder, kind, change=lambda config, tensors: None):
    """A copy of a stored folder with another config.json and other tensors."""
    shutil.copytree(STORED / kind, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        n: np.concatenate([a for _, a in t.rows()]).reshape(t.shape)
        for n, t in read_header(folder / "model.safetensors").items()
    }
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    write_file(
        folder / "model.safetensors", {n: Written(a.shape, lambda a=a: a) for n, a in tensors.items()}, "float32"
    )
    return folder


def test_all_that_is_wrong_with_tensors_is_told_at_once(tmp_path):
    def change(config, tensors):
        tensors["transformer.more.weight"] = np.zeros(3, np.float32)
        del tensors["transformer.ln_f.bias"], tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:, :-1]

    folder = changed(tmp_path / "folder", "gpt2", change)
    with pytest.raises(InputError) as told:
        import_run(folder, tmp_path / "run")
    for name in ("missing: transformer.h.1.ln_2.bias, transformer.ln_f.bias", "not known: transformer.more.weight"):
        assert name in str(told.value)
    assert "misshapen: transformer.wpe.weight is F32[32, 11], not F32/BF16/F16[32, 12]" in str(told.value)
    assert not (tmp_path / "run").exists()


def test_all_options_that_are_not_supported_are_told_at_once(tmp_path, capsys):
    def change(config, tensors):
        config |= {"hidden_act": "mish", "num_attention_heads": 0, "rope_parameters": {"rope_type": "yarn", "beta": 3}}

    folder = changed(tmp_path / "folder", "llama", change)
    assert command("import", [str(folder), str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    for part in ("hidden_act='mish'", "num_attention_heads=0", "rope_type='yarn'", "rope_parameters.beta is not known"):
        assert part in told
    assert not (tmp_path / "run").exists()


def test_a_run_is_imported_once_and_has_no_text_of_its_own(tmp_path, capsys):
    run = tmp_path / "run"
    assert command("import", [str(STORED / "gpt2"), str(run)]) == 0
    assert command("evaluate", [str(run)]) == 2
    assert "NoCorpus has no text" in capsys.readouterr().err
    assert command("import", [str(STORED / "gpt2"), str(run)]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_names_of_a_trunk_alone_and_of_the_first_years_are_known(tmp_path):
    def bare(config, tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.zeros((1, 1, 32, 32), np.float32)

    def old(config, tensors):
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name)

    for kind, change in (("gpt2", bare), ("bert", old)):
        found, right = (parameters(read_folder(f)) for f in (changed(tmp_path / kind, kind, change), STORED / kind))
        assert sha256(found) == sha256(right)


def test_what_a_classifier_of_bert_says_is_read_from_its_problem_type(tmp_path):
    classes = {"id2label": {"0": "rude", "1": "kind"}}
    names = ["classifier.weight", "bert.pooler.dense.weight"]
    for kind, more in (
        (ClassificationHead, {}),
        (ClassificationHead, {"problem_type": "single_label_classification"}),
        (MultiLabelHead, {"problem_type": "multi_label_classification"}),
    ):
        options = Options(classes | more)
        model = explicit(Bert().model(options, names))
        assert type(model.head) is kind and model.head.classes == ("rude", "kind") and not options.problems
        written = Bert().options(model)
        assert Bert().model(Options(json.loads(json.dumps(written))), names).head == model.head
    for wrong in ({"problem_type": "regression"}, {"id2label": {"0": "LABEL_0"}}):
        options = Options(classes | wrong)
        Bert().model(options, names)
        assert len(options.problems) == 1


POOLED = {"pooling": FirstToken(), "hidden": 12, "activation": Tanh()}
FOLLOWS = ClassificationHead("next_sentence", ("yes", "no"), **POOLED)
TOPIC = ClassificationHead("topic", ("a", "b", "c"), dropout=0.3, **POOLED)
MASKED = MaskedLanguageHead(norm=LayerNorm(eps=1e-6))
POOLER = EmbeddingHead(FirstToken(), 12, Tanh(), unit=False)
HEADS = {
    "BertForMaskedLM": MASKED,
    "BertForPreTraining": (MASKED, FOLLOWS),
    "BertForNextSentencePrediction": FOLLOWS,
    "BertForSequenceClassification": TOPIC,
    "BertForTokenClassification": TokenClassificationHead("tag", ("a", "b", "c")),
    "BertModel": POOLER,
}


def encoder(directory, head, tokenizer=NoTokenizer(29)):  # noqa: B008
    """A run in memory of the stored BERT with other heads."""
    model = dataclasses.replace(read_folder(STORED / "bert").model, head=head, vocab_size=None)
    data = Data(PythonTopics(), tokenizer=tokenizer, sampling=Examples())
    objective = Bert().objective(model)
    objective = Masked(mask=1) if objective == Masked() else objective
    config = Config(str(directory), model, data, objective, train=Train(steps=1))
    whole = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    return Run(config, tokenizer, TrainState(np.zeros((), np.int32), loud(whole), ()))


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_bert_are_written_under_the_class_that_has_them(name, tmp_path):
    run = encoder(tmp_path / "run", HEADS[name])
    export_run(run, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"] == [name]
    found = read_folder(tmp_path / "folder")
    head = run.model.head
    assert found.model.head == (dataclasses.replace(head, column="label") if name.endswith("Classification") else head)
    one, other = (by_path(each) for each in (parameters(found), run.state.params))
    plain = lambda path: path.replace("_topic", "_label").replace("_tag", "_label")
    assert {plain(path) for path in other} == set(one)
    assert all(np.array_equal(one[plain(path)], array) for path, array in other.items())


def test_an_imported_encoder_is_evaluated_on_a_table(tmp_path):
    """A classifier by its own classes, vectors by pairs."""
    (tmp_path / "t.csv").write_text("text,label,more\n5 6,b,7\n7 8,a,5 6\n9,b,3 4\n")
    for name, how, says in (
        ("BertForSequenceClassification", {"labels": ("label",)}, "accuracy"),
        ("BertModel", {"target": "more"}, "accuracy"),
    ):
        export_run(encoder(tmp_path / "made", HEADS[name]), tmp_path / name)
        run = imported(tmp_path / name, tmp_path / f"{name}_run", window=16)
        found = run.evaluate(Table(str(tmp_path / "t.csv"), **how))
        assert found["examples"] == 3 and 0 <= found[says] <= 1
        rows = run.predict(["5 6", "7 8", "9"])
        if how.keys() == {"labels"}:
            assert found[says] == pytest.approx(
                np.mean([row["label"] == c for row, c in zip(rows, "bab", strict=True)])
            )


@pytest.mark.parametrize("head", [(MASKED, TOPIC), (FOLLOWS, POOLER), (FOLLOWS, TOPIC)])
def test_heads_that_no_class_of_bert_has_together_are_refused(head, tmp_path):
    with pytest.raises(InputError, match=r"bert has not .*model\.head=\("):
        export_run(encoder(tmp_path / "run", head), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_pooler_that_no_head_reads_is_left_out(tmp_path):
    """As transformers does: of a classifier of tokens, and of a masked model alone."""

    def tags(config, tensors):
        for name in [name for name in tensors if name.startswith("cls.")]:
            del tensors[name]
        tensors |= {"classifier.weight": np.ones((3, 12), np.float32), "classifier.bias": np.zeros(3, np.float32)}
        config |= {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "PER", "2": "LOC"}}

    def masked(config, tensors):
        del tensors["cls.seq_relationship.weight"], tensors["cls.seq_relationship.bias"]

    run = imported(changed(tmp_path / "tags", "bert", tags), tmp_path / "run")
    assert run.model.head == TokenClassificationHead("label", ("O", "PER", "LOC"), dropout=0.1)
    assert [len(row["label"]) for row in run.predict("5 6 7")] == [5]  # with what frames a text
    assert read_folder(changed(tmp_path / "masked", "bert", masked)).model.head == MASKED


def test_an_imported_run_that_tells_texts_apart_is_asked_pairs(tmp_path):
    """Its second text has the other token type; whether it was trained on pairs no file says."""
    run = imported(STORED / "bert", tmp_path / "run", window=16)
    one, pair, joint = run.predict("5 6")[0], run.predict("5 6", "7 8")[0], run.predict("5 6 7 8")[0]
    assert len({row["next_sentence probabilities"]["yes"] for row in (one, pair, joint)}) == 3
    (tmp_path / "pairs.csv").write_text("text,more\n5 6,7 8\n")
    pairs = run.predict(Table(str(tmp_path / "pairs.csv"), target="more"))
    chance = lambda row: row["next_sentence probabilities"]["yes"]
    assert chance(pairs[0]) == chance(pair) and chance(run.predict(Table(str(tmp_path / "pairs.csv")))[0]) == chance(
        one
    )
    ids, second = run._pair("5 6", "7 8")
    assert len(run.attention("5 6", "7 8").tokens) == len(ids)
    at = places(jnp.ones((1, len(ids)), jnp.int32), (jnp.arange(len(ids)) >= second)[None].astype(jnp.int32))
    h = run.model.hidden(run.eval_params, jnp.array([ids]), at).h
    head = run.model.head_of(ClassificationHead)
    expected = jax.nn.softmax(run.model.read(run.eval_params, head, h, jnp.ones((1, len(ids)), bool)))
    np.testing.assert_allclose(chance(pair), expected[0, 0], rtol=1e-5)
    with pytest.raises(InputError, match="single texts: leave the second out"):
        encoder(tmp_path / "own", POOLER).predict("5", "6")


def test_an_encoder_is_exported_with_the_frame_of_its_texts(tmp_path):
    """What transformers reads puts [CLS] and [SEP] where the run does, and tells a second text from a first."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", *(f"x{i}" for i in range(22))]
    folder = changed(tmp_path / "bert", "bert")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(words))
    bert = imported(folder, tmp_path / "run")
    for number, run in enumerate((bert, encoder("run", MASKED, BPE(300, mask_token=True).fit(["the fox"])))):
        out = tmp_path / str(number)
        export_run(run, out)
        library, about = (out / name for name in ("tokenizer.json", "tokenizer_config.json"))
        library, about = tokenizers.Tokenizer.from_file(str(library)), json.loads(about.read_text())
        assert library.encode("the").ids == run.tokenizer.document("the")
        both, (ids, second) = library.encode("the", "fox"), run._pair("the", "fox")
        assert both.ids == ids and both.type_ids == [0] * second + [1] * (len(ids) - second)
        assert about["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]
        end = "<|endoftext|>"
        tokens = [end, end, None, end, "<mask>"] if number else ["[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]"]
        assert [about.get(f"{name}_token") for name in ("cls", "sep", "unk", "pad", "mask")] == tokens
        assert read_folder(out).tokenizer == run.tokenizer


def test_what_a_config_leaves_out_is_as_in_transformers():
    """Defaults of Qwen2Config, MistralConfig and of Llama 3's rotary frequencies."""
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert _masks(Options(window), "qwen2", 4) == Causal()
    assert _masks(Options({"use_sliding_window": True}), "qwen2", 56) == (*[Causal()] * 28, *[Window(4096)] * 28)
    assert _masks(Options(window | {"max_window_layers": 0}), "qwen2", 4) == Window(8)
    assert _masks(Options({}), "mistral", 4) == Window(4096)
    assert _masks(Options({"sliding_window": None}), "mistral", 4) == Causal()
    rope = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 64}
    assert _position(Options(rope)).trained == 64
    assert _position(Options(rope | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})).trained == 64
    turned = rope["rope_scaling"] | {"partial_rotary_factor": 0.5}
    for given in (turned, {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}):
        assert _position(Options({"rope_scaling": given})).fraction == 0.5
    for kind, given in (("mistral", {"layer_types": ["full_attention"]}), ("qwen2", {"max_window_layers": "1"})):
        options = Options(window | given)
        _masks(options, kind, 1)
        assert options.unknown() if kind == "mistral" else options.problems
    small = {"vocab_size": 29, "hidden_size": 256, "intermediate_size": 7, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 64, "max_position_embeddings": 11}
    for kind, n_kv_heads, head_width in (("llama", 64, 4), ("mistral", 8, 4), ("qwen2", 32, 4), ("qwen3", 32, 128)):
        read = Llama().model(Options(small | {"model_type": kind}), [])
        assert (read.n_kv_heads, read.head_width) == (n_kv_heads, head_width)
        assert Llama().model(Options(small | {"model_type": kind, "num_key_value_heads": None}), []).n_kv_heads == 64


def test_lists_in_place_of_names_are_refused_in_a_sentence(tmp_path):
    options = Options({"use_sliding_window": True, "sliding_window": 8, "layer_types": [[], []]})
    assert _masks(options, "qwen3", 2) == Causal() and "layer_types must be 2 of" in options.problems[0]
    assert _chat_template(tmp_path, {"chat_template": [{"name": []}, {"name": "default", "template": "x"}]}) == "x"


LLAMA = {"norm": RMSNorm(), "feed_forward": GatedFeedForward(SiLU()), "position": Rotary(), "n_layers": 1}


def test_biases_of_queries_alone_are_written_as_a_llama_with_zeros(tmp_path, caplog):
    """transformers reads every tokenizer beside a qwen2 as Qwen's, which splits text in another way."""
    tokenizer = BPE(300).fit(["a b"])
    parts = json.loads(tokenizer.definition)
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
            parts["pre_tokenizer"] | {"use_regex": False},
        ],
    }
    qwens = dataclasses.replace(tokenizer, definition=json.dumps(parts))
    one = LLAMA | {"qkv_bias": True, "head": LanguageHead(tied=False)}
    for kind, splits, more in (
        ("llama", tokenizer, {}),
        ("qwen2", qwens, {}),
        ("qwen2", tokenizer, {"mask": Window(5)}),
    ):
        caplog.clear()
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        export_run(run := made(tmp_path / "run", tokenizer=splits, **one, **more), folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == kind and config.get("attention_bias") == (True if kind == "llama" else None)
        assert ("read this one by transformers.PreTrainedTokenizerFast" in caplog.text) == bool(more)
        arrays, own = (by_path(each) for each in (parameters(read_folder(folder)), run.state.params))
        assert all(np.array_equal(arrays[path], own[path]) for path in own)
        more = {path for path in arrays if path not in own}
        assert len(more) == (kind == "llama") and not any(arrays[path].any() for path in more)


def test_a_width_that_heads_do_not_divide_is_no_llama(tmp_path):
    """LlamaConfig takes none, MistralConfig does."""
    uneven = LLAMA | {"d_model": 14, "n_heads": 4, "n_kv_heads": 2, "head_width": 6, "context_length": 11}
    export_run(made(tmp_path / "run", **uneven), tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "mistral"
    with pytest.raises(InputError, match=r"model\.n_heads=4, which must divide model\.d_model=14"):
        export_run(made(tmp_path / "run", **uneven, bias=True), tmp_path / "other")


@pytest.mark.parametrize("part", ["feed_forward", "kernel"])
def test_a_model_without_a_branch_is_of_no_architecture(part, tmp_path):
    run = made(tmp_path / "run", **{part: None, "n_layers": 1})
    with pytest.raises(InputError, match=f"no architecture has all parts of its model.*{part}"):
        export_run(run, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_an_output_matrix_that_is_not_the_embedding_is_refused(tmp_path):
    def change(config, tensors):
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    with pytest.raises(InputError, match=r"lm_head\.weight is not the embedding"):
        read_folder(changed(tmp_path / "folder", "gpt2", change))


def test_a_part_that_no_architecture_has_is_named(tmp_path):
    for field, value in (("position", ALiBi()), ("norm", RMSNorm(gain=False))):
        with pytest.raises(InputError, match=f"model.{field}"):
            export_run(made(tmp_path / "run", **{field: value}), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "tokenizer",
    [
        Characters("\n abé€"),
        Characters("\n ab", end_token=True, mask_token=True),
        Characters("\n ab", end_token=True, unknown_token=True),
        Bytes(end_token=True),
        "BPE",
    ],
)
def test_tokenizers_are_exported_with_their_ids(tokenizer, tmp_path):
    tokenizer = BPE(300).fit(["a bé a b"]) if tokenizer == "BPE" else tokenizer
    gpt2 = {"n_kv_heads": None, "norm": LayerNorm(), "feed_forward": MLP(), "n_layers": 1}
    run = made(tmp_path / "run", tokenizer=tokenizer, **gpt2)
    export_run(run, tmp_path / "folder")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    text = "a b\nb a" if isinstance(tokenizer, Characters) else "a bé\n€"
    assert library.encode(text).ids == tokenizer.encode(text).tolist()
    assert library.decode(library.encode(text).ids) == text
    assert read_folder(tmp_path / "folder").tokenizer == tokenizer


def test_a_run_of_dialogues_is_exported_with_its_template_and_the_end_of_its_turns(tmp_path):
    library = tokenizers.Tokenizer.from_str(BPE(300).fit(["a b"]).definition)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Subwords(library.to_str(), library.get_vocab_size(), "<|endoftext|>", "<|endoftext|>")
    end = library.token_to_id("<|im_end|>")
    source = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    for template, eos in ((source, [0, end]), (None, 0)):
        run = made(tmp_path / "run", tokenizer=tokenizer, **LLAMA)
        corpus = Mixture((PythonTopics(), PythonQuestions(template=template)), (0.5, 0.5))
        data = dataclasses.replace(run.config.data, corpus=corpus if template else PythonQuestions())
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
        folder = tmp_path / str(template is None)
        export_run(run, folder)
        files = (json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer_config", "config"))
        about, config = files
        assert about["chat_template"] == (template or PLAIN) and config["eos_token_id"] == eos
        assert read_folder(folder).tokenizer == dataclasses.replace(tokenizer, chat_template=template or PLAIN)


def test_all_ends_that_a_folder_names_are_written_back(tmp_path):
    folder = changed(tmp_path / "folder", "llama", lambda config, tensors: config.update(eos_token_id=[3, 4]))
    for name, ends in (("one", [3, 4]), ("two", [5, 6])):
        run = imported(folder, tmp_path / name)
        export_run(run, tmp_path / f"{name}_back")
        config = json.loads((tmp_path / f"{name}_back" / "config.json").read_text())
        assert config["eos_token_id"] == [*([] if run.tokenizer.end is None else [run.tokenizer.end]), *ends]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))


def test_what_an_import_ends_texts_by_goes_on_to_what_is_trained_from_it(tmp_path):
    """If ids mean the same there."""
    folder = changed(tmp_path / "folder", "llama", lambda config, tensors: config.update(eos_token_id=[3, 4]))
    run = imported(folder, tmp_path / "run")
    for same, ends in ((True, [3, 4]), (False, [])):
        report = warm_start.compare(run.recipe, run, same)
        tuned = dataclasses.replace(run, config=dataclasses.replace(run.config, directory=str(tmp_path / str(same))))
        Path(tuned.config.directory).mkdir()
        warm_start.tell(report, Path(tuned.config.directory))
        assert tuned.ends == ends and report["otherwise"] == []
        assert warm_start.compare(run.recipe, tuned, True).get("eos_token_id", []) == ends


@pytest.mark.parametrize("several", [True, False])
def test_texts_end_by_any_end_that_a_folder_names(tmp_path, several):
    """As `transformers` ends them, though the tokenizer says nothing of it."""
    folder = changed(tmp_path / "folder", "llama")
    free = imported(folder, tmp_path / "free").generate(tokens=12, temperature=1, seed=3)[0]
    assert free.finish_reason == "length"
    end, other = free.ids[5], min({*range(29)} - {*free.ids})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, other] if several else end}))
    run = imported(folder, tmp_path / "run")
    found = run.generate(tokens=12, temperature=1, seed=3)[0]
    assert found.finish_reason == "end" and found.ids == free.ids[: free.ids.index(end) + 1]
    assert "".join(run.stream(tokens=12, temperature=1, seed=3)) == found.text
    (tmp_path / "run" / "imported.json").write_text("{")
    with pytest.raises(InputError, match=r"imported.json cannot be read; import the model again"):
        open_run(tmp_path / "run").generate(tokens=2)


@pytest.mark.parametrize(
    ("position", "scaling"),
    [
        (Rotary(base=100.0), None),
        (Rotary(base=100.0, scaling=2.0), {"rope_theta": 100.0, "rope_type": "linear", "factor": 2.0}),
    ],
)
def test_readers_of_before_rope_parameters_find_the_rotary_numbers(position, scaling):
    """`transformers` 4 takes `rope_theta` and `rope_scaling`, and without a word 10,000 where they are missing."""
    found = Llama().options(decoder(position=position, norm=RMSNorm()))
    assert found["rope_theta"] == 100.0 and found.get("rope_scaling") == scaling


def test_tokenizers_of_before_tokenizer_json(tmp_path, caplog):
    """GPT-2's in two files, BERT's in one: the ids of the tokenizer that they are of, for any text."""
    texts = ["The quick brown Fox, jumps! über 北京 the lazy dog’s tail.", " two  spaces\n", "the quick the lazy ²"]
    bpe = BPE(300).fit(texts * 3)
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.BertNormalizer()
    words.pre_tokenizer, words.decoder = tokenizers.pre_tokenizers.BertPreTokenizer(), tokenizers.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator(texts * 3, tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    for kind, library in (("gpt2", tokenizers.Tokenizer.from_str(bpe.definition)), ("bert", words)):

        def larger(config, tensors, library=library):
            size = library.get_vocab_size()
            rows = [name for name, a in tensors.items() if a.shape[0] == config["vocab_size"]]
            tensors |= {name: np.resize(tensors[name], (size, *tensors[name].shape[1:])) for name in rows}
            config["vocab_size"] = size

        folder = changed(tmp_path / kind, kind, larger)
        (folder / "tokenizer.json").unlink(missing_ok=True)
        library.model.save(str(folder))
        found = read_folder(folder).tokenizer
        for text in texts:
            ids = library.encode(text, add_special_tokens=False).ids
            assert found.encode(text).tolist() == ids and found.decode(ids) == library.decode(ids)
        assert library.id_to_token(found.start) == {"gpt2": "<|endoftext|>", "bert": "[CLS]"}[kind]
        assert not caplog.records
        (folder / "added_tokens.json").write_text("{}")
        with pytest.raises(InputError, match=r"added_tokens\.json is not read; save the tokenizer as tokenizer\.json"):
            read_folder(folder)


def test_biases_that_a_model_lacks_are_written_as_zeros(tmp_path):
    gpt2 = {"n_kv_heads": None, "norm": LayerNorm(bias=False), "feed_forward": MLP(), "n_layers": 1}
    run = made(tmp_path / "run", **gpt2)
    export_run(run, tmp_path / "folder")
    again = imported(tmp_path / "folder", tmp_path / "again")
    assert not np.any(again.state.params["decoder"]["layers"]["block0"]["attention"]["project"]["q_bias"])

    def logits(run):
        h = jax.jit(run.model.hidden)(run.state.params, jnp.array([[1, 2, 3]]), one_document(3)).h
        return run.model.logits(run.state.params, h)

    np.testing.assert_allclose(logits(run), logits(again), atol=1e-5)


@pytest.mark.slow
def test_a_run_of_parameters_alone_is_used_like_any_other(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("5 6 7 8 9 10")
    run = tmp_path / "run"
    assert command("import", [str(STORED / "qwen3"), str(run), "--window", "16"]) == 0
    capsys.readouterr()
    assert command("evaluate", [str(run), "--file", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 5
    opened = open_run(run)
    assert opened.inspect()["step"] == 0
    assert opened.sample("5 6", tokens=3, temperature=0).startswith("5 6")


@pytest.mark.slow
def test_an_imported_run_is_fine_tuned(tmp_path):
    from jaxformer import train

    model = imported(STORED / "llama", tmp_path / "run", window=16).config.model
    (tmp_path / "ids.txt").write_text(" ".join(str(i % 29) for i in range(500)))
    tokenizer = TokenizerFile(str(tmp_path / "run" / "tokenizer.json"))
    data = Data(TextFiles(str(tmp_path / "ids.txt")), tokenizer=tokenizer, batch_size=4, window=16)
    knobs = Train(steps=30, eval_every=30, save_every=30, sample_tokens=0)
    config = Config(str(tmp_path / "tuned"), model, data, train=knobs, init_from=str(tmp_path / "run"))
    before = open_run(tmp_path / "run").evaluate(tmp_path / "ids.txt")["loss"]
    assert train(config).evaluate()["loss"] < before
    report = json.loads((tmp_path / "tuned" / "init_from.json").read_text())
    assert not report["not_taken"] and not report["unused"]


PUBLISHED = {  # parameters, as their papers, model cards or files have them
    "GPT-2 124M": (124_439_808, {"model_type": "gpt2"}),
    "GPT-2 1.5B": (1_557_611_200, {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "Llama 3.2 1B": (
        1_235_814_400,
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "rope_theta": 500000.0}
        | {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}},
    ),
    "Qwen3 0.6B": (
        596_049_920,
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        | {"max_position_embeddings": 40960, "tie_word_embeddings": True, "max_window_layers": 28},
    ),
    "BERT base": (109_482_240, {"model_type": "bert"}),
    "BERT large": (
        335_141_888,
        {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(name):
    count, config = PUBLISHED[name]
    options = Options(config)
    (architecture,) = [each for each in ARCHITECTURES if config["model_type"] in each.kinds]
    model = architecture.model(options, [])
    assert not options.problems and isinstance(model, Decoder)
    assert sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))) == count


def test_bfloat16_is_read_as_it_is_written(tmp_path):
    array = np.arange(7 * 3, dtype=np.float32).reshape(7, 3) / 8
    write_file(
        tmp_path / "x.safetensors",
        {"a": Written((7, 3), lambda: array), "b": Written((0, 2), lambda: array[:0, :2])},
        "bfloat16",
    )
    found = read_header(tmp_path / "x.safetensors")
    ((first, rows),) = found["a"].rows()
    assert first == 0 and rows.dtype == ml_dtypes.bfloat16 and np.array_equal(rows.astype(np.float32), array)
    assert found["b"].shape == (0, 2) and not list(found["b"].rows())


def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    about = lambda start, end, **more: {"dtype": "F32", "shape": [2], "data_offsets": [start, end], **more}

    def read(size, **tensors):
        text = json.dumps(tensors).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        return read_header(file)

    assert read(16, a=about(8, 16), b=about(0, 8)).keys() == {"a", "b"}
    for size, tensors in (
        (17, {"a": about(0, 8), "b": about(8, 16)}),  # more behind them
        (15, {"a": about(0, 8), "b": about(8, 16)}),  # cut off
        (16, {"a": about(0, 8), "b": about(4, 12)}),  # one over another
        (24, {"a": about(0, 8), "b": about(16, 24)}),  # a gap
        (8, {"a": about(0, 8), "b": about(0, 8)}),  # the same twice
        (8, {"a": about(0, 8, shape=[2**40, 2**40])}),
        (8, {"a": about(0, 8, shape=[-2])}),
        (8, {"a": about(0, 4)}),
        (8, {"a": about(0, 8, dtype=["F32"])}),
    ):
        with pytest.raises(InputError, match="is no whole safetensors file"):
            read(size, **tensors)


@pytest.mark.parametrize("seed", range(len(corruption.DAMAGES)))
def test_a_damaged_folder_is_refused_in_a_sentence(seed, tmp_path):
    how, why = corruption.met(seed, tmp_path)
    assert how in ("refused", "taken"), why
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_thousand_damaged_folders():
    subprocess.run([sys.executable, ROOT / "benchmarks" / "corruption.py", "--count", "1000"], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "templates"])
def test_random_models_of_transformers_are_equal(kind):
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "safetensors")):
        pytest.skip("needs torch and transformers: pip install -e '.[peers]'")
    subprocess.run([sys.executable, ROOT / "scripts" / "parity.py", kind, "--count", "6"], check=True)
