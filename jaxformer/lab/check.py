"""Is a model sound? Properties that must hold of every config, tried on a small version of it."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config, Data
from jaxformer.data.batches import Batches
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import Bytes
from jaxformer.declarations import is_declared, path_name, trained, updated, whole
from jaxformer.generation.decode import LeftToRight, Request, row_keys
from jaxformer.learning.objectives import Classification, Masked, TokenObjective
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.model.heads import ClassificationHead, LanguageHead
from jaxformer.model.kernels import Look, Softmax, plain
from jaxformer.model.masks import Local, Places, View, one_document, places
from jaxformer.model.mixers import MultiHead
from jaxformer.model.models import Decoder, Encoder, Model
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.plan import hyper_of
from jaxformer.run.step import Hyper, Recipe, TrainState, evaluate_batch, init_state, norms, train_step, train_steps
from jaxformer.spec import InputError, Spec, counted, nearest

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


class Finding(NamedTuple):
    """What a check came to."""

    check: str
    status: str  # "passed", "failed" or "not applicable"
    detail: str  # the numbers, or the reason
    look_at: str  # where to look if it failed
    seconds: float


class Checked(NamedTuple):
    """All findings, in order."""

    subject: str  # what was checked
    small: str  # how it was made small
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return all(finding.status != "failed" for finding in self.findings)

    def __str__(self) -> str:
        marks = {"passed": "ok", "failed": "FAILED", "not applicable": "-"}
        lines = [f"{self.subject}: {self.small}"]
        for each in self.findings:
            lines.append(f"{marks[each.status]:7} {each.check}: {each.detail}")
            lines += [f"        look at {each.look_at}"] if each.status == "failed" else []
        failed = sum(finding.status == "failed" for finding in self.findings)
        passed = sum(finding.status == "passed" for finding in self.findings)
        seconds = sum(finding.seconds for finding in self.findings)
        return "\n".join([*lines, f"{passed} passed, {failed} failed in {seconds:.0f} s"])


def check(
    what: str | Path | Config, overrides: Mapping[str, Any] | None = None, until_failure: bool = False
) -> Checked:
    """Tries a small version of a config, of a file, a preset, or of a part as "my_module:Part", in the smallest model
    that takes it.

    The config is made small by `small`; its corpus is not read: batches are drawn at random. Leaks and gradients are
    probed on `loud` parameters, behind which nothing hides. With `until_failure` no check follows the first that fails.
    Raises InputError for what is no config and no part.
    """
    config = with_part(what) if isinstance(what, str) and ":" in what else config_lib.resolve(what, overrides)
    probe = Probe(small(config))
    with _quickly_compiled():
        findings: list[Finding] = []
        for each in CHECKS:
            findings.append(_tried(probe, *each))
            if until_failure and findings[-1].status == "failed":
                break
    sizes = ", ".join(f"{name} {value}" for name, value in _sizes(probe.config.model).items())
    return Checked(
        str(what) if not isinstance(what, Config) else what.directory, f"made small: {sizes}", tuple(findings)
    )


@contextlib.contextmanager
def _quickly_compiled() -> Iterator[None]:
    """XLA leaves most optimisations out: these programs run once or twice."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _tried(probe: "Probe", name: str, look_at: str, function: Callable[["Probe"], str]) -> Finding:
    started = time.perf_counter()
    try:
        status, detail = "passed", function(probe)
    except Wrong as wrong:
        status, detail = "failed", str(wrong)
    except Inapplicable as reason:
        status, detail = "not applicable", str(reason)
    except Exception as error:  # a part of the user's may raise anything: that is a finding, too
        status, detail = "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Finding(name, status, detail, look_at, time.perf_counter() - started)


# --- what is checked


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
    for chosen in (sizes | heads, sizes, {n: sizes[n] for n in ("n_layers", "context_length") if n in sizes}):
        own = {n: value for n, value in chosen.items() if n in names}
        smaller = _changed(dataclasses.replace(model, **own, vocab_size=None), short)
        found = dataclasses.replace(
            config, model=smaller, data=data, train=train, init_from=None, writers=(), directory="check"
        )
        try:
            smaller.check("model.")
            return found
        except ValueError:
            continue
    raise InputError(f"model={type(model).__name__} cannot be made small; give sizes by --model.FIELD=VALUE")


