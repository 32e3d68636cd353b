"""Initializers, norms, activations, feed-forward layers and dropout; and what a part returns."""

import abc
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from jaxformer.declarations import Arrays, ByLayer, Declarations, Declared, Draw, Param
from jaxformer.keys import random_bits
from jaxformer.model.masks import Places
from jaxformer.platform import unfused
from jaxformer.spec import Spec

ONE_HOT = 1024  # ids up to which a product makes their sums: beyond, the ones take more memory than the rows
BLOCK = 128  # sorted rows that are summed by one product
zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
constant, normal = jax.nn.initializers.constant, jax.nn.initializers.normal


class Loss(struct.PyTreeNode):
    """A number for each row that is minimised `weight` times beside the objective; 0 only reports it.

    Rows weigh as their tokens do in the objective. Losses of one name are summed over layers, and over stacks.
    """

    value: Any  # float32[B]
    weight: float = struct.field(pytree_node=False, default=0.0)


class Out(NamedTuple):
    """What a part returns, and a model."""

    h: Any  # hidden states [B, T, D]; of `encode` the memory
    cache: Any = None  # with the new tokens in it; None if none was given
    losses: Mapping[str, Loss] = {}
    sums: Mapping[str, Any] = {}  # for parameters that are not trained, by their names: `Param.advance`
    handed: Mapping[str, Any] = {}  # to layers above in the group, by names of the part's choice
    activations: Mapping[str, Any] = {}  # by name: kept where they were asked for, else not computed

    def beside(self, h: Any, *others: "Out") -> "Out":
        """This Out with another h; losses of others are added, and what they hand on, but nothing else of theirs."""
        losses, handed = dict(self.losses), dict(self.handed)
        for other in others:
            handed |= other.handed
            for name, loss in other.losses.items():
                before = losses.get(name, Loss(jnp.zeros_like(loss.value), loss.weight))
                if before.weight != loss.weight:
                    raise ValueError(f"the loss {name!r} has the weights {before.weight}, {loss.weight}; give it one")
                losses[name] = loss.replace(value=before.value + loss.value)
        return self._replace(h=h, losses=losses, handed=handed)


class Initializer(Spec):
    """How parameters begin that do not say so themselves."""

    @abc.abstractmethod
    def __call__(self, box: Declared, n_residuals: int) -> Draw | ByLayer:
        """How to draw one declared array, in a model that adds to its residual stream `n_residuals` times."""


class Normal(Initializer):
    """Normal weights, zero biases."""

    std: float = 0.02  # standard deviation

    def check(self, at: str = "") -> None:
        if self.std < 0:
            raise ValueError(f"{at}std={self.std} must be at least 0; 0.02 is usual")

    def __call__(self, box: Declared, n_residuals: int) -> Draw:
        return self.matrix(box) if box.letters.into else normal(self.std) if is_embedding(box) else zeros

    def matrix(self, box: Declared) -> Draw:
        return normal(self.std)


class GPT2Normal(Normal):
    """Normal, and weights that write to the residual stream smaller by √(number of writes).

    Source: "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
    """

    def __call__(self, box: Declared, n_residuals: int) -> Draw:
        writes = box.letters.into and writes_to_stream(box, n_residuals)
        return normal(self.std / n_residuals**0.5) if writes else super().__call__(box, n_residuals)


class TruncatedNormal(Normal):
    """Normal, redrawn outside ± 2 standard deviations, as BERT (arXiv:1810.04805)."""

    def __call__(self, box: Declared, n_residuals: int) -> Draw:
        # cut off at ± 2, its standard deviation is 0.8796 · std, here as in the paper's code
        drawn = jax.nn.initializers.truncated_normal(self.std)
        return drawn if box.letters.into or is_embedding(box) else zeros


