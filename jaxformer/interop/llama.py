"""Llama (arXiv:2302.13971, 2407.21783) and what shares its shape: Mistral (2310.06825), Qwen2 (2407.10671) and Qwen3
(2505.09388)."""

from collections.abc import Sequence
from typing import Any

from jaxformer.interop.architecture import ACTIVATIONS, Architecture, Options, Row, activation_name
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import GatedFeedForward, NoNorm, RMSNorm
from jaxformer.model.masks import Causal, Mask, Window
from jaxformer.model.models import Decoder
from jaxformer.model.positions import Llama3Rotary, Rotary

# Of each layer, where the model has it.
LAYER = {
    "norm_attention/scale": "input_layernorm.weight",
    "attention/project/q": "self_attn.q_proj.weight",
    "attention/project/k": "self_attn.k_proj.weight",
    "attention/project/v": "self_attn.v_proj.weight",
    "attention/project/o": "self_attn.o_proj.weight",
    "attention/project/q_bias": "self_attn.q_proj.bias",
    "attention/project/k_bias": "self_attn.k_proj.bias",
    "attention/project/v_bias": "self_attn.v_proj.bias",
    "attention/project/o_bias": "self_attn.o_proj.bias",
    "attention/norm_q/scale": "self_attn.q_norm.weight",
    "attention/norm_k/scale": "self_attn.k_norm.weight",
    "norm_feed_forward/scale": "post_attention_layernorm.weight",
    "feed_forward/gate": "mlp.gate_proj.weight",
    "feed_forward/up": "mlp.up_proj.weight",
    "feed_forward/down": "mlp.down_proj.weight",
    "feed_forward/gate_bias": "mlp.gate_proj.bias",
    "feed_forward/up_bias": "mlp.up_proj.bias",
    "feed_forward/down_bias": "mlp.down_proj.bias",
}
TRUNK = {"embedding/table": "embed_tokens.weight", "decoder/norm/scale": "norm.weight"}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # of a file that does not say