def _sizes(model: Model) -> dict[str, int]:
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
    raise InputError(f"{name}: no model takes it as {nearest(name, list(PLACES))}; {reasons[0]}")


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
    def loud(self) -> Any:
        """Parameters as initialised, with so much noise that nothing is zero: matrices keep the size of their input,
        others get a tenth."""
        first = self.first.params
        boxes = jax.tree_util.tree_flatten_with_path(self.declared, is_leaf=is_declared)[0]
        rng = np.random.default_rng(0)
        scale = {path_name(p): box.fan_in**-0.5 if box.letters.into else 0.1 for p, box in boxes}
        noisy = lambda path, a: a + jnp.asarray(scale[path_name(path)] * rng.normal(size=a.shape), a.dtype)
        return updated(first, trained(jax.tree_util.tree_map_with_path(noisy, first), self.declared))

    @functools.cached_property
    def first(self) -> TrainState:
        return init_state(self.recipe, self.hyper())

    def hyper(self, **fields: Any) -> Hyper:
        optimizer = fields.pop("optimizer", AdamW(WarmupCosine(1e-2, 1e-3, 10), weight_decay=0.0, b2=0.99))
        return Hyper(np.uint32(0), np.int32(fields.pop("steps", 200)), optimizer)

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
        return _encoded(self.model, self.loud, self.ids(1, segment.shape[1], seed=9).repeat(len(segment), 0), segment)

    def hidden(self, ids: Any, at: Places, memory: Any = None, cache: Any = None) -> Any:
        return _hidden(self.model, self.loud, jnp.asarray(ids), at, cache, memory)

    @functools.cached_property
    def example(self) -> Any:
        return self.objective.prepare(self.batch(), jax.random.key(3))


def _without_dropout(model: Model) -> Model:
    """Nor have its parts any."""
    return _changed(model, lambda spec: {"dropout": 0.0} if hasattr(spec, "dropout") else {})


def _changed(spec: Any, of: Callable[[Spec], dict[str, Any]]) -> Any:
    """The spec, and those at any depth of it, each with the fields that a function gives for it."""
    if isinstance(spec, tuple):
        return tuple(_changed(each, of) for each in spec)
    if not isinstance(spec, Spec):
        return spec
    inner = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    changed = {name: _changed(value, of) for name, value in inner.items() if isinstance(value, (Spec, tuple))}
    return dataclasses.replace(spec, **changed | of(spec))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model: Model, params: Any, ids: Any, at: Places, cache: Any, memory: Any) -> Any:
    out = model.hidden(params, ids, at, cache=cache, memory=memory)
    return out.h, out.cache