class XavierUniform(Normal):
    """Matrices uniform in ± √(6 / (fan_in + fan_out)) (Glorot & Bengio 2010), as the first transformer; zero biases.

    Embeddings are normal with `std`.
    """

    def matrix(self, box: Declared) -> Draw:
        sizes = box.sizes()
        return _uniform((6 / (box.fan_in + math.prod(sizes[letter] for letter in box.letters.out))) ** 0.5)


class LeCunNormal(Normal):
    """Matrices normal with variance 1 / fan_in, cut off at ± 2 deviations, as Flax's own layers; zero biases.

    Embeddings are normal with `std`.
    """

    scale: float = 1.0  # deviations of matrices are multiplied by it

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.scale < 0:
            raise ValueError(f"{at}scale={self.scale} must be at least 0; 1 is usual")

    def matrix(self, box: Declared) -> Draw:
        return jax.nn.initializers.truncated_normal(self.scale * box.fan_in**-0.5 / 0.87962566103423978)


class TorchUniform(Normal):
    """PyTorch's default: matrices and biases uniform in ± 1/√fan_in, embeddings normal."""

    std: float = 1.0  # standard deviation of embeddings

    def __call__(self, box: Declared, n_residuals: int) -> Draw:
        return _uniform(box.fan_in**-0.5) if box.fan_in else super().__call__(box, n_residuals)


class ZeroOutputs(Initializer):
    """Zeros where layers write to the residual stream, and where heads give logits; the rest as `base`.

    At first each layer leaves the stream as it is, and no id or class is likelier than another (muP, arXiv:2203.03466,
    section D.2; Fixup, arXiv:1901.09321; modded-nanogpt). A tied head gives logits by the embedding, which is not zero.
    """

    base: Initializer = LeCunNormal()  # how other parameters are initialised

    def __call__(self, box: Declared, n_residuals: int) -> Draw | ByLayer:
        batch, _, out = box.letters
        logits = box.fan_in and not batch and out in ("V", "N")
        return zeros if logits or writes_to_stream(box, n_residuals) else self.base(box, n_residuals)


def writes_to_stream(box: Declared, n_residuals: int) -> bool:
    """Whether the array is the matrix, or the bias behind it, by which a layer adds to the residual stream; heads
    write elsewhere, and recurrent layers have none."""
    batch, _, out = box.letters
    return bool(n_residuals and "L" in batch and box.fan_in and out == "D")


def is_embedding(box: Declared) -> bool:
    """Whether the array is a table with a row for each id or place."""
    return not box.letters.into and not box.fan_in and bool(set(box.letters.out) & set("VCP"))


def _uniform(limit: float) -> Draw:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def linear(x: Float[Array, "*B D"], w: Float[Array, "D *N"]) -> Float[Array, "..."]:
    """[*B, *N]: x · w over the last axis of x and the first of w, as one product of two matrices. Where w is in half
    precision and x in float32, it is one of halves, with float32 sums.

    XLA on CPU gives a batched product to one thread per row: flattened, a training step takes two thirds of the time.
    """
    flat, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    halves = w.dtype.itemsize < x.dtype.itemsize  # `train.product_dtype`
    found = _by_halves(flat, matrix) if halves else flat @ matrix
    return found.reshape(*x.shape[:-1], *w.shape[1:])


