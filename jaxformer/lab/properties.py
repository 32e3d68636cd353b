"""What must hold of every model, its step, its sampler and its batches: tried on a `Probe`."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.batches import Batches
from jaxformer.data.sources import Source
from jaxformer.declarations import by_path, path_name, trained, whole
from jaxformer.generation.decode import LeftToRight, Request, choose, row_keys
from jaxformer.generation.logits_processors import Temperature
from jaxformer.lab.probe import (
    ORDINARY,
    ROWS,
    VOCABULARY,
    Inapplicable,
    Probe,
    Wrong,
    close,
    encoded,
    gradient,
    with_dropout,
)
from jaxformer.learning.objectives import TokenObjective
from jaxformer.learning.optimizers import SGD, Frozen, Optimizer
from jaxformer.learning.schedules import Constant
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Look, Softmax, plain
from jaxformer.model.masks import Places, View, one_document, places
from jaxformer.model.mixers import MultiHead
from jaxformer.model.models import Decoder, Model
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.inspection import jaxprs
from jaxformer.run.plan import abstract_state, hyper_of
from jaxformer.run.step import Recipe, evaluate_batch, init_state, norms, train_step, train_steps
from jaxformer.spec import counted, fields

# Each returns what it found in numbers, or raises Wrong or Inapplicable.


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
    """A ragged prefill, then two tokens at once, then one at a time, layer by layer, against all tokens at once."""
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
    cache, outs, start, params = model.cache(3, n), [], 0, probe.loud
    for size in (n - 4, 2, 1, 1):  # a single token reads what it has written, so the last slot is read, too
        if size == 1 and params is probe.loud:  # as a sampler does
            params, memory, cache = model.for_decoding(params), model.apart(memory), model.apart(cache)
        cut = jax.tree.map(lambda a, piece=slice(start, start + size): a[:, piece], at)
        h, cache = probe.hidden(text[:, start : start + size], cut, memory, cache, params)
        outs.append(h)
        start += size
    real = segment[..., None]
    return close(jnp.concatenate(outs, 1) * real, full * real, "cached and full hidden states")


def scan_is_unrolled(probe: Probe) -> str:
    model = probe.model
    if not isinstance(model, Decoder) or model.n_layers == len(model.kinds(model.stacks[-1])):
        raise Inapplicable("there is no scan over several layers")
    dropped = with_dropout(model, 0.2)
    both = [dataclasses.replace(dropped, unroll=n) for n in (1, model.n_layers)]
    results = [gradient(probe.objective, each, probe.loud, probe.example, jax.random.key(5)) for each in both]
    return close(results[0], results[1], "loss and gradients, with dropout,")


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
        memory = encoded(model, probe.loud, jnp.asarray((rows * 3 + 1) % ORDINARY), jnp.asarray(segment))
    h = probe.hidden(rows, at, memory)[0]
    return close((h[0, :a], h[0, a : a + b]), (h[1, :a], h[2, n - b :]), "packed and separate hidden states")


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
    return close(second, first, "padded and unpadded texts")


def _with_parts(at: Places) -> Places:
    return at._replace(part=(at.position >= 2).astype(jnp.int32))


def kernel_is_plain(probe: Probe) -> str:
    """Values are the weights times v, and plain softmax attention is what the paper says; with gradients."""
    model = probe.model
    kinds = [k for s in model.stacks for k in model.kinds(s)] if isinstance(model, Decoder) else []
    found = {k.parts.kernel: k.parts for k in kinds if isinstance(k.mixer, MultiHead)}
    told: list[str] = []
    for kernel, parts in found.items():
        if not isinstance(kernel, Softmax) or kernel.shares or type(kernel).formula is not Softmax.formula:
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
            own = type(kernel).__call__ is not Softmax.__call__  # what it makes of the sum of values is its affair
            return (kernel.formula if own else kernel)(params, Look(q, left, left, view), None, 0.0)

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
        told.append(close(one, two, f"{type(kernel).__name__} and its plain form, with gradients,", 1e-4))
        weights = np.asarray(values(q, k, v).activations["weights"])
        usual = type(kernel).weights is Softmax.weights
        if usual and (weights.min() < 0 or weights.sum(-1).max() > 1 + 1e-4):
            raise Wrong(f"the weights of {type(kernel).__name__} are no distribution")
        if np.abs(weights * ~np.asarray(view.mask())).max() > 0:
            raise Wrong(f"the weights of {type(kernel).__name__} are not 0 where nothing is seen")
    if not told:
        raise Inapplicable("no kernel tells its weights, or it uses what others hand on, or its `formula` is its own")
    return "; ".join(told)


_step = jax.jit(train_step, static_argnums=0)


def accumulation_is_the_batch(probe: Probe) -> str:
    try:
        probe.objective.check_rows("", ROWS, 2)
    except ValueError:
        raise Inapplicable("rows of a batch are compared with one another") from None
    hyper, results = probe.hyper(SGD(Constant(1.0))), []
    declared = trained(probe.declared, probe.declared)
    transform = hyper.optimizer.transform(declared, jnp.int32(0), hyper.steps)
    state = probe.first.replace(params=probe.loud, opt_state=transform.init(trained(probe.loud, probe.declared)))
    for slices in (1, 2):
        recipe = dataclasses.replace(probe.recipe, slices=slices)
        after, rows = _step(recipe, state, probe.batch(), hyper)
        moved = jax.tree.map(lambda a, b: a - b, after.params, probe.loud)
        results.append((moved, {name: rows[name] for name in ("loss", "grad_norm")}))
    return close(results[1], results[0], "the updates of 2 slices and of the whole batch", 1e-3)


def dropout_as_told(probe: Probe) -> str:
    """None in an evaluation; in training other masks at every step."""
    if not hasattr(probe.model, "dropout"):
        raise Inapplicable("the model has no dropout")
    dropped = with_dropout(probe.model, 0.5)

    def evaluated_by(model: Model) -> float:
        recipe, lengths = Recipe(model, probe.objective), np.ones(VOCABULARY, np.float32)
        sums = evaluate_batch(recipe, probe.loud, probe.batch(), np.int32(0), lengths)
        return float(sums["nats"] / sums["weight"])

    plain_loss, evaluated = evaluated_by(probe.model), evaluated_by(dropped)
    if abs(plain_loss - evaluated) > 1e-5 * abs(plain_loss):
        raise Wrong(f"an evaluation has the loss {evaluated:.6g} with dropout and {plain_loss:.6g} without")
    recipe = dataclasses.replace(probe.recipe, model=dropped)
    state = init_state(recipe, probe.hyper()).replace(params=probe.loud)
    later = state.replace(step=jnp.int32(1))
    losses = [float(_step(recipe, each, probe.batch(), probe.hyper())[1]["loss"]) for each in (state, later, state)]
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
        restored = writer.restore(abstract_state(probe.config, recipe), 2)
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
    two = [jax.tree.leaves(probe.prepared(i)) for i in (0, 1)]
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
    key = jax.random.key(1)
    grads = trained(gradient(probe.objective, probe.model, probe.loud, probe.example, key)[1], probe.moving)
    sizes = norms(trained(probe.moving, probe.moving), grads)
    if not sizes:
        raise Inapplicable("the optimizer freezes every array of a model so small")
    for path, norm in sizes.items():
        wrong = [i for i, value in enumerate(np.atleast_1d(norm)) if not (np.isfinite(value) and value > 0)]
        if wrong:
            layer = f" of layer {wrong[0]} of its stack" if np.ndim(norm) else ""
            raise Wrong(f"{path}{layer} has a gradient of {np.atleast_1d(norm)[wrong[0]]:.3g}")
    updates = _updates(probe, grads)
    for path, update in by_path(updates).items():
        if not (np.isfinite(update).all() and np.abs(update).max() > 0):
            raise Wrong(f"{path} is not moved by {type(probe.config.optimizer).__name__}")
    return f"{counted(len(sizes), 'array')}, the least gradient {min(float(np.min(n)) for n in sizes.values()):.1e}"


def _updates(probe: Probe, grads: Any) -> Any:
    """What the config's optimizer makes of gradients, where its learning rate is highest."""
    optimizer, steps = probe.config.optimizer, probe.config.train.steps
    some = np.linspace(0, steps - 1, 200).astype(np.int32)
    rates = jax.vmap(lambda step: optimizer.rate(step, jnp.int32(steps)))(jnp.asarray(some))
    fastest = jnp.int32(some[int(np.argmax(np.broadcast_to(rates, some.shape)))])
    own = trained(probe.loud, probe.moving)

    @jax.jit
    def update(grads: Any, own: Any) -> Any:
        transform = optimizer.transform(trained(probe.moving, probe.moving), fastest, jnp.int32(steps))
        return transform.update(grads, transform.init(own), own)[0]

    return update(grads, own)