@functools.partial(jax.jit, static_argnums=0)
def _encoded(model: Model, params: Any, ids: jax.Array, segment: jax.Array) -> Any:
    return model.encode(params, ids, places(segment)).h


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(objective: Any, model: Model, params: Any, example: Any) -> jax.Array:
    """What is minimised, of an evaluation."""
    sums = objective.loss(model, params, example, None)
    return sums.minimised / jnp.maximum(sums.weight, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(objective: Any, model: Model, params: Any, example: Any, key: Any) -> Any:
    """What is minimised, divided by the weight; and its gradient by what is trained."""
    declared = model.declared()

    def loss(moved: Any) -> Any:
        sums = objective.loss(model, updated(params, moved), example, key)
        return sums.minimised / jnp.maximum(sums.weight, 1)

    return jax.value_and_grad(loss)(trained(params, declared))


def _close(a: Any, b: Any, what: str, tolerance: float = 2e-4) -> str:
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


# --- the checks; each returns what it found in numbers, or raises


def no_leak(probe: Probe) -> str:
    """Changing a token changes nothing before it."""
    model, n = probe.model, min(probe.length, 12)
    if model.sees_answers:
        raise Inapplicable("a token sees later ones, by its mask")
    first = 0 if not model.sees_ahead else 2  # the first part of a document is seen whole
    rows = np.repeat(np.asarray(probe.ids(1, n)), n + 1, 0)
    for t in range(n):
        rows[t + 1, t] = (rows[t + 1, t] + 7) % ORDINARY
    at = one_document(n)
    at = at._replace(part=(at.position >= first).astype(jnp.int32))
    h = np.asarray(probe.hidden(rows, at, probe.memory(jnp.ones((n + 1, n), jnp.int32)))[0])
    scale = np.abs(h[0]).max()
    for t in range(max(first, 1), n):
        if (off := np.abs(h[t + 1, :t] - h[0, :t]).max()) > 1e-6 * scale:
            place = int(np.abs(h[t + 1, :t] - h[0, :t]).max(-1).argmax())
            raise Wrong(
                f"token {t} changes the hidden state of token {place} before it by {off / scale:.1e} of the largest"
            )
    blind = [t for t in range(n) if np.abs(h[t + 1, t] - h[0, t]).max() < 1e-6 * scale]
    if blind:
        raise Wrong(f"the hidden state of token {blind[0]} does not depend on the token")
    return f"{n} tokens changed one at a time"


def answer_unseen(probe: Probe) -> str:
    """What is predicted does not enter the hidden state that predicts it."""
    objective, model = probe.objective, probe.model
    if not isinstance(objective, TokenObjective) or model.sees_answers:
        raise Inapplicable("nothing is predicted of tokens that may not be seen")
    batch, asked = probe.batch(), 0

    @jax.jit
    def run(batch: Any) -> Any:
        example = objective.prepare(batch, jax.random.key(3))
        return example.targets, example.weights, objective.hidden(model, probe.loud, example, None).h

    targets, weights, h = run(batch)
    h = jax.tree.leaves(h)[0]
    for t in range(batch["tokens"].shape[1]):
        tokens = np.array(batch["tokens"])
        tokens[:, t] = (tokens[:, t] + 7) % ORDINARY
        other, _, h2 = run(batch | {"tokens": tokens})
        other, h2 = np.asarray(other), np.asarray(jax.tree.leaves(h2)[0])
        shape = h2.shape[:2] if h2.ndim == 3 else other.shape
        if h2.ndim != 3 or other.shape != shape:
            raise Inapplicable("hidden states are no rows of tokens")
        changed = (other != np.asarray(targets)) & (np.broadcast_to(weights, shape) > 0)
        asked += int(changed.sum())
        off = np.abs(h2 - np.asarray(h)).max(-1)[changed]
        if off.size and off.max() > 1e-6 * np.abs(h2).max():
            raise Wrong(f"token {t} of a row is predicted from itself")
    if not asked:
        raise Wrong("no token is predicted: all weights are 0")
    return f"{asked} predictions"


def cache_is_full_pass(probe: Probe) -> str:
    """A ragged prefill, then one token at a time, then two at once, against all tokens at once."""
    model, n = probe.model, min(probe.length, 13)
    if not model.writes or n < 8:
        raise Inapplicable("it does not write token after token" if n >= 8 else "its window is too short")
    text = probe.ids(3, n)
    segment = (np.arange(n) < np.array([n - 4, n, n - 7])[:, None]).astype(np.int32)
    segment[2, n - 4 :] = 1
    position = jnp.where(segment > 0, jnp.cumsum(segment, 1) - 1, -1)
    at = Places(position, jnp.asarray(segment), (position >= 2).astype(jnp.int32))
    memory = probe.memory(jnp.ones((3, n), jnp.int32))
    full = probe.hidden(text, at, memory)[0]
    cache, outs, start = model.cache(3, n), [], 0
    for size in (n - 4, 1, 1, 2):
        cut = jax.tree.map(lambda a, piece=slice(start, start + size): a[:, piece], at)
        h, cache = probe.hidden(text[:, start : start + size], cut, memory, cache)
        outs.append(h)
        start += size
    real = segment[..., None]
    return _close(jnp.concatenate(outs, 1) * real, full * real, "cached and full hidden states")


def scan_is_unrolled(probe: Probe) -> str:
    model = probe.model
    if not isinstance(model, Decoder) or model.n_layers == len(model.kinds(model.stacks[-1])):
        raise Inapplicable("there is no scan over several layers")
    dropped = dataclasses.replace(model, dropout=0.2)
    both = [dataclasses.replace(dropped, unroll=n) for n in (1, model.n_layers)]
    results = [_gradient(probe.objective, each, probe.loud, probe.example, jax.random.key(5)) for each in both]
    return _close(results[0], results[1], "loss and gradients, with dropout,")


def packed_is_separate(probe: Probe) -> str:
    n, model = min(probe.length, 14), probe.model
    if n < 6:
        raise Inapplicable("its window is too short")
    a, b = n // 2 - 1, n // 2 - 1
    text = np.asarray(probe.ids(1, n))[0]
    rows, segment = np.zeros((3, n), np.int32), np.zeros((3, n), np.int32)
    rows[0, : a + b], segment[0, :a], segment[0, a : a + b] = text[: a + b], 1, 2
    rows[1, :a], segment[1, :a] = text[:a], 1
    rows[2, n - b :], segment[2, n - b :] = text[a : a + b], 2
    at = _with_parts(places(jnp.asarray(segment)))
    memory = None
    if model.encodes:
        memory = _encoded(model, probe.loud, jnp.asarray((rows * 3 + 1) % ORDINARY), jnp.asarray(segment))
    h = probe.hidden(rows, at, memory)[0]
    return _close((h[0, :a], h[0, a : a + b]), (h[1, :a], h[2, n - b :]), "packed and separate hidden states")


def padded_is_alone(probe: Probe) -> str:
    model, n = probe.model, max(probe.length - 3, 1)
    text = probe.ids(2, n)
    wide, segment = jnp.pad(text, ((0, 0), (0, 3))), jnp.pad(jnp.ones((2, n), jnp.int32), ((0, 0), (0, 3)))
    at, padded = _with_parts(places(jnp.ones((2, n), jnp.int32))), _with_parts(places(segment))
    source = jnp.ones((2, n), jnp.int32)
    memory = probe.memory(source)
    alone, filled = probe.hidden(text, at, memory)[0], probe.hidden(wide, padded, memory)[0]
    found: dict[str, Any] = {"hidden": (alone, filled[:, :n])}
    for head in model.heads:
        if not (isinstance(head, LanguageHead) or head.reads_logits):  # those read each hidden state for itself
            both = ((alone, at), (filled, padded))
            outs = [model.read(probe.loud, head, h, *head.given(probe.loud, where.segment > 0)) for h, where in both]
            outs = [out[:, :n] if out.ndim == 3 else out for out in outs]
            found[head.name] = outs[0], outs[1]
    first, second = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    return _close(second, first, "padded and unpadded texts")


def _with_parts(at: Places) -> Places:
    return at._replace(part=(at.position >= 2).astype(jnp.int32))


def kernel_is_plain(probe: Probe) -> str:
    """Values are the weights times v, and plain softmax attention is what the paper says; with gradients."""
    model = probe.model
    kinds = [k for s in model.stacks for k in model.kinds(s)] if isinstance(model, Decoder) else []
    found = {k.parts.kernel: k.parts for k in kinds if isinstance(k.mixer, MultiHead)}
    told: list[str] = []
    for kernel, parts in found.items():
        if not isinstance(kernel, Softmax) or kernel.shares:
            continue
        dims, n = parts.dims, 7
        rng = np.random.default_rng(2)
        draw = lambda *shape, rng=rng: jnp.asarray(rng.normal(size=shape), jnp.float32)
        q, k, v, r = (draw(2, dims[h], n, dims["K"]) for h in ("H", "G", "G", "H"))
        at = _with_parts(one_document(n))
        box = lambda p, dims=dims: jnp.zeros(
            [({**dims, **p.sizes})[letter] for letter in p.letters if letter.isalpha()]
        )
        params = {name: box(p) + 0.1 for name, p in whole(kernel.params(), kernel.params()).items()}
        view = View(at, at, parts.mask, dims["H"])

        def values(q: Any, k: Any, v: Any, kernel: Any = kernel, params: Any = params, view: Any = view) -> Any:
            left = kernel.remember(params, k, v, view.query, None)
            return kernel(params, Look(q, left, left, view), None, 0.0)

        def by_weights(q: Any, k: Any, v: Any, values: Any = values, kernel: Any = kernel, view: Any = view) -> Any:
            if type(kernel) is Softmax and kernel.scale is None:
                n = q.shape[1] // k.shape[1]
                return plain(q, jnp.repeat(k, n, 1), jnp.repeat(v, n, 1), view.mask())
            weights = values(q, k, v).activations["weights"]
            return weights @ jnp.repeat(v, q.shape[1] // v.shape[1], 1)

        sees = np.broadcast_to(np.asarray(view.mask()).any(-1, keepdims=True), q.shape)
        r = r * sees
        if "weights" not in values(q, k, v).activations:
            continue
        one = jax.value_and_grad(lambda *a, f=values, r=r: (f(*a).h * r).sum(), (0, 1, 2))(q, k, v)
        two = jax.value_and_grad(lambda *a, f=by_weights, r=r: (f(*a) * r).sum(), (0, 1, 2))(q, k, v)
        told.append(_close(one, two, f"{type(kernel).__name__} and its plain form, with gradients,", 1e-4))
        weights = np.asarray(values(q, k, v).activations["weights"])
        if weights.min() < 0 or weights.sum(-1).max() > 1 + 1e-4 or (weights * ~np.asarray(view.mask())).max() > 0:
            raise Wrong(f"the weights of {type(kernel).__name__} are no distribution over what is seen")
    if not told:
        raise Inapplicable("no kernel tells its weights")
    return "; ".join(told)


def accumulation_is_the_batch(probe: Probe) -> str:
    try:
        probe.objective.check_rows("", ROWS, 2)
    except ValueError:
        raise Inapplicable("rows of a batch are compared with one another") from None
    hyper, results = probe.hyper(optimizer=SGD(Constant(1.0))), []
    for slices in (1, 2):
        state = probe.first.replace(
            params=probe.loud,
            opt_state=hyper.optimizer.transform(None, jnp.int32(0), jnp.int32(1)).init(
                trained(probe.loud, probe.declared)
            ),
        )
        recipe = dataclasses.replace(probe.recipe, slices=slices)
        after, rows = jax.jit(train_step, static_argnums=0)(recipe, state, probe.batch(), hyper)
        moved = jax.tree.map(lambda a, b: a - b, after.params, probe.loud)
        results.append((moved, {name: rows[name] for name in ("loss", "grad_norm")}))
    return _close(results[1], results[0], "the updates of 2 slices and of the whole batch", 1e-3)


def dropout_as_told(probe: Probe) -> str:
    """None in an evaluation; in training other masks at every step."""
    if not hasattr(probe.model, "dropout"):
        raise Inapplicable("the model has no dropout")
    dropped = dataclasses.replace(probe.model, dropout=0.5)  # pyright: ignore[reportCallIssue]

    def evaluated_by(model: Model) -> float:
        recipe, lengths = Recipe(model, probe.objective), np.ones(VOCABULARY, np.float32)
        sums = evaluate_batch(recipe, probe.loud, probe.batch(), np.int32(0), lengths)
        return float(sums["nats"] / sums["weight"])

    plain_loss, evaluated = evaluated_by(probe.model), evaluated_by(dropped)
    if abs(plain_loss - evaluated) > 1e-5 * abs(plain_loss):
        raise Wrong(f"an evaluation has the loss {evaluated:.6g} with dropout and {plain_loss:.6g} without")
    recipe = dataclasses.replace(probe.recipe, model=dropped)
    step = jax.jit(train_step, static_argnums=0)
    state = init_state(recipe, probe.hyper()).replace(params=probe.loud)
    later = state.replace(step=jnp.int32(1))
    losses = [float(step(recipe, each, probe.batch(), probe.hyper())[1]["loss"]) for each in (state, later, state)]
    if losses[0] != losses[2]:
        raise Wrong("the same step gives two losses")
    if losses[0] == losses[1]:
        raise Wrong("two steps have the same dropout: the key does not depend on the step")
    return f"loss {evaluated:.4f} without, {losses[0]:.4f} and {losses[1]:.4f} with"


def resumes(probe: Probe) -> str:
    """Saved and restored to the same bits, and 2 + 2 steps are 4."""
    recipe = dataclasses.replace(probe.recipe, model=probe.config.model)
    hyper = hyper_of(probe.config)
    batches = [probe.batch(seed) for seed in range(4)]
    buffer = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    straight, _ = train_steps(recipe, init_state(recipe, hyper), buffer, np.int32(4), hyper)
    half, _ = train_steps(recipe, init_state(recipe, hyper), buffer, np.int32(2), hyper)
    kept = jax.tree.map(np.array, half)
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder))
        writer.save(half, 2)
        writer.close()
        on = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), half)
        restored = writer.restore(abstract, 2)
    _same(restored, kept, "saved and restored")
    rolled = {name: np.roll(a, -2, 0) for name, a in buffer.items()}
    resumed, _ = train_steps(recipe, restored, rolled, np.int32(2), hyper)
    _same(resumed, straight, "resumed and straight")
    if int(resumed.step) != 4:
        raise Wrong(f"4 steps end at step {int(resumed.step)}")
    return f"{counted(len(jax.tree.leaves(kept)), 'array')} to the bit"