@jax.custom_vjp
def _by_halves(x: Float[Array, "N D"], w: Float[Array, "D M"]) -> Float[Array, "N M"]:
    """x · w, and its gradients, as products of halves with float32 sums: what AMX, AVX-512 and matrix units of others
    are fast at."""
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def _back_by_halves(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = g.astype(w.dtype)
    by = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return by(g, _row_major(w.T)), by(_row_major(x.T), g).astype(w.dtype)


def _row_major(a: jax.Array) -> jax.Array:
    """Laid out row by row: of a transposed matrix of halves XLA on CPU makes float32 first."""
    return with_layout_constraint(a, Layout((0, 1))) if jax.default_backend() == "cpu" else a


_by_halves.defvjp(lambda x, w: (_by_halves(x, w), (x.astype(w.dtype), w)), _back_by_halves)


def product(subscripts: str, a: jax.Array, b: jax.Array) -> Float[Array, "..."]:
    """einsum of two arrays with float32 sums and results.

    In half precision its gradients are products of halves, too, as those of PyTorch's autocast: JAX would multiply
    float32 cotangents, at half the speed or less of a GPU's matrix units.
    """
    return _einsum(subscripts, a, b) if a.dtype.itemsize >= 4 else _product(subscripts, a, b)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


_product = jax.custom_vjp(_einsum, nondiff_argnums=(0,))


def _halves(subscripts: str, of: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = of
    by_a = jax.linear_transpose(lambda a: jnp.einsum(subscripts, a, b), a)
    by_b = jax.linear_transpose(lambda b: jnp.einsum(subscripts, a, b), b)
    g = g.astype(jnp.result_type(a, b))
    return *by_a(g), *by_b(g)


_product.defvjp(lambda subscripts, a, b: (_einsum(subscripts, a, b), (a, b)), _halves)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of the table. In half precision too, a row's gradient is summed in float32: it is a sum over all tokens.

    On CPU that sum is the scatter that JAX makes of a gather; elsewhere `sums_by_id`.
    """
    return _rows(jax.ShapeDtypeStruct(table.shape, table.dtype), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(like: jax.ShapeDtypeStruct, table: jax.Array, ids: jax.Array) -> jax.Array:
    return _gathered(table, ids)


def _gathered(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.astype(jnp.float32)[ids].astype(table.dtype)


def _gradient(like: jax.ShapeDtypeStruct, ids: jax.Array, rows: jax.Array) -> tuple[jax.Array, np.ndarray]:
    scattered = lambda ids, rows: jax.linear_transpose(lambda table: _gathered(table, ids), like)(rows)[0]
    summed = lambda ids, rows: sums_by_id(rows, ids, like.shape[0]).astype(like.dtype)
    table = jax.lax.platform_dependent(ids, rows, cpu=scattered, default=summed)
    return table, np.zeros(ids.shape, jax.dtypes.float0)


_rows.defvjp(lambda like, table, ids: (_gathered(table, ids), ids), _gradient)


def sums_by_id(rows: Float[Array, "... D"], ids: Int[Array, "..."], size: int) -> Float[Array, "V D"]:
    """float32 sums of the rows of each id below `size`, without a scatter: a GPU whose kernels must be deterministic
    does one row after another.

    For few ids that is a product with a one at each id. For many, rows are sorted by id and summed in blocks of
    `BLOCK`, each row and those before it of the same id, again by a product with ones; what an id has in blocks before
    is what their last rows hold. The last place of an id then has its sum.
    """
    rows, ids = rows.reshape(-1, rows.shape[-1]), ids.reshape(-1)
    if size <= ONE_HOT:
        return _ones_times(jnp.arange(size)[:, None] == ids[None], rows)
    order, more = jnp.argsort(ids), -len(ids) % BLOCK
    ids = jnp.pad(ids[order], (0, more), constant_values=size)
    blocks = ids.reshape(-1, BLOCK)
    sorted_rows = jnp.pad(rows[order].astype(jnp.float32), ((0, more), (0, 0))).reshape(*blocks.shape, -1)
    within = _ones_times(jnp.tril(blocks[:, :, None] == blocks[:, None]), sorted_rows)
    before = _ones_times(jnp.tril(blocks[:, :1] == blocks[None, :, -1], -1), within[:, -1])
    last = jnp.searchsorted(ids, jnp.arange(size), side="right") - 1
    found = (last >= 0) & (ids[last] == jnp.arange(size))
    also = blocks[last // BLOCK, 0] == jnp.arange(size)
    sums = within.reshape(len(ids), -1)[last] + jnp.where(also[:, None], before[last // BLOCK], 0)
    return jnp.where(found[:, None], sums, 0)


def _ones_times(mask: Bool[Array, "*B N M"], rows: Float[Array, "*B M D"]) -> Float[Array, "*B N D"]:
    """Sums of the rows at which the mask is True, in float32."""
    exactly: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.matmul(mask.astype(rows.dtype), rows, **exactly)


def add(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + y in the dtype of x, where y broadcasts: its gradient, a sum over what it is added to, is in float32."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def weighted(*terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Σ gain · x in the dtype of the last x, where gains broadcast (`along`): their gradients are summed in float32."""
    total = sum(along(gain, x).astype(jnp.float32) * x.astype(jnp.float32) for gain, x in terms)
    return jnp.asarray(total).astype(terms[-1][1].dtype)


def along(v: Float[Array, "*N"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """v, a gain or bias, ready to broadcast over all but the last axes of x."""
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


def biased(h: Float[Array, "..."], params: Arrays, name: str) -> Float[Array, "..."]:
    """h plus the bias of that name, over its last axes, if there is one."""
    return add(h, along(params[name], h)) if name in params else h


class Norm(Spec):
    """What brings numbers to a common scale."""

    def check(self, at: str = "") -> None:
        if getattr(self, "eps", 1) <= 0:
            raise ValueError(f"{at}eps={getattr(self, 'eps', 1)} must be more than 0; 1e-5 is usual")

    def params(self, letter: str = "D") -> Declarations:
        """`letter` is that of the normed axis."""
        return {}

    @abc.abstractmethod
    def __call__(self, params: Arrays, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """x, normed over its last axis."""


class NoNorm(Norm):
    """x as it is."""

    def __call__(self, params: Arrays, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return x


class RMSNorm(Norm):
    """Unit mean square over D, then a gain (arXiv:1910.07467); computed in float32."""

    eps: float = 1e-6  # is added to the mean square
    one_plus: bool = False  # the gain is 1 + scale, which begins at zero, as Gemma's (arXiv:2403.08295)
    gain: bool = True  # whether there is a gain; without one nothing is learned, as in nanochat

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.one_plus and not self.gain:
            raise ValueError(f"{at}one_plus=True needs a gain; leave {at}gain at True, or {at}one_plus at False")

    def params(self, letter: str = "D") -> Declarations:
        return {"scale": Param(letter, zeros if self.one_plus else ones)} if self.gain else {}

    def __call__(self, params: Arrays, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + self.eps)
        if self.gain:
            gain = along(params["scale"].astype(jnp.float32), h)
            h = h * (1 + gain if self.one_plus else gain)
        return h.astype(x.dtype)


class LayerNorm(Norm):
    """Zero mean and unit variance over D, then gain and bias (arXiv:1607.06450); computed in float32."""

    bias: bool = True  # whether there is a bias beside the gain
    eps: float = 1e-5  # is added to the variance
    one_plus: bool = False  # the gain is 1 + scale, which begins at zero

    def params(self, letter: str = "D") -> Declarations:
        scale = {"scale": Param(letter, zeros if self.one_plus else ones)}
        return scale | ({"bias": Param(letter, zeros)} if self.bias else {})

    def __call__(self, params: Arrays, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        h = x.astype(jnp.float32)
        h = RMSNorm(self.eps, self.one_plus)(params, h - h.mean(-1, keepdims=True))
        return (h + along(params["bias"], h) if self.bias else h).astype(x.dtype)


class Activation(Spec):
    """A function of each number."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Of any shape."""


class Identity(Activation):
    """x as it is."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return x


class GELU(Activation):
    """x·Φ(x) (arXiv:1606.08415), by default in the tanh approximation that GPT-2 used."""

    approximate: bool = True  # takes the approximation by tanh

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.nn.gelu(x, approximate=self.approximate)


class ReLU(Activation):
    """max(x, 0)."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.nn.relu(x)


class SquaredReLU(Activation):
    """max(x, 0)² (arXiv:2109.08668)."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.nn.relu(x) ** 2


class Square(Activation):
    """x²."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return x * x


class Tanh(Activation):
    """tanh x."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jnp.tanh(x)


class Sigmoid(Activation):
    """σ(x) = 1 / (1 + e⁻ˣ)."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.nn.sigmoid(x)


class SiLU(Activation):
    """x·σ(x) (arXiv:1702.03118)."""

    def __call__(self, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.nn.silu(x)


class FeedForward(Spec):
    """What is done with each token for itself."""

    sees_ahead = False  # True: what it gives a token depends on later ones too, as experts that choose their tokens

    def params(self) -> Declarations:
        return {}

    @abc.abstractmethod
    def __call__(self, params: Arrays, x: Float[Array, "B T D"], at: Places, key: jax.Array | None) -> Out:
        """Out([B, T, D]). `at` tells tokens from padding; `key` is for draws of its own, None in evaluation."""


class MLP(FeedForward):
    """Two matrices with an activation between them (arXiv:1706.03762, section 3.3)."""

    activation: Activation = GELU()  # the function between the two matrices
    bias: bool = False  # whether both have a bias

    def params(self) -> Declarations:
        matrices = {"up": Param("D->F"), "down": Param("F->D")}
        return matrices | (
            {"up_bias": Param("F", fan_in="D"), "down_bias": Param("D", fan_in="F")} if self.bias else {}
        )

    def inner(self, params: Arrays, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """What the last matrix is given."""
        return self.activation(biased(linear(x, params["up"]), params, "up_bias"))

    def __call__(self, params: Arrays, x: Float[Array, "B T D"], at: Places, key: jax.Array | None) -> Out:
        inner = self.inner(params, x)
        return Out(biased(linear(inner, params["down"]), params, "down_bias"), activations={"inner": inner})


class OneLayer(FeedForward):
    """One matrix, from D to D, and the activation behind it."""

    activation: Activation = ReLU()  # the function behind the matrix
    bias: bool = False  # whether it has a bias

    def params(self) -> Declarations:
        return {"kernel": Param("D->D")} | ({"bias": Param("D", fan_in="D")} if self.bias else {})

    def __call__(self, params: Arrays, x: Float[Array, "B T D"], at: Places, key: jax.Array | None) -> Out:
        return Out(self.activation(biased(linear(x, params["kernel"]), params, "bias")))


class GatedFeedForward(MLP):
    """An activated matrix times another, then a third; with SiLU it is SwiGLU (arXiv:2002.05202)."""

    activation: Activation = SiLU()

    def params(self) -> Declarations:
        gate = {"gate": Param("D->F")} | ({"gate_bias": Param("F", fan_in="D")} if self.bias else {})
        return {**super().params(), **gate}

    def inner(self, params: Arrays, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        gate, h = (biased(linear(x, params[name]), params, f"{name}_bias") for name in ("gate", "up"))
        return self.activation(gate) * h


def dropout(key: jax.Array | None, x: Float[Array, "*B"], rate: float) -> Float[Array, "*B"]:
    """Zeroes a share of x and scales the rest up (arXiv:1207.0580). A key of None means evaluation: x as it is."""
    if key is None or rate == 0:
        return x
    return jnp.where(unfused(_kept, key, 1 - rate, x.shape), x / (1 - rate), 0)


def check_dropout(rate: float, at: str) -> None:
    """Raises ValueError for a rate that `dropout` cannot have; `at` is the path of the spec whose field it is."""
    if not 0 <= rate < 1:
        raise ValueError(f"{at}dropout={rate} must be at least 0 and less than 1; 0 turns it off")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _kept(key: jax.Array, share: float, shape: tuple[int, ...]) -> Bool[Array, "*B"]:
    """jax.random.bernoulli(key, share, shape), which compares a number of 23 bits with the share as a float32."""
    return random_bits(key, shape) >> 9 < math.ceil(np.float32(share) * np.float32(2**23))