class Llama(Architecture):
    """Llama and what shares its shape: rotary positions, norms before branches, gated feed-forward layers."""

    kinds = tuple(CLASSES)
    prefix = "model."
    ignored = ("*.rotary_emb.inv_freq",)
    tied = "lm_head.weight"
    optional = ("bias",)

    def model(self, options: Options, names: Sequence[str]) -> Decoder:
        kind, n_layers = options.get("model_type"), options.layers("num_hidden_layers")
        width, n_heads = options.count("hidden_size"), options.count("num_attention_heads")
        eps, biased = options.number("rms_norm_eps", 1e-6), kind in ("llama", "qwen3")
        bias = options.flag("attention_bias", False) if biased else False
        activation = options.choice("hidden_act", ACTIVATIONS, "silu")
        options.get("attention_dropout")  # matters in training alone
        return Decoder(
            d_model=width,
            context_length=options.count("max_position_embeddings"),
            vocab_size=options.count("vocab_size"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=options.count("num_key_value_heads", _n_kv_heads(options, kind, n_heads)),
            head_width=options.count("head_dim", 128 if kind == "qwen3" else max(1, width // n_heads)),
            d_ff=options.count("intermediate_size"),
            position=_position(options),
            mask=_masks(options, kind, n_layers),
            feed_forward=GatedFeedForward(activation, kind == "llama" and options.flag("mlp_bias", False)),
            norm=RMSNorm(eps=eps),
            qk_norm=RMSNorm(eps=eps) if kind == "qwen3" else NoNorm(),
            bias=bias,
            qkv_bias=bias or kind == "qwen2",
            head=LanguageHead(tied=options.flag("tie_word_embeddings", False)),
        )

    def options(self, model: Decoder, like: str | None = None) -> dict[str, Any]:
        masks = model.mask if isinstance(model.mask, tuple) else (model.mask,)
        windows = {mask.size for mask in masks if isinstance(mask, Window)}
        window = min(windows, default=None)
        bias, gated, uneven = model.bias, model.feed_forward, model.d_model % model.n_heads != 0
        normed = isinstance(model.qk_norm, RMSNorm)
        if model.qkv_bias and not bias and not normed and (window or uneven or like == "qwen2"):
            kind = "qwen2"
        else:
            bias = bias or bool(model.qkv_bias)  # that of the output is zeros
            plain = not bias and not getattr(gated, "bias", False)
            kind = "mistral" if window or (plain and (uneven or like == "mistral")) else "llama"
            kind = "qwen3" if normed else kind
        found: dict[str, Any] = {
            "model_type": kind,
            "architectures": [CLASSES[kind]],
            "vocab_size": model.dims["V"],
            "hidden_size": model.d_model,
            "intermediate_size": model.dims["F"],
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            "num_key_value_heads": model.dims["G"],
            "head_dim": model.dims["K"],
            "max_position_embeddings": model.context_length,
            "hidden_act": activation_name(model.feed_forward, "silu"),
            "rms_norm_eps": getattr(model.norm, "eps", 1e-6),
            "tie_word_embeddings": getattr(model.head, "tied", False),
            "rope_parameters": (rope := _rope(model.position)),
            "rope_theta": rope["rope_theta"],  # here and in rope_scaling `transformers` before 5 looks for them
            "attention_dropout": 0.0,
        }
        if rope["rope_type"] != "default":
            found["rope_scaling"] = rope
        if kind == "llama":
            found |= {"attention_bias": bias, "mlp_bias": getattr(gated, "bias", False)}
        elif kind == "qwen3":
            found |= {"attention_bias": bias}
        if kind == "mistral":
            found |= {"sliding_window": window}
        elif kind != "llama":
            kinds = ["sliding_attention" if isinstance(mask, Window) else "full_attention" for mask in masks]
            layers = [kinds[i % len(kinds)] for i in range(model.n_layers)]
            found |= {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": layers}
        return found

    def lacks(self, model: Decoder) -> list[str]:
        uneven = model.d_model % model.n_heads != 0 and self.options(model)["model_type"] == "llama"
        return [f"model.n_heads={model.n_heads}, which must divide model.d_model={model.d_model}"] * uneven

    def rows(self, model: Decoder) -> list[Row]:
        rows = [Row(path, self.prefix + name) for path, name in TRUNK.items()]
        (kind, *_) = model.kinds("decoder")
        attention = kind.mixer.params(kind.parts) if kind.mixer else {}
        has = {
            "attention/project": set(attention.get("project", ())),
            "attention/norm_q": set(attention.get("norm_q", ())),
            "attention/norm_k": set(attention.get("norm_k", ())),
            "feed_forward": set(kind.feed_forward.params() if kind.feed_forward else ()),
            "norm_attention": {"scale"},
            "norm_feed_forward": {"scale"},
        }
        for path, name in LAYER.items():
            part, _, array = path.rpartition("/")
            if array in has[part]:
                rows.append(Row(f"decoder/layers/*/{path}", f"{self.prefix}layers.*.{name}"))
        head = model.head_of(LanguageHead)
        return rows if head.tied else [*rows, Row("head_language/kernel", "lm_head.weight")]


def _n_kv_heads(options: Options, kind: str, n_heads: int) -> int:
    """Where the file says nothing; null is as many as there are heads."""
    return n_heads if "num_key_value_heads" in options.values else KV_HEADS.get(kind, n_heads)


def _position(options: Options) -> Rotary:
    """Of `rope_parameters`, or as they were called before, which goes first: `rope_theta` and `rope_scaling`."""
    base = options.get("rope_theta", 10_000.0)
    given = options.get("rope_scaling") or options.get("rope_parameters", {})
    options.read.add("rope_parameters")
    if not isinstance(given, dict):
        options.problems.append("rope_parameters must be an object")
        given = {}
    rope = Options({"rope_theta": base, **given})
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.read.add("type")
    base = rope.number("rope_theta", 10_000.0)
    fraction = rope.number("partial_rotary_factor", 1.0)
    found = Rotary(base=base, fraction=fraction)
    if kind == "linear":
        found = Rotary(base=base, fraction=fraction, scaling=rope.number("factor", 1.0))
    elif kind == "llama3":
        found = Llama3Rotary(
            base=base,
            fraction=fraction,
            factor=rope.number("factor", 8.0),
            low=rope.number("low_freq_factor", 1.0),
            high=rope.number("high_freq_factor", 4.0),
            trained=rope.count("original_max_position_embeddings", options.get("max_position_embeddings", 8192)),
        )
    elif kind != "default":
        rope.problems.append(f"rope_type={kind!r} is not supported, default, linear and llama3 are")
    options.problems += [*rope.problems, *(f"rope_parameters.{name} is not known" for name in rope.unknown())]
    return found


def _rope(position: Any) -> dict[str, Any]:
    base = {"rope_theta": getattr(position, "base", 10_000.0), "rope_type": "default"}
    if isinstance(position, Llama3Rotary):
        return base | {
            "rope_type": "llama3",
            "factor": position.factor,
            "low_freq_factor": position.low,
            "high_freq_factor": position.high,
            "original_max_position_embeddings": position.trained,
        }
    if getattr(position, "scaling", 1.0) != 1.0:
        return base | {"rope_type": "linear", "factor": position.scaling}
    return base


def _masks(options: Options, kind: str, n_layers: int) -> Mask | tuple[Mask, ...]:
    """Causal, or windows: of every layer in Mistral, of some in Qwen."""
    if kind == "llama":
        return Causal()
    options.read |= {"sliding_window"} if kind == "mistral" else {"sliding_window", "layer_types", "max_window_layers"}
    none = "sliding_window" in options.values and options.values["sliding_window"] is None  # else it is 4096
    if none or (kind != "mistral" and not options.flag("use_sliding_window", False)):
        return Causal()
    window = Window(options.count("sliding_window", 4096))
    if kind == "mistral":
        return window
    types, first = options.get("layer_types"), options.count("max_window_layers", 28, least=0)
    if types is None:
        types = ["full_attention"] * min(first, n_layers) + ["sliding_attention"] * max(0, n_layers - first)
    known = {"full_attention": Causal(), "sliding_attention": window}
    if not isinstance(types, list) or len(types) != n_layers or any(str(each) not in known for each in types):
        options.problems.append(f"layer_types must be {n_layers} of {', '.join(known)}")
        return Causal()
    masks = tuple(known[each] for each in types)
    periods = (n for n in range(1, n_layers + 1) if n_layers % n == 0 and masks == masks[:n] * (n_layers // n))
    repeated = masks[: next(periods)]
    return repeated[0] if len(repeated) == 1 else repeated