def _same(a: Any, b: Any, what: str) -> None:
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            raise Wrong(f"{path_name(path)}: {what} are not the same bits")


def memorises(probe: Probe) -> str:
    """200 steps of Adam on one batch."""
    batch, hyper = probe.batch(), probe.hyper()
    buffer = {name: np.repeat(a[None], 100, 0) for name, a in batch.items()}
    state, first = train_steps(probe.recipe, init_state(probe.recipe, hyper), buffer, np.int32(100), hyper)
    _, last = train_steps(probe.recipe, state, buffer, np.int32(100), hyper)
    begins, ends = float(np.nanmean(first["loss"][:3])), float(np.nanmean(last["loss"][-20:]))
    two = [jax.tree.leaves(probe.objective.prepare(batch, jax.random.key(i))) for i in (0, 1)]
    drawn = any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*two, strict=True))
    most = (
        0.7 if drawn or len(jax.tree.leaves(probe.loud)) < 3 else 0.3
    )  # a table of bigrams cannot know a text by heart
    if isinstance(probe.objective, TokenObjective) and ends < -1e-3:
        raise Wrong(f"the loss is {ends:.3f}: −log of a probability is never negative")
    if not ends < most * begins:
        raise Wrong(f"the loss goes from {begins:.3f} to {ends:.3f} only, not under {most:.0%} of it")
    return f"the loss goes from {begins:.3f} to {ends:.3f}"


