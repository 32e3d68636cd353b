"""Are imported models equal to their originals in PyTorch and transformers? Random small models, in random options.

    python scripts/parity.py llama --count 100          # or gpt2, mistral, qwen2, qwen3, bert, all
    python scripts/parity.py templates --count 300      # dialogues by chat templates
    python scripts/parity.py all --fixtures tests/fixtures/interop

For each: import, logits, hidden states of each layer, gradients, the losses of 20 steps of AdamW, 200 greedy tokens,
and export back; of dialogues text, ids, and which of them are answers. Prints the largest differences; exit status 1 if
one is too large. With --fixtures it stores small models and what PyTorch makes of them, for tests that do without it.
Needs the extra `peers`.
"""

# pyright: reportMissingImports=false

import argparse
import copy
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.corpora import PythonTopics
from jaxformer.data.datasets import ids_of
from jaxformer.data.templates import Template
from jaxformer.data.tokenizers import TokenizerFile
from jaxformer.declarations import by_path, trained
from jaxformer.interop.architecture import Architecture
from jaxformer.interop.export_folder import architecture_of, assembled, export_run
from jaxformer.interop.import_folder import import_run
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.masks import places
from jaxformer.model.models import Decoder
from jaxformer.run.opened import Run, open_run

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "bert")
STEPS, TOKENS, RATE, DECAY = 20, 200, 1e-3, 0.01
BETAS = 0.875, 0.9921875  # without rounding in float32, in which 1 − 0.999 is 2e-5 off
EPS = 1e-5  # of AdamW: with 1e-8, what rounding leaves of a gradient that is zero moves its number by a full step
NEAR_TIE = 1e-4  # between the two largest logits: whatever comes behind it may differ
# What differs by at most so much: logits and hidden states absolutely, gradients relative to the largest number of
# each array and losses to themselves, or by twice as much as PyTorch's losses in float32 do from those in float64
# ("rounding"): some models, as with scores that are not scaled, make more of it at each step.
LIMITS = {"logits": 1e-4, "hidden": 1e-4, "gradients": 1e-4, "losses": 1e-5, "greedy": 0, "exported": 0}
Numbers = dict[str, Any]


# --- jaxformer's side, which tests use as well


