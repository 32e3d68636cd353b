"""BERT (arXiv:1810.04805)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.interop.architecture import ACTIVATIONS, Architecture, Options, Row, activation_name
from jaxformer.learning.objectives import Classification, Contrastive, Masked, Objective
from jaxformer.model.heads import (
    ClassificationHead,
    EmbeddingHead,
    FirstToken,
    Head,
    MaskedLanguageHead,
    MultiLabelHead,
    TokenClassificationHead,
)
from jaxformer.model.layers import MLP, LayerNorm, Tanh, TruncatedNormal
from jaxformer.model.models import Decoder, Embedding, Encoder
from jaxformer.model.residuals import PostNorm

LAYER = {
    "attention/project/q": "attention.self.query.weight",
    "attention/project/k": "attention.self.key.weight",
    "attention/project/v": "attention.self.value.weight",
    "attention/project/q_bias": "attention.self.query.bias",
    "attention/project/k_bias": "attention.self.key.bias",
    "attention/project/v_bias": "attention.self.value.bias",
    "attention/project/o": "attention.output.dense.weight",
    "attention/project/o_bias": "attention.output.dense.bias",
    "norm_attention/scale": "attention.output.LayerNorm.weight",
    "norm_attention/bias": "attention.output.LayerNorm.bias",
    "feed_forward/up": "intermediate.dense.weight",
    "feed_forward/up_bias": "intermediate.dense.bias",
    "feed_forward/down": "output.dense.weight",
    "feed_forward/down_bias": "output.dense.bias",
    "norm_feed_forward/scale": "output.LayerNorm.weight",
    "norm_feed_forward/bias": "output.LayerNorm.bias",
}
TRUNK = {
    "embedding/table": "embeddings.word_embeddings.weight",
    "embedding/parts": "embeddings.token_type_embeddings.weight",
    "encoder/position/table": "embeddings.position_embeddings.weight",
    "encoder/norm_embedding/scale": "embeddings.LayerNorm.weight",
    "encoder/norm_embedding/bias": "embeddings.LayerNorm.bias",
}
POOLER = {"between": "bert.pooler.dense.weight", "between_bias": "bert.pooler.dense.bias"}
PROBLEMS: dict[str, type[ClassificationHead]] = {  # the first is the default
    "single_label_classification": ClassificationHead,
    "multi_label_classification": MultiLabelHead,
}
HEADS: dict[type[Head], dict[str, str]] = {
    MaskedLanguageHead: {
        "between": "cls.predictions.transform.dense.weight",
        "between_bias": "cls.predictions.transform.dense.bias",
        "norm_scale": "cls.predictions.transform.LayerNorm.weight",
        "norm_bias": "cls.predictions.transform.LayerNorm.bias",
        "bias": "cls.predictions.bias",
    },
    EmbeddingHead: {"kernel": POOLER["between"], "bias": POOLER["between_bias"]},
    **dict.fromkeys(PROBLEMS.values(), POOLER | {"kernel": "classifier.weight", "bias": "classifier.bias"}),
    TokenClassificationHead: {"kernel": "classifier.weight", "bias": "classifier.bias"},
}
NEXT = "next_sentence"  # the column of whether the second text follows the first
FOLLOWS = ("yes", "no")
CLASSES: dict[frozenset[Any], str] = {  # by the heads that each has
    frozenset({MaskedLanguageHead}): "BertForMaskedLM",
    frozenset({MaskedLanguageHead, NEXT}): "BertForPreTraining",
    frozenset({NEXT}): "BertForNextSentencePrediction",
    **{frozenset({kind}): "BertForSequenceClassification" for kind in PROBLEMS.values()},
    frozenset({TokenClassificationHead}): "BertForTokenClassification",
    frozenset({EmbeddingHead}): "BertModel",
}


class Bert(Architecture):
    """BERT: an encoder with norms behind its branches, and one or more of its heads."""

    kinds = ("bert",)
    prefix = "bert."
    # The bias is cls.predictions.bias; a pooler may be left over that no head reads.
    ignored = ("*.position_ids", "cls.predictions.decoder.bias", "*pooler.dense.*")
    tied = "cls.predictions.decoder.weight"

    def model(self, options: Options, names: Sequence[str]) -> Encoder:
        options.must("position_embedding_type", "absolute")
        options.must("is_decoder", False)
        options.must("add_cross_attention", False)
        options.must("tie_word_embeddings", True)
        eps = options.number("layer_norm_eps", 1e-12)
        activation = options.choice("hidden_act", ACTIVATIONS, "gelu")
        return Encoder(
            d_model=options.count("hidden_size", 768),
            context_length=options.count("max_position_embeddings", 512),
            vocab_size=options.count("vocab_size", 30522),
            n_layers=options.layers("num_hidden_layers", 12),
            n_heads=options.count("num_attention_heads", 12),
            d_ff=options.count("intermediate_size", 3072),
            dropout=options.dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
            embedding=Embedding(normed=True, token_types=options.count("type_vocab_size", 2)),
            feed_forward=MLP(activation, bias=True),
            norm=LayerNorm(eps=eps),
            residual=PostNorm(),
            bias=True,
            head=_heads(options, names, activation, LayerNorm(eps=eps)),
            initializer=TruncatedNormal(),
        )

    def options(self, model: Decoder, like: str | None = None) -> dict[str, Any]:
        found = {
            "model_type": "bert",
            "vocab_size": model.dims["V"],
            "hidden_size": model.d_model,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            "intermediate_size": model.dims["F"],
            "max_position_embeddings": model.context_length,
            "type_vocab_size": model.embedding.token_types or 2,
            "hidden_act": activation_name(model.feed_forward, "gelu"),
            "layer_norm_eps": getattr(model.norm, "eps", 1e-12),
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout,
        }
        if isinstance(head := model.heads[0], ClassificationHead) and head.column != NEXT:
            classes = head.classes or ()
            found |= {"id2label": dict(enumerate(classes)), "label2id": {each: i for i, each in enumerate(classes)}}
            found["problem_type"] = dict(zip(PROBLEMS.values(), PROBLEMS, strict=True)).get(type(head))
            found["classifier_dropout"] = head.dropout
        return found | {"architectures": [_class_of(model.heads)]}

    def lacks(self, model: Decoder) -> list[str]:
        return [] if _class_of(model.heads) else [f"model.head={model.head!r} together"]

    def older_tokenizer(self, folder: Path, about: Mapping[str, Any]) -> Any:
        if not (folder / "vocab.txt").is_file():
            return None
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        library: Any = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
        library.normalizer = normalizers.BertNormalizer(
            lowercase=about.get("do_lower_case", True) is True,
            strip_accents=about.get("strip_accents"),
            handle_chinese_chars=about.get("tokenize_chinese_chars", True) is True,
        )
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        known = library.get_vocab()
        library.add_special_tokens(
            [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if token in known]
        )
        return library

    def rows(self, model: Decoder) -> list[Row]:
        rows = [Row(path, self.prefix + name) for path, name in TRUNK.items()]
        rows += [Row(f"encoder/layers/*/{path}", f"bert.encoder.layer.*.{name}") for path, name in LAYER.items()]
        for head in model.heads:
            names = dict(HEADS[type(head)])
            if head.column == NEXT:
                names |= {"kernel": "cls.seq_relationship.weight", "bias": "cls.seq_relationship.bias"}
            rows += [Row(f"head_{head.name}/{array}", name) for array, name in names.items()]
        return rows

    def objective(self, model: Decoder) -> Objective:
        if any(isinstance(head, MaskedLanguageHead) for head in model.heads):
            return Masked()
        return Classification() if any(isinstance(head, ClassificationHead) for head in model.heads) else Contrastive()

    def bare(self, model: Decoder) -> bool:
        return all(isinstance(head, EmbeddingHead) for head in model.heads)

    def renamed(self, name: str) -> str:
        """Files of the first years call gains gamma and biases beta."""
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _class_of(heads: Sequence[Head]) -> str | None:
    """The class that has these heads and no other; None if there is none."""
    kinds = frozenset(NEXT if head.column == NEXT else type(head) for head in heads)
    return CLASSES.get(kinds) if len(kinds) == len(heads) else None


def _heads(options: Options, names: Sequence[str], activation: Any, norm: LayerNorm) -> Head | tuple[Head, ...]:
    """Those whose tensors the file has."""
    has = lambda start: any(name.startswith(start) for name in names)
    how = {"pooling": FirstToken(), "activation": Tanh()}
    width, heads = options.count("hidden_size", 768), list[Head]()
    if has("cls.predictions."):
        heads.append(MaskedLanguageHead(activation=activation, norm=norm))
    if has("cls.seq_relationship."):
        heads.append(ClassificationHead(NEXT, FOLLOWS, hidden=width, **how))
    own = options.get("classifier_dropout") is not None
    rate = options.dropout("classifier_dropout" if own else "hidden_dropout_prob")
    if has("classifier.") and "ForTokenClassification" in str(options.get("architectures")):
        heads.append(TokenClassificationHead("label", _classes(options, 2), dropout=rate))
    elif has("classifier."):
        kind = options.choice("problem_type", PROBLEMS, next(iter(PROBLEMS)))
        classes = _classes(options, 1 if kind is MultiLabelHead else 2)
        heads.append(kind("label", classes, hidden=width, dropout=rate, **how))
    if not heads:
        heads.append(EmbeddingHead(FirstToken(), width, Tanh(), unit=False))
    return heads[0] if len(heads) == 1 else tuple(heads)


def _classes(options: Options, least: int) -> tuple[str, ...]:
    """Of id2label, whose keys are numbers from 0 on; two by default. One class alone is a score, no choice."""
    named = options.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        classes = tuple(named[str(i)] for i in range(len(named)))
        if not all(isinstance(each, str) for each in classes) or not least <= len(classes) == len(set(classes)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        options.problems.append(f"id2label must name each class, {least} or more, by its number, from 0 on")
        return ("LABEL_0", "LABEL_1")
    return classes