def all_learn(probe: Probe) -> str:
    """Every trained array, in every layer, has a gradient, and the config's optimizer moves it; no other moves."""
    moving = trained(probe.declared, probe.declared)
    key = jax.random.key(1)
    sizes = norms(moving, _gradient(probe.objective, probe.model, probe.loud, probe.example, key)[1])
    for path, norm in sizes.items():
        wrong = [i for i, value in enumerate(np.atleast_1d(norm)) if not (np.isfinite(value) and value > 0)]
        if wrong:
            layer = f" of layer {wrong[0]} of its stack" if np.ndim(norm) else ""
            raise Wrong(f"{path}{layer} has a gradient of {np.atleast_1d(norm)[wrong[0]]:.3g}")
    optimizer, steps = probe.config.optimizer, jnp.int32(probe.config.train.steps)
    rates = jax.vmap(lambda step: optimizer.learning_rate(step, steps))(
        jnp.arange(0, probe.config.train.steps, max(probe.config.train.steps // 200, 1))
    )
    fastest = jnp.int32(int(np.argmax(rates)) * max(probe.config.train.steps // 200, 1))
    transform = optimizer.transform(moving, fastest, steps)
    own = trained(probe.loud, probe.declared)
    grads = _gradient(probe.objective, probe.model, probe.loud, probe.example, key)[1]
    updates = jax.jit(lambda grads, own: transform.update(grads, transform.init(own), own)[0])(grads, own)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        if not (np.isfinite(update).all() and np.abs(update).max() > 0):
            raise Wrong(f"{path_name(path)} is not moved by {type(optimizer).__name__}")
    return f"{counted(len(sizes), 'array')}, the least gradient {min(float(np.min(n)) for n in sizes.values()):.1e}"


def decays_as_declared(probe: Probe) -> str:
    """Without a gradient, the optimizer moves what is declared to decay, and nothing else."""
    optimizer, moving = probe.config.optimizer, trained(probe.declared, probe.declared)
    own, steps = trained(probe.loud, probe.declared), jnp.int32(probe.config.train.steps)
    transform = optimizer.transform(moving, jnp.int32(min(10, probe.config.train.steps - 1)), steps)
    zero = jax.tree.map(jnp.zeros_like, own)
    updates = jax.tree.leaves(jax.jit(lambda zero, own: transform.update(zero, transform.init(own), own)[0])(zero, own))
    boxes = jax.tree_util.tree_flatten_with_path(moving, is_leaf=is_declared)[0]
    moved = [bool(np.abs(update).max() > 0) for update in updates]
    for (path, box), moves in zip(boxes, moved, strict=True):
        if moves and not box.decay:
            raise Wrong(f"{path_name(path)} decays, and is declared not to")
        if any(moved) and box.decay and not moves:
            raise Wrong(f"{path_name(path)} does not decay, and is declared to")
        if moves and not box.letters.into and "norm" in path_name(path):
            raise Wrong(f"{path_name(path)} is of a norm, and decays")
    return f"{sum(moved)} of {len(moved)} arrays decay"


def first_loss(probe: Probe) -> str:
    loss = float(_loss(probe.objective, probe.model, probe.first.params, probe.example))
    if not np.isfinite(loss):
        raise Wrong(f"the loss of the first parameters is {loss}")
    if not isinstance(probe.objective, TokenObjective) or not any(
        isinstance(h, LanguageHead) for h in probe.model.heads
    ):
        return f"{loss:.3f}"
    even = float(np.log(VOCABULARY))
    h = probe.objective.hidden(probe.model, probe.first.params, probe.example, None).h
    logits = (
        np.asarray(probe.objective.logits(probe.model, probe.first.params, h)) if hasattr(h, "ndim") else np.zeros(1)
    )
    extra = probe.objective.label_smoothing or probe.objective.z_loss
    if np.ptp(logits) < 1e-6 and abs(loss - even) > 1e-3 and not extra:
        raise Wrong(f"all logits are alike, but the loss is {loss:.4f} and not ln {VOCABULARY} = {even:.4f}")
    return f"{loss:.3f} (ln {VOCABULARY} = {even:.3f})"


def dtypes_as_told(probe: Probe) -> str:
    """Parameters are float32; every product of matrices in the layers has operands of the compute dtype."""
    for path, box in jax.tree_util.tree_flatten_with_path(probe.declared, is_leaf=is_declared)[0]:
        if box.value.dtype != jnp.float32:
            raise Wrong(f"{path_name(path)} is {box.value.dtype}, not float32")
    dtype = jnp.dtype(probe.config.train.compute_dtype)
    cast = lambda a: jax.ShapeDtypeStruct(a.shape, dtype)
    declared = probe.declared
    params = updated(probe.loud, jax.tree.map(cast, trained(probe.loud, declared)))
    example = probe.example
    traced = jax.make_jaxpr(
        lambda params: jax.tree.leaves(probe.objective.hidden(probe.model, params, example, None).h)
    )
    products = list(_products(traced(params).jaxpr))
    wrong = [shown for operands, shown in products if any(each != dtype for each in operands)]
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(products)} products are not in {dtype}, the first {wrong[0]}")
    return f"{len(products)} products in {dtype}"


def _products(jaxpr: Any) -> Any:
    """The dtypes of the operands of each product, and how it is shown."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            avals = [v.aval for v in equation.invars]
            yield [a.dtype for a in avals], " · ".join(a.str_short() for a in avals)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def sampler_is_the_loop(probe: Probe) -> str:
    """Tokens of the sampler, against a loop of full passes with the keys of docs/runs.md."""
    model, sampler = probe.model, probe.config.sampler or LeftToRight()
    if not model.writes or type(sampler) is not LeftToRight or probe.length < 8:
        raise Inapplicable("it does not write from left to right" if probe.length >= 8 else "its window is too short")
    prompts, tokens, keys = [[3, 5, 8], [1]], 4, row_keys(7, 0, 2)
    sources = [[2, 4, 6], [7]] if model.encodes else None
    request = Request(probe.objective, model, probe.loud, prompts, tokens, keys, sources=sources)
    drawn = np.concatenate([part.ids for part in sampler(request)], 1)
    for i, prompt in enumerate(prompts):
        text = list(prompt)
        memory = None
        if sources is not None:
            memory = _encoded(model, probe.loud, jnp.asarray([sources[i]]), jnp.ones((1, len(sources[i])), jnp.int32))
        for t in range(tokens):
            ids = jnp.asarray([text + [0] * (8 - len(text))])
            segment = (jnp.arange(8) < len(text)).astype(jnp.int32)[None]
            h = probe.hidden(ids, places(segment, jnp.where(jnp.arange(8) < len(prompt), 0, 1)[None]), memory)[0]
            logits = model.logits(probe.loud, h[:, len(text) - 1])[0]
            expected = int(jax.random.categorical(jax.random.fold_in(keys[i], t), logits))
            if expected != drawn[i, t]:
                raise Wrong(f"token {t} of text {i} is {drawn[i, t]}, and {expected} by full passes")
            text.append(expected)
    return f"{len(prompts)} × {tokens} tokens"


def batches_are_pure(probe: Probe) -> str:
    """Batches follow from the step alone; a full pass asks for each token once; windows are neighbours of the text."""
    sampling, size = probe.config.data.sampling, probe.config.row
    texts = probe.config.data.corpus.texts
    if sampling.examples and texts > 1:
        raise Inapplicable("rows are of two texts")
    lengths = np.array([9, 4, 17, 8, 11, 5, 3] * 30)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    source = Source(
        np.arange(1, lengths.sum() + 1, dtype=np.uint16), starts.astype(np.int64), examples=sampling.examples
    )
    batches = Batches((source,), (1.0,), sampling, size, ROWS, 5)
    for step in (0, 3):
        one, two = batches.at(step), batches.at(step)
        if any((one[name] != two[name]).any() for name in one):
            raise Wrong(f"the batch of step {step} is another one at the second call")
    if all(
        (a == b).all()
        for a, b in zip(batches.at(0).values(), batches.at(3).values(), strict=True)
        if a.shape == b.shape
    ):
        raise Wrong("steps 0 and 3 have the same batch")
    seen = np.zeros(len(source.tokens) + 1, int)
    for batch in sampling.full_pass(source, size, ROWS):
        tokens = batch["tokens"]
        real = batch.get("segments", np.ones_like(tokens)) > 0
        asked = real[:, size.lookahead :] if not sampling.whole_documents else real
        np.add.at(seen, tokens[:, size.lookahead :][asked] if not sampling.whole_documents else tokens[asked], 1)
        steps = np.diff(tokens, axis=1)[real[:, 1:] & real[:, :-1]]
        if not sampling.whole_documents and (steps != 1).any():
            raise Wrong("tokens of a window are no neighbours in the text")
    cut = sampling.whole_documents and lengths.max() > size.tokens
    often = seen[1 + (0 if sampling.whole_documents else size.lookahead) :]
    if not cut and ((often > 1).any() or (often == 0).any()):
        raise Wrong(
            f"a full pass asks for {int((often == 0).sum())} tokens never, and for {int((often > 1).sum())} twice"
        )
    return f"{len(often):,} tokens, each once" if not cut else "batches follow from the step"


CHECKS: tuple[tuple[str, str, Callable[[Probe], str]], ...] = (
    (
        "no token sees a later one",
        "the mask, and what mixes tokens: model.mask, mixer, position, feed_forward",
        no_leak,
    ),
    ("no answer is seen", "the objective's `prepare`: targets are one place on", answer_unseen),
    ("cache = full pass", "`slots`, `remember` and positions of mixer, kernel, position", cache_is_full_pass),
    ("scan = unrolled", "what depends on the layer's number or key", scan_is_unrolled),
    ("packed = separate", "what reads `at.segment`: the mask, the mixer", packed_is_separate),
    ("padded = alone", "what sums over tokens without leaving padding out", padded_is_alone),
    ("attention = its plain form", "the kernel's `weights`, `scores` and scale", kernel_is_plain),
    ("accumulation = full batch", "the weights of `Sums`; state and losses of parts", accumulation_is_the_batch),
    ("dropout as told", "keys: `key=None` is evaluation; fold the site and the layer in", dropout_as_told),
    ("saved, restored, resumed", "state outside of TrainState; draws that follow from no key", resumes),
    ("one batch is memorised", "the path of the gradient, the initializer, the norm", memorises),
    ("every array learns", "arrays that are declared and not used, or behind a stop_gradient", all_learn),
    ("weight decay as declared", "Param(decay=...), and the optimizer's mask", decays_as_declared),
    ("the first loss", "the initializer and the scale of logits", first_loss),
    ("dtypes as told", "casts to float32 before a product", dtypes_as_told),
    ("samples = the loop of full passes", "keys and places of the sampler; the cache", sampler_is_the_loop),
    ("batches follow from the step", "the sampling's `rows` and `full_pass`", batches_are_pure),
)