def ours(run: Run, batch: Mapping[str, Any], tokens: int, training: bool = True) -> Numbers:
    """Logits [B, T, V], or what the only head gives; hidden states [layers + 1, B, T, D]; where `training`, the
    gradient of each tensor, as the file has it, and losses of each step; and greedy tokens behind the first row's first
    three."""
    turned = dataclasses.replace(run.config.model, unroll=1)  # quicker to compile
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=turned))
    model, params = run.model, jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), run.state.params)
    assert isinstance(model, Decoder)
    (stack,) = model.stacks
    ids, real = jnp.asarray(batch["ids"]), jnp.asarray(batch["real"])
    at = places(real, jnp.asarray(batch["parts"]) if "parts" in batch else None)
    streams = [f"{stack}/layers/block{i}/after_feed_forward" for i in range(len(model.kinds(stack)))]

    def loss(params: Any) -> tuple[jax.Array, Any]:
        named = model.activations(params, ids, at)
        outs = [named[f"head_{head.name}/out"] for head in model.heads]
        value = sum((_loss(each, ids, real) for each in outs), jnp.float32(0))
        return value, (outs, [named[name] for name in (f"{stack}/embedded", *streams, f"{stack}/out")])

    found: Numbers = {}
    if training:
        losses, grads, forward = _trained(model, params, loss)
        architecture, again = architecture_of(run)
        of = architecture.places(again).items()
        found = {f"grad {name}": assembled(places, by_path(grads)) for name, places in of} | {"losses": losses}
    else:
        _, forward = jax.jit(loss)(params)
    outs, (embedded, *inner, last) = forward
    layers = [np.asarray(inner[i % len(inner)][i // len(inner)]) for i in range(model.n_layers)]
    found |= {f"logits{i}": np.asarray(each) for i, each in enumerate(outs)}
    found["hidden"] = np.stack([embedded, *layers[:-1], last])
    if tokens:
        prompt = " ".join(map(str, batch["ids"][0, :3].tolist()))
        (text,) = run.generate(prompt, tokens, temperature=0)
        found["greedy"] = np.asarray(text.ids)
    return found


def _trained(model: Decoder, params: Any, loss: Callable[[Any], Any]) -> tuple[np.ndarray, Any, Any]:
    """The losses of the steps; and of the first one gradients, and what `loss` gives besides."""
    declared = model.declared()
    optimizer = AdamW(Constant(RATE), b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=DECAY, clip=None)
    transform = optimizer.transform(trained(declared, declared), jnp.int32(0), jnp.int32(STEPS))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        (value, forward), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = transform.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value, grads, forward

    state, losses, first = transform.init(params), list[float](), list[Any]()
    for _ in range(STEPS):
        params, state, value, *more = step(params, state)
        losses.append(float(value))
        first = first or more
    return np.array(losses), *first


def _loss(logits: jax.Array, ids: jax.Array, real: jax.Array) -> jax.Array:
    """Of a language head the mean −log of each real token's successor; of others the mean of squares: a number that
    depends on everything, and is the same in both libraries."""
    if logits.ndim == 2:
        return (logits * logits).mean()
    chances = jax.nn.log_softmax(logits[:, :-1])
    nats = -jnp.take_along_axis(chances, ids[:, 1:, None], -1)[..., 0]
    weights = (real[:, 1:] > 0) * 1.0
    return (nats * weights).sum() / weights.sum()


def differences(mine: Numbers, theirs: Numbers, real: np.ndarray) -> dict[str, float]:
    """The largest of each kind; of tokens, how many differ before the first near-tie."""
    shown, found = real > 0, dict[str, float]()
    largest = lambda a, b: float(np.abs(a - b).max(initial=0))
    relative = lambda a, b: largest(a, b) / max(float(np.abs(b).max(initial=0)), 1e-3)
    each = [name for name in theirs if name.startswith("logits")]
    own = lambda a: a[shown] if a.ndim == 3 else a
    found["logits"] = max(largest(own(mine[name]), own(theirs[name])) for name in each)
    found["hidden"] = max(largest(a[shown], b[shown]) for a, b in zip(mine["hidden"], theirs["hidden"], strict=True))
    if "losses" in mine:
        grads = [name for name in theirs if name.startswith("grad ")]
        found["gradients"] = max(relative(mine[name], theirs[name]) for name in grads)
        found["losses"] = float(np.abs(mine["losses"] / theirs["losses"] - 1).max())
    if "greedy" in mine:
        length = int(theirs["certain"])
        found["greedy"] = float((mine["greedy"][:length] != theirs["greedy"][:length]).sum())
    return found


# --- PyTorch's side


def drawn(kind: str, rng: np.random.Generator, tiny: bool = False) -> tuple[Any, Any]:
    """A random model of transformers, and its config."""
    import torch
    import transformers as t

    pick: Callable[..., Any] = lambda *values: values[int(rng.integers(len(values)))]
    groups, per_group, width = pick(1, 2, 3), pick(1, 2, 3), pick(4, 6, 8, 10)
    if tiny:
        groups, per_group, width = 2, 1 if kind in ("gpt2", "bert") else 2, 6 if kind in ("gpt2", "bert") else 4
    heads, layers, vocab = groups * per_group, 2 if tiny else pick(1, 2, 3, 4), 29 if tiny else pick(31, 53, 97)
    eps, activation = pick(1e-5, 1e-6, 1e-4), pick("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh")
    inner, tied = 14 if tiny else pick(11, 29, 40), bool(pick(0, 1))
    context = 3 + TOKENS + 7
    context = 32 if tiny and kind in ("gpt2", "bert") else context
    common = {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common |= {"attn_implementation": "eager"}
    if kind == "gpt2":
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), pick(0.0, 0.1))
        sizes = {"n_positions": context, "n_embd": heads * width, "n_layer": layers, "n_head": heads, "n_inner": inner}
        how = {"activation_function": activation, "layer_norm_epsilon": eps, "tie_word_embeddings": tied}
        config = t.GPT2Config(**common, **sizes, **how, **rates, scale_attn_weights=bool(pick(1, 1, 0)))
        model: Any = t.GPT2LMHeadModel(config)
    elif kind == "bert":
        kinds = (t.BertModel, t.BertForMaskedLM, t.BertForPreTraining, t.BertForSequenceClassification)
        cls, labels = (t.BertForPreTraining if tiny else pick(*kinds)), pick(2, 3, 5)
        config = t.BertConfig(
            **common | {"pad_token_id": 0},
            hidden_size=heads * width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            type_vocab_size=pick(2, 3),
            hidden_act=activation,
            layer_norm_eps=eps,
            num_labels=labels,
        )
        model = cls(config)
    else:
        rope = {"rope_type": "default", "rope_theta": pick(100.0, 10_000.0, 500_000.0)}
        rope |= pick(
            {},
            {"rope_type": "linear", "factor": pick(2.0, 4.0)},
            {
                "rope_type": "llama3",
                "factor": pick(2.0, 8.0),
                "low_freq_factor": 1.0,
                "high_freq_factor": pick(2.0, 4.0),
                "original_max_position_embeddings": pick(16, 64),
            },
        )
        sizes = {
            "hidden_size": 12 if tiny else heads * pick(3, 4, 5, 7),
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": width,
            "max_position_embeddings": context,
            "rope_parameters": rope,
            "hidden_act": pick("silu", "silu", activation),
            "rms_norm_eps": eps,
            "tie_word_embeddings": tied,
        }
        more: dict[str, Any] = {}
        if kind == "llama":
            more = {"attention_bias": bool(pick(0, 1)), "mlp_bias": bool(pick(0, 1))}
        elif kind == "mistral":
            more = {"sliding_window": pick(None, 3, 5, 17)}
        else:
            windowed = bool(pick(0, 1))
            more = {"use_sliding_window": windowed, "sliding_window": pick(3, 7), "max_window_layers": pick(0, 1, 2)}
            more |= {"attention_bias": bool(pick(0, 1))} if kind == "qwen3" else {}
        if kind == "qwen2":  # has no head_dim of its own
            sizes["hidden_size"] = heads * width
        if tiny:  # what is rarest
            stretched = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            stretched |= {"rope_type": "llama3", "original_max_position_embeddings": 16}
            sizes |= {"rope_parameters": {"rope_theta": 100.0, **(stretched if kind == "llama" else {})}}
            more |= {"sliding_window": 5} if kind == "mistral" else {}
            more |= {"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {}
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        config = getattr(t, f"{names[kind]}Config")(**common, **sizes, **more)
        model = getattr(t, f"{names[kind]}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name.lower() or "ln_" in name
            parameter.copy_((1.0 if gain and name.endswith("weight") else 0.0) + 0.15 * noise)
    return model.eval(), config


def batch_of(kind: str, vocab: int, types: int, rng: np.random.Generator, tiny: bool) -> Numbers:
    """Rows of which the last has padding behind it."""
    rows, length = (2, 11) if tiny else (3, 23)
    ids = rng.integers(5, vocab, (rows, length)).astype(np.int32)
    real = np.ones((rows, length), np.int32)
    real[-1, length - 4 :] = 0
    found: Numbers = {"ids": ids, "real": real}
    if kind == "bert":
        found["parts"] = rng.integers(0, types, (rows, length)).astype(np.int32)
    return found


def theirs(model: Any, batch: Numbers, decays: Mapping[str, bool], tokens: int) -> Numbers:
    """What `ours` gives, of PyTorch; and "certain", how many greedy tokens no near-tie has decided."""
    import torch

    ids, real = torch.tensor(batch["ids"]).long(), torch.tensor(batch["real"]).long()
    given = {"input_ids": ids, "attention_mask": real}
    given |= {"token_type_ids": torch.tensor(batch["parts"]).long()} if "parts" in batch else {}

    def heads(out: Any) -> list[Any]:
        names = ("prediction_logits", "seq_relationship_logits", "logits", "pooler_output")
        return [out[name] for name in names if name in out]

    def loss(out: Any) -> Any:
        total = 0
        for each in heads(out):
            if each.ndim == 2:
                total = total + (each * each).mean()
            else:
                nats = torch.nn.functional.cross_entropy(each[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
                weights = (real[:, 1:] > 0).float()
                total = total + (nats * weights).sum() / weights.sum()
        return total

    out = model(**given, output_hidden_states=True)
    found: Numbers = {f"logits{i}": each.detach().numpy() for i, each in enumerate(heads(out))}
    found["hidden"] = np.stack([each.detach().numpy() for each in out.hidden_states])
    if tokens:
        with torch.no_grad():
            wrote = model.generate(
                ids[:1, :3],
                max_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                pad_token_id=0,
            )
        tops = torch.stack(wrote.logits)[:, 0].topk(2).values
        near = (tops[:, 0] - tops[:, 1] < NEAR_TIE).nonzero()
        found["greedy"] = wrote.sequences[0, 3:].numpy()
        found["certain"] = np.array(int(near[0]) if len(near) else tokens)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays[n] is decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS), []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model(**given))
        value.backward()
        losses.append(value.item())
        if step == 0:
            found |= {f"grad {n}": p.grad.clone().numpy() for n, p in named.items() if p.grad is not None}
        optimizer.step()
    return found | {"losses": np.array(losses)}


def decays_of(architecture: Architecture, model: Decoder) -> dict[str, bool]:
    """Tensor → whether weight decay acts on it here."""
    return {name: of[0].box.decay for name, of in architecture.places(model).items()}


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Of BERT, whose masked objective needs the mask's id."""
    import tokenizers

    parts: Any = tokenizers
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, vocab))]
    library = tokenizers.Tokenizer(parts.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = parts.pre_tokenizers.Whitespace()
    library.add_special_tokens(words[:5])
    library.save(str(folder / "tokenizer.json"))


def one(kind: str, seed: int, keep: Path | None = None) -> dict[str, float]:
    """The differences of one random model; or stores it and what PyTorch makes of it, tiny."""
    import torch
    import transformers

    torch.set_num_threads(1)  # more are slower with models so small
    transformers.utils.logging.disable_progress_bar()
    rng, tiny = np.random.default_rng([seed, KINDS.index(kind)]), keep is not None
    model, config = drawn(kind, rng, tiny)
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name) / "there"
        folder.mkdir(parents=True, exist_ok=True)
        half = not tiny and bool(rng.integers(3) == 0)
        shards = {} if tiny or rng.integers(2) else {"max_shard_size": "10KB"}
        (model.to(torch.bfloat16) if half else model).save_pretrained(folder, **shards)
        if half:  # what is rounded besides parameters, as frequencies, is made anew
            model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if kind == "bert":
            write_tokenizer(folder, config.vocab_size)
        import_run(folder, Path(name) / "run")
        run = open_run(Path(name) / "run")
        batch = batch_of(kind, config.vocab_size, getattr(config, "type_vocab_size", 1), rng, tiny)
        architecture, again = architecture_of(run)
        prefix = architecture.prefix if architecture.bare(again) else ""
        decays = {n.removeprefix(prefix): decay for n, decay in decays_of(architecture, again).items()}
        for other in set(dict(model.named_parameters())) - set(decays):  # of a pooler that no head reads
            raise SystemExit(f"{kind}: {other} has no place")
        tokens = 0 if kind == "bert" else 24 if tiny else TOKENS
        exact = copy.deepcopy(model).double()
        original = theirs(model, batch, decays, tokens)
        if prefix:
            original = {(f"grad {prefix}{n[5:]}" if n.startswith("grad ") else n): a for n, a in original.items()}
        if keep is not None:
            np.savez_compressed(keep / "expected.npz", allow_pickle=False, **batch, **original)
            for more in ("generation_config.json", "tokenizer_config.json"):
                (keep / more).unlink(missing_ok=True)
        found = differences(ours(run, batch, tokens), original, batch["real"])
        if found["losses"] > LIMITS["losses"]:
            exactly = theirs(exact, batch, decays, tokens=0)["losses"]
            found["rounding"] = float(np.abs(original["losses"] / exactly - 1).max())
        export_run(run, Path(name) / "back")
        back = json.loads((Path(name) / "back" / "config.json").read_text())
        cls = getattr(transformers, back["architectures"][0])
        _, info = cls.from_pretrained(Path(name) / "back", output_loading_info=True)
        same = _same_tensors(folder, Path(name) / "back")
        found["exported"] = float(sum(map(len, info.values())) + (not same))
    return found


def _same_tensors(one: Path, other: Path) -> bool:
    from safetensors import safe_open

    def bytes_of(folder: Path) -> dict[str, Any]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {
                    n: (str(t.dtype), t.shape, t.float().numpy().tobytes())
                    for n in file.keys()  # noqa: SIM118
                    for t in [file.get_tensor(n)]
                }
        return found

    return bytes_of(one) == bytes_of(other)


# --- chat templates

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content | trim + '<|im_end|>\\n' }}{% endgeneration %}"
    "{%- else %}{{- message.content | trim + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
