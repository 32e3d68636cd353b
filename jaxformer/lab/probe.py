"""A small version of a config, with what checks share of it: parameters, batches, hidden states, gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config, Data
from jaxformer.data.tokenizers import Bytes
from jaxformer.declarations import by_path, path_name, trained, updated
from jaxformer.learning.by_depth import ByDepth
from jaxformer.learning.objectives import Classification, Masked
from jaxformer.learning.optimizers import AdamW, Optimizer
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.heads import ClassificationHead
from jaxformer.model.implementations import Auto
from jaxformer.model.masks import Local, Places, places
from jaxformer.model.models import Decoder, Encoder, Model
from jaxformer.run.step import Hyper, Recipe, TrainState, init_state
from jaxformer.spec import InputError, changed

WIDEST, ROWS, WINDOW, VOCABULARY = 64, 4, 24, 101
ORDINARY = VOCABULARY - 40  # ids that are not special
SPECIAL = {
    "mask": (VOCABULARY - 1,),
    "start": (VOCABULARY - 2,),
    "end": (VOCABULARY - 2,),
    "sentinels": tuple(range(ORDINARY, ORDINARY + 32)),
}


class Wrong(Exception):
    """What a check has found."""


class Inapplicable(Exception):
    """Why a check says nothing of this config."""


def small(config: Config) -> Config:
    """Widths at most 64, two groups of layers (one if a group has more than three kinds), at most 2 key/value heads and
    2 query heads for each, a window of at most 24, masks that reach 5 tokens, experts and other fields as they are.

    What no such model is takes the config's own heads and widths.
    """
    model = config.model
    limits = {"d_ff": WIDEST, "context_length": 2 * WINDOW, "head_width": 16, "d_model": WIDEST}
    names = {field.name for field in dataclasses.fields(model)}
    sizes: dict[str, Any] = {n: min(getattr(model, n), most) for n, most in limits.items() if getattr(model, n, None)}
    heads: dict[str, Any] = {}
    if isinstance(model, Decoder):
        groups = model.n_kv_heads or model.n_heads
        kept = min(groups, 2)
        heads = {"n_heads": kept * min(model.n_heads // groups, 2), "n_kv_heads": model.n_kv_heads and kept}
        kinds = max(len(model.kinds(stack)) for stack in model.stacks)
        sizes["n_layers"] = min(kinds * (2 if kinds <= 3 else 1), model.n_layers)
        sizes["n_encoder_layers"] = sizes["n_layers"]
        sizes |= {"d_ff": min(model.d_ff or WIDEST, WIDEST), "unroll": 1}
    elif "n_layers" in names:
        sizes["n_layers"] = min(model.n_layers, 2)  # pyright: ignore[reportAttributeAccessIssue]
    context = sizes["context_length"]
    window = min(config.window, WINDOW, context)
    data = dataclasses.replace(
        config.data, window=window, batch_size=ROWS, tokenizer=Bytes(), valid_tokens=None, valid=None
    )
    train = dataclasses.replace(config.train, accumulation=1, grad_norms=False)
    short = lambda spec: {"size": min(spec.size, 5)} if isinstance(spec, Local) else {}
    least = sizes.get("n_layers", 1) - 1
    still = lambda spec: {"still": min(spec.still, least)} if isinstance(spec, ByDepth) else {}
    for chosen in (sizes | heads, sizes, {n: sizes[n] for n in ("n_layers", "context_length") if n in sizes}):
        own = {n: value for n, value in chosen.items() if n in names}
        smaller = changed(dataclasses.replace(model, **own, vocab_size=None), short)
        if isinstance(smaller, Decoder) and not smaller.repeats:
            smaller = dataclasses.replace(smaller, remat=None)
        found = dataclasses.replace(
            config,
            model=smaller,
            data=data,
            optimizer=changed(config.optimizer, still),
            train=train,
            init_from=None,
            adapter=None,
            writers=(),
            directory="check",
        )
        try:
            smaller.check("model.")
            return found
        except ValueError:
            continue
    raise InputError(f"model={type(model).__name__} cannot be made small; give sizes by --model.FIELD=VALUE")


def sizes_of(model: Model) -> dict[str, int]:
    """Those that are told, by field."""
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "context_length")
    return {name: getattr(model, name) for name in names if getattr(model, name, None)}


def with_part(name: str) -> Config:
    """The smallest config that takes a part, as "my_module:Part"."""
    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": WINDOW}
    writes = Config("check", Decoder(**sizes), Data())
    fills = dataclasses.replace(writes, model=Encoder(**sizes), objective=Masked())
    tells = dataclasses.replace(fills, model=Encoder(**sizes, head=ClassificationHead("x")), objective=Classification())
    reasons: list[str] = []
    for path in PLACES:
        for config in (writes, fills, tells):
            try:
                return config_lib.resolve(config, {path: name})
            except InputError as error:
                reasons.append(str(error))
    raise InputError(f"{name}: no model takes it in one of {', '.join(PLACES)}; the first says: {reasons[0]}")


PLACES = (
    *("model.position", "model.kernel", "model.mask", "model.mixer", "model.feed_forward", "model.norm"),
    *("model.residual", "model.feed_forward.activation", "model.initializer", "model.embedding", "model.head"),
    *("objective", "optimizer", "optimizer.learning_rate", "data.sampling", "model", "sampler"),
)


class Probe:
    """A small config, and what checks share of it."""

    def __init__(self, config: Config):
        heads = tuple(
            head.with_classes({head.column: ("no", "yes")} if head.column else {}) for head in config.model.heads
        )
        head = heads if isinstance(config.model.head, tuple) else heads[0]
        model = dataclasses.replace(config.model, vocab_size=VOCABULARY, head=head)
        several = config.data.sampling.several
        try:
            objective = config.objective.filled(SPECIAL, VOCABULARY, config.row.tokens, several)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.config = dataclasses.replace(config, model=model, objective=objective)
        self.model, self.objective, self.length = _without_dropout(model), objective, config.window
        self.recipe = Recipe(self.model, objective)  # float32, no dropout

    @functools.cached_property
    def declared(self) -> Any:
        return self.model.declared()

    @functools.cached_property
    def moving(self) -> Any:
        """The declarations, with what the config's optimizer freezes as not trained."""
        return self.config.optimizer.frozen(self.declared)

    @functools.cached_property
    def loud(self) -> Any:
        """Parameters as initialised, with so much noise that nothing is zero: matrices keep the size of their input,
        others get a tenth."""
        first = self.first.params
        rng = np.random.default_rng(0)
        boxes = by_path(self.declared).items()
        scale = {path: box.fan_in**-0.5 if box.letters.into else 0.1 for path, box in boxes}
        noisy = lambda path, a: a + jnp.asarray(scale[path_name(path)] * rng.normal(size=a.shape), a.dtype)
        return updated(first, trained(jax.tree_util.tree_map_with_path(noisy, first), self.declared))

    @functools.cached_property
    def first(self) -> TrainState:
        return init_state(self.recipe, self.hyper())

    def hyper(self, optimizer: Optimizer | None = None) -> Hyper:
        """200 steps of Adam, unless another optimizer is given."""
        adam = AdamW(WarmupCosine(1e-2, 1e-3, 10), weight_decay=0.0)
        return Hyper(np.uint32(0), np.int32(200), optimizer or adam)

    def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Ordinary ids, in rows of unequal length; where several documents share a row, two of them."""
        rng, data = np.random.default_rng(seed), self.config.data
        shapes = dict(data.sampling.shapes(data.corpus, self.config.row))
        labels = self.objective.label_shapes(self.model, self.config.row.tokens)
        found: dict[str, np.ndarray] = {}
        for name in [n for n in ("tokens", "source") if n in shapes]:
            (width,) = shapes[name]
            found[name] = rng.integers(0, ORDINARY, (ROWS, width), dtype=np.int32)
            lengths = np.maximum(width - 3 * np.arange(ROWS) % max(width // 2, 1), 2)
            real = np.arange(width) < lengths[:, None]
            second = np.arange(width) >= lengths[:, None] // 2 if data.sampling.several else 0
            segments = np.where(real, 1 + second, 0).astype(np.int32)
            found["segments" if name == "tokens" else f"{name}_segments"] = segments
            if name == "tokens" and "parts" in shapes:
                found["parts"] = ((np.arange(width) >= 2) & real).astype(np.int32)
        return found | {
            f"labels_{n}": rng.integers(0, 2, (ROWS, *shape), dtype=np.int32) for n, shape in labels.items()
        }

    def ids(self, *shape: int, seed: int = 1) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).integers(0, ORDINARY, shape, dtype=np.int32))

    def memory(self, segment: jax.Array) -> Any:
        """Of another text whose documents are as long, for a model that needs one."""
        if not self.model.encodes:
            return None
        return encoded(self.model, self.loud, self.ids(1, segment.shape[1], seed=9).repeat(len(segment), 0), segment)

    def hidden(self, ids: Any, at: Places, memory: Any = None, cache: Any = None, params: Any = None) -> Any:
        return _hidden(self.model, params or self.loud, jnp.asarray(ids), at, cache, memory)

    @functools.cached_property
    def example(self) -> Any:
        return self.prepared(3)

    def prepared(self, seed: int) -> Any:
        """What the objective makes of the batch with a key."""
        return self.objective.prepare(jax.tree.map(jnp.asarray, self.batch()), jax.random.key(seed))


def _without_dropout(model: Model) -> Model:
    """Nor have its parts any."""
    return changed(model, lambda spec: {"dropout": 0.0} if hasattr(spec, "dropout") else {})


def with_dropout(model: Any, rate: float) -> Any:
    """Its attention is computed by what has dropout of weights, as not all implementations have."""
    formula = lambda spec: {"implementation": Auto()} if hasattr(spec, "implementation") else {}
    return dataclasses.replace(changed(model, formula), dropout=rate)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: Model, params: Any, ids: Any, at: Places, cache: Any, memory: Any) -> Any:
    out = model.hidden(params, ids, at, cache=cache, memory=memory)
    return out.h, out.cache


@functools.partial(jax.jit, static_argnums=0)
def encoded(model: Model, params: Any, ids: jax.Array, segment: jax.Array) -> Any:
    return model.encode(params, ids, places(segment)).h


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(objective: Any, model: Model, params: Any, example: Any, key: Any) -> Any:
    """What is minimised, divided by the weight; and its gradient by what is trained."""
    declared = model.declared()

    def loss(moved: Any) -> Any:
        sums = objective.loss(model, updated(params, moved), example, key)
        return sums.minimised / jnp.maximum(sums.weight, 1)

    return jax.value_and_grad(loss)(trained(params, declared))


def close(a: Any, b: Any, what: str, tolerance: float = 2e-4) -> str:
    """Raises Wrong if two trees differ by more than the tolerance times the largest number of an array."""
    worst = 0.0
    both = zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True)
    for (path, x), y in both:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        off = float(np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-3))
        if not off <= tolerance:
            name = f" of {path_name(path)}" if path else ""
            raise Wrong(f"{what}{name} differ by {off:.1e} of the largest, more than {tolerance:.0e}")
        worst = max(worst, off)
    return f"{what} agree to {worst:.0e}"
