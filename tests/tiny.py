"""Tiny models for tests: a different prime for every axis, and weights that hide nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.tokenizers import BPE, Characters, TokenizerFile
from jaxformer.declarations import whole
from jaxformer.generation.decode import LeftToRight, Request, row_keys
from jaxformer.learning.objectives import NextToken
from jaxformer.model.blocks import Block
from jaxformer.model.masks import one_document
from jaxformer.model.mixers import Context, MultiHead
from jaxformer.model.models import Decoder
from jaxformer.run.plan import abstract_state, recipe_of

B, T = 3, 13
SIZES = {
    "vocab_size": 29,
    "d_model": 84,
    "n_layers": 5,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_ff": 11,
    "context_length": 23,
    "unroll": 1,  # quicker to compile
}


def decoder(**fields):
    return Decoder(**(SIZES | fields))


def loud(model, seed=0):
    """Weights large enough that nothing hides behind a small initialisation; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), shapes)


def ids(*shape, seed=1, high=29):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape, dtype=np.int32))


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, ids, at, key=None, cache=None):
    return model.hidden(params, ids, at, key, cache)[:2]


def mixed(kind, params, x, at):
    """What the mixer of a block gives."""
    return kind.mixer(whole(kind.mixer.params(kind.parts), params), kind.parts, x, Context(None, at)).h


def crossed(kind, params, x, at, source):
    """What cross-attention gives; and the memory of the source [B, S, D]."""
    own, attention = whole(MultiHead().params(kind.cross), params), MultiHead()
    memory = attention.remember(own, kind.cross, source, Context(None, one_document(source.shape[1])))
    return attention(own, kind.cross, x, Context(None, at, memory=memory)).h, memory


def block(kind, params, x, at, key=None, memory=None):
    """The stream behind one block."""
    return Block(kind, 1).apply({"params": params}, x, Context(None, at, 0, {}, key, None, memory)).h


def generate(model, params, prompts, tokens, processors=(), seed=0, sampler=None, objective=None, **more):
    """int32[B, n] that follow the prompts, n ≤ tokens: what the sampler draws, side by side."""
    keys = row_keys(seed, 0, len(prompts))
    request = Request(objective or NextToken(), model, params, prompts, tokens, keys, processors, **more)
    drawn = [part.ids for part in (sampler or LeftToRight())(request)]
    return np.concatenate([np.zeros((len(prompts), 0), np.int32), *drawn], 1)


def totals(sums):
    """Plain nats, the sum of weights, and what is minimised."""
    return sums.nats, sums.weight, sums.minimised


def log_softmax(logits):
    """In NumPy, in double precision."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def without_corpus(config):
    """A tokenizer such as the config's would be, fitted, and the shapes of the state."""
    tokenizer = config.data.tokenizer
    if isinstance(tokenizer, TokenizerFile):  # that of another run
        tokenizer = BPE(4096, mask_token=True, sentinels=32).fit(["a"])
    elif tokenizer.vocab_size is None:
        assert isinstance(tokenizer, Characters)
        tokenizer = dataclasses.replace(tokenizer, alphabet="".join(map(chr, range(65, 130))))
    return tokenizer, abstract_state(config, recipe_of(config, tokenizer, {"target": ("0", "1")}))