def decays_as_declared(probe: Probe) -> str:
    """Without a gradient, the optimizer moves what is declared to decay, and nothing else."""
    moving = trained(probe.moving, probe.moving)
    updates = by_path(_updates(probe, jax.tree.map(jnp.zeros_like, trained(probe.loud, probe.moving))))
    moved = {path: bool(np.abs(update).max() > 0) for path, update in updates.items()}
    owners = [owner for _, owner, _ in fields(probe.config.optimizer) if isinstance(owner, Optimizer)]
    alone = [o for o in owners if not (hasattr(o, "optimizer") or hasattr(o, "groups") or isinstance(o, Frozen))]
    rates = [getattr(o, "weight_decay", None) for o in alone]  # of several groups some may have none
    expected = any(moved.values()) if set(rates) == {None} else all(rates)
    for path, box in by_path(moving).items():
        if moved[path] and not box.decay:
            raise Wrong(f"{path} decays, and is declared not to")
        if expected and box.decay and not moved[path]:
            raise Wrong(f"{path} does not decay, and is declared to")
        if moved[path] and not box.letters.into and "norm" in path:
            raise Wrong(f"{path} is of a norm, and decays")
    return f"{sum(moved.values())} of {len(moved)} arrays decay"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(objective: Any, model: Model, params: Any, example: Any) -> jax.Array:
    """What is minimised, of an evaluation."""
    sums = objective.loss(model, params, example, None)
    return sums.minimised / jnp.maximum(sums.weight, 1)


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
    """Parameters are float32; every product of matrices in the layers has operands of the compute dtype, or in float32
    of the product dtype."""
    for path, box in by_path(probe.declared).items():
        if box.value.dtype != jnp.float32:
            raise Wrong(f"{path} is {box.value.dtype}, not float32")
    train = probe.config.train
    dtype, halves = jnp.dtype(train.compute_dtype), jnp.dtype(train.product_dtype or train.compute_dtype)
    how = {"compute_dtype": train.compute_dtype, "product_dtype": train.product_dtype}
    params = jax.eval_shape(dataclasses.replace(probe.recipe, **how).cast, probe.loud)
    example = probe.example
    traced = jax.make_jaxpr(
        lambda params: jax.tree.leaves(probe.objective.hidden(probe.model, params, example, None).h)
    )
    products = list(_products(traced(params).jaxpr))
    wrong = [shown for operands, shown in products if not {*operands} <= {dtype, halves}]
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(products)} products are not in {dtype}, the first {wrong[0]}")
    if products and not any({*operands} == {halves} for operands, _ in products):
        raise Wrong(f"none of {len(products)} products is in {halves}")
    return f"{len(products)} products in {dtype}" + (f" or {halves}" if halves != dtype else "")


