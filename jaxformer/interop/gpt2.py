"""GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.data.tokenizers import END_OF_TEXT
from jaxformer.interop.architecture import ACTIVATIONS, Architecture, Options, Row, activation_name
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import MLP, LayerNorm
from jaxformer.model.models import Decoder

# Of each layer. Matrices lie inputs × outputs, and those of queries, keys and values side by side in one.
LAYER = {
    "norm_attention/scale": "ln_1.weight",
    "norm_attention/bias": "ln_1.bias",
    "attention/project/q": "attn.c_attn.weight",
    "attention/project/k": "attn.c_attn.weight",
    "attention/project/v": "attn.c_attn.weight",
    "attention/project/q_bias": "attn.c_attn.bias",
    "attention/project/k_bias": "attn.c_attn.bias",
    "attention/project/v_bias": "attn.c_attn.bias",
    "attention/project/o": "attn.c_proj.weight",
    "attention/project/o_bias": "attn.c_proj.bias",
    "norm_feed_forward/scale": "ln_2.weight",
    "norm_feed_forward/bias": "ln_2.bias",
    "feed_forward/up": "mlp.c_fc.weight",
    "feed_forward/up_bias": "mlp.c_fc.bias",
    "feed_forward/down": "mlp.c_proj.weight",
    "feed_forward/down_bias": "mlp.c_proj.bias",
}
TRUNK = {
    "embedding/table": "wte.weight",
    "decoder/position/table": "wpe.weight",
    "decoder/norm/scale": "ln_f.weight",
    "decoder/norm/bias": "ln_f.bias",
}
DROPOUTS = "resid_pdrop", "embd_pdrop", "attn_pdrop"


class GPT2(Architecture):
    """GPT-2: learned positions, norms before branches, biases everywhere."""

    kinds = ("gpt2",)
    prefix = "transformer."
    ignored = ("*.attn.bias", "*.attn.masked_bias")  # masks
    tied = "lm_head.weight"
    optional = ("bias", "qkv_bias", "norm.bias", "feed_forward.bias")

    def model(self, options: Options, names: Sequence[str]) -> Decoder:
        options.must("add_cross_attention", False)
        options.must("scale_attn_by_inverse_layer_idx", False)
        for name in ("reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation"):
            options.get(name)  # no option of the logits
        for name in ("summary_proj_to_labels", "summary_first_dropout"):
            options.get(name)
        width, scaled = options.count("n_embd", 768), options.flag("scale_attn_weights", True)
        return Decoder(
            d_model=width,
            context_length=options.count("n_positions", 1024),
            vocab_size=options.count("vocab_size", 50257),
            n_layers=options.layers("n_layer", 12),
            n_heads=options.count("n_head", 12),
            d_ff=options.count("n_inner", 4 * width),
            dropout=options.dropout(*DROPOUTS),
            kernel=Softmax() if scaled else Softmax(scale=1.0),
            feed_forward=MLP(options.choice("activation_function", ACTIVATIONS, "gelu_new"), bias=True),
            norm=LayerNorm(eps=options.number("layer_norm_epsilon", 1e-5)),
            bias=True,
            head=LanguageHead(tied=options.flag("tie_word_embeddings", True)),
        )

    def options(self, model: Decoder, like: str | None = None) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": model.dims["V"],
            "n_positions": model.context_length,
            "n_embd": model.d_model,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "n_inner": model.dims["F"],
            "activation_function": activation_name(model.feed_forward, "gelu_new"),
            "layer_norm_epsilon": getattr(model.norm, "eps", 1e-5),
            "scale_attn_weights": getattr(model.kernel, "scale", None) != 1.0,
            "tie_word_embeddings": getattr(model.head, "tied", True),
            **dict.fromkeys(DROPOUTS, model.dropout),
        }

    def older_tokenizer(self, folder: Path, about: Mapping[str, Any]) -> Any:
        vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
        if not (vocabulary.is_file() and merges.is_file()):
            return None
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        library: Any = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=about.get("add_prefix_space") is True)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END_OF_TEXT] if library.token_to_id(END_OF_TEXT) is not None else [])
        return library

    def rows(self, model: Decoder) -> list[Row]:
        rows = [Row(path, self.prefix + name) for path, name in TRUNK.items()]
        for path, name in LAYER.items():
            part = ("qkv".index(path.split("/")[-1][0]), 3) if "c_attn" in name else (0, 1)
            rows.append(Row(f"decoder/layers/*/{path}", f"{self.prefix}h.*.{name}", False, part))
        head = model.head_of(LanguageHead)
        return rows if head.tied else [*rows, Row("head_language/kernel", "lm_head.weight")]