WORDS = ("print", "x = 1", "def f(a):\n  return a", "naïve", "  spaced ", "", "a\n\nb", "数学", "The 'str'")


def dialogue(seed: int) -> list[dict[str, str]]:
    """Random messages, with a system's or without."""
    rng = np.random.default_rng(seed)
    say = lambda role: {"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(1, 6))) + "."}
    roles = ["system"] * int(rng.integers(2)) + ["user", "assistant"] * int(rng.integers(1, 4))
    return [say(role) for role in roles]


def unlike(count: int, first: int) -> int:
    """Of so many dialogues those that `apply_chat_template` writes in another way, or whose answers it marks so."""
    import tokenizers
    from transformers import AutoTokenizer

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    library.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(PythonTopics(), trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    with tempfile.TemporaryDirectory() as name:
        library.save(str(Path(name) / "tokenizer.json"))
        (Path(name) / "tokenizer_config.json").write_text(json.dumps(about))
        other = AutoTokenizer.from_pretrained(name)
        own = TokenizerFile(str(Path(name) / "tokenizer.json")).fit(())
    wrong = 0
    for seed in range(first, first + count):
        messages = dialogue(seed)
        pieces = Template.of(own, CHATML).dialogue(messages)
        ids = [ids_of(piece, own) for piece in pieces]
        answers = [np.full(len(each), piece.answer) for each, piece in zip(ids, pieces, strict=True)]
        theirs = other.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        same = [np.concatenate(ids).tolist() == theirs["input_ids"]]
        same.append(np.concatenate(answers).astype(int).tolist() == theirs["assistant_masks"])
        wrong += not all(same)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=(*KINDS, "all", "templates"))
    parser.add_argument("--count", type=int, default=6, help="how many random models of each")
    parser.add_argument("--seed", type=int, default=0, help="the first one's; others follow")
    parser.add_argument("--fixtures", type=Path, help="stores one tiny model of each in this folder, and what it gives")
    args = parser.parse_args()
    # Most of the time would go into optimising programs that run for a moment.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    logging.getLogger("jaxformer").setLevel(logging.ERROR)
    if args.architecture == "templates":
        wrong = unlike(args.count, args.seed)
        print(json.dumps({"templates": args.count, "different": wrong}))
        sys.exit(wrong > 0)
    failed = False
    for kind in KINDS if args.architecture == "all" else (args.architecture,):
        largest = dict[str, float]()
        for seed in range(args.seed, args.seed + (1 if args.fixtures else args.count)):
            found = one(kind, seed, args.fixtures and args.fixtures / kind)
            limits = LIMITS | {"losses": max(LIMITS["losses"], 2 * found.get("rounding", 0.0))}
            wrong = {name: found[name] for name in LIMITS.keys() & found.keys() if not found[name] <= limits[name]}
            if wrong:
                print(f"{kind} --seed {seed}: too different: {wrong}", file=sys.stderr)
            failed |= bool(wrong)
            largest |= {name: max(value, largest.get(name, 0.0)) for name, value in found.items()}
            jax.clear_caches()
        print(json.dumps({"architecture": kind, "count": 1 if args.fixtures else args.count} | largest), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