def _products(jaxpr: Any) -> Any:
    """The dtypes of the operands of each product, and how it is shown."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            avals = [v.aval for v in equation.invars]
            yield [a.dtype for a in avals], " · ".join(a.str_short() for a in avals)
        for inner in jaxprs(equation.params.values()):
            yield from _products(inner)


def sampler_is_the_loop(probe: Probe) -> str:
    """Tokens of the sampler, against a loop of full passes with the keys of docs/runs.md."""
    model, sampler = probe.model, probe.config.sampler or LeftToRight()
    if not model.writes or type(sampler) is not LeftToRight or probe.length < 8:
        raise Inapplicable("it does not write from left to right" if probe.length >= 8 else "its window is too short")
    prompts, tokens, keys = [[3, 5, 8], [1], [9, 4]], 5, row_keys(7, 0, 3)
    sources = [[2, 4, 6], [7], [1, 1]] if model.encodes else None
    cold = Temperature(0.3)  # chance matters, and so does what the model says
    second = probe.objective.second or probe.config.data.sampling.joined
    asked = {"sources": sources, "second": second}
    request = Request(probe.objective, model, probe.loud, prompts, tokens, keys, (cold,), **asked)
    drawn = np.concatenate([part.ids for part in sampler(request)], 1)
    for i, prompt in enumerate(prompts):
        text = list(prompt)
        memory = None
        if sources is not None:
            memory = encoded(model, probe.loud, jnp.asarray([sources[i]]), jnp.ones((1, len(sources[i])), jnp.int32))
        for t in range(tokens):
            ids = jnp.asarray([text + [0] * (8 - len(text))])
            segment = (jnp.arange(8) < len(text)).astype(jnp.int32)[None]
            part = jnp.where(jnp.arange(8) < len(prompt), 0, int(second))[None]
            h = probe.hidden(ids, places(segment, part), memory)[0]
            logits = model.logits(probe.loud, h[:, len(text) - 1])[0]
            uniform = jax.random.uniform(jax.random.fold_in(keys[i], t))
            expected = int(choose(uniform[None], logits[None] / cold.temperature)[0])
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
    if all(np.array_equal(a, b) for a, b in zip(batches.at(0).values(), batches.at(3).values(), strict=True)):
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
