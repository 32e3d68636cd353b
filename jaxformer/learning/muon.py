"""Muon: momentum of matrices, made orthogonal by products alone."""

import abc
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.declarations import Declared, by_path, is_declared
from jaxformer.learning.optimizers import Optimizer, check_averages, check_weight_decay
from jaxformer.learning.schedules import Schedule, WarmupCosine
from jaxformer.spec import Spec

if TYPE_CHECKING:
    import optax

HEADS = "HG"  # letters that count heads


class Coefficients(Spec):
    """Of odd polynomials a·x + b·x³ + c·x⁵ that, one after another, bring singular values from (0, 1] near 1."""

    safety = 1.0  # what Frobenius norms are multiplied by, so that rounding brings no singular value beyond 1

    @abc.abstractmethod
    def __call__(self, steps: int) -> tuple[tuple[Any, Any, Any], ...]:
        """(a, b, c) of each of so many steps."""


class NewtonSchulz(Coefficients):
    """The same polynomial in each step, steep at 0: values end between 0.7 and 1.2, not at 1 (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon)."""

    a: float = 3.4445  # of x
    b: float = -4.7750  # of x³
    c: float = 2.0315  # of x⁵

    def __call__(self, steps: int) -> tuple[tuple[Any, Any, Any], ...]:
        return ((self.a, self.b, self.c),) * steps


class PolarExpress(Coefficients):
    """For each step the polynomial that is best for what the ones before leave (arXiv:2505.16932, algorithm 1)."""

    safety = 1.01

    def __call__(self, steps: int) -> tuple[tuple[Any, Any, Any], ...]:
        *safe, last = POLAR_EXPRESS
        found = [(a / self.safety, b / self.safety**3, c / self.safety**5) for a, b, c in safe]
        return tuple((found + [last] * steps)[:steps])


POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),  # all further ones are this
)


class Muon(Optimizer):
    """Momentum of matrices, made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    An array is as many matrices as its batch letters say, of layers and experts; the axes that a matrix sums over are
    one side of it, the others its other side. What is no matrix needs another optimizer: `Groups`.
    """

    learning_rate: Schedule = WarmupCosine(peak=0.02, final=0.002)  # the learning rate of each step
    momentum: float = 0.95  # decay of the average of gradients
    nesterov: bool = True  # the gradient is mixed into that average once more
    coefficients: Coefficients = NewtonSchulz()  # of the polynomials that make a matrix orthogonal
    steps: int = 5  # how many polynomials
    dtype: Literal["float32", "bfloat16"] = "float32"  # of what they multiply; accelerators round float32 in products
    heads: bool = False  # each head is a matrix of its own
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"  # times √max(1, out/in), or 0.2·√max(in, out)
    weight_decay: float = 0.1  # what is taken off matrices in each step, times the learning rate
    cautious: bool = False  # only numbers decay that the update brings nearer to 0 as well (arXiv:2510.12402)

    def check(self, at: str = "") -> None:
        check_averages(self, at, "momentum")
        if not 1 <= self.steps <= 100:
            raise ValueError(f"{at}steps={self.steps} must be from 1 to 100; 5 is usual")
        check_weight_decay(self, at)

    def check_declared(self, declared: Any) -> None:
        for path, box in by_path(declared).items():
            if not (box.letters.into and box.letters.out):
                raise ValueError(
                    f"optimizer=Muon is for matrices, and {path} is none (its letters are {box.letters}); give it "
                    "another optimizer in a group of its own, as optimizer=Groups does"
                )

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        self.check_declared(declared)
        rate = self.learning_rate(step, steps)

        def init(params: Any) -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            mixed = lambda mean, g: self.momentum * mean + (1 - self.momentum) * g
            state = jax.tree.map(mixed, state, updates)
            directions = self.orthogonal(declared, jax.tree.map(mixed, state, updates) if self.nesterov else state)
            return jax.tree.map(change, declared, directions, params, is_leaf=is_declared), state

        def change(box: Declared, direction: jax.Array, p: jax.Array) -> jax.Array:
            if not box.decay:
                return -rate * direction
            shrunk = jnp.where(direction * p >= 0, p, 0) if self.cautious else p
            return -rate * (direction + self.weight_decay * shrunk)

        return optax.GradientTransformation(init, update)

    def orthogonal(self, declared: Any, tree: Any) -> Any:
        """The nearest matrices whose singular values are about 1, times what `adjust_lr` says of their shape.

        Matrices of the same shape, as those of queries, keys and values in all layers, are computed together.
        """
        boxes, treedef = jax.tree.flatten(declared, is_leaf=is_declared)
        sides = [Sides.of(box, self.heads) for box in boxes]
        wide = [side.matrices(a) for side, a in zip(sides, jax.tree.leaves(tree), strict=True)]
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, x in enumerate(wide):
            alike[x.shape[1:]].append(i)
        how = self.coefficients(self.steps), self.coefficients.safety, self.dtype
        for places in alike.values():
            together = orthogonalized(jnp.concatenate([wide[i] for i in places]), *how)
            for i in places:
                wide[i], together = together[: len(wide[i])], together[len(wide[i]) :]
        scaled = [side.array(x) * side.factor(self.adjust_lr) for side, x in zip(sides, wide, strict=True)]
        return jax.tree.unflatten(treedef, scaled)


class Sides(NamedTuple):
    """How an array lies as many matrices."""

    order: tuple[int, ...]  # its axes: those of the batch, of what is summed over, of the rest
    shape: tuple[int, ...]  # in that order
    n_in: int
    n_out: int

    @classmethod
    def of(cls, box: Declared, heads: bool) -> "Sides":
        batch, into, out = box.letters
        many = lambda i: i < len(batch) or (heads and box.letters.all[i] in HEADS)
        axes = range(len(box.value.shape))
        into = [i for i in axes[len(batch) : len(batch) + len(into)] if not many(i)]
        rest = [i for i in axes[-len(out) :] if not many(i)]
        size = lambda those: math.prod(box.value.shape[i] for i in those)
        order = (*filter(many, axes), *into, *rest)
        return cls(order, tuple(box.value.shape[i] for i in order), size(into), size(rest))

    def matrices(self, a: jax.Array) -> Float[Array, "n r s"]:
        """With r ≤ s: of what is longer than wide the transposes."""
        x = a.transpose(self.order).reshape(-1, self.n_in, self.n_out)
        return x.mT if self.n_in > self.n_out else x

    def array(self, x: Float[Array, "n r s"]) -> jax.Array:
        """The inverse."""
        x = x.mT if self.n_in > self.n_out else x
        back = tuple(self.order.index(i) for i in range(len(self.order)))
        return x.reshape(self.shape).transpose(back)

    def factor(self, adjust_lr: str) -> float:
        if adjust_lr == "original":
            return max(1, self.n_out / self.n_in) ** 0.5
        return 0.2 * max(self.n_in, self.n_out) ** 0.5


def orthogonalized(
    x: Float[Array, "n r s"],
    coefficients: tuple[tuple[Any, Any, Any], ...],
    safety: float = 1.0,
    dtype: str = "float32",
) -> Float[Array, "n r s"]:
    """U·Vᵀ of matrices U·S·Vᵀ with r ≤ s, as near as the polynomials bring it.

    Products of r × r matrices alone are fewer where s is much more than r: all polynomials are then of x·xᵀ. Of half
    precision that matrix has too little, and of float32 as accelerators multiply it (TF32, on TPUs bfloat16): there
    each polynomial is of the last one's result.
    """
    r, s, n = *x.shape[-2:], len(coefficients)
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / (norm * safety + 1e-7)).astype(dtype)
    fewer = 2 * s + (4 * n - 3) * r < n * (2 * s + r)  # products, in r·r
    if fewer and dtype == "float32" and jax.default_backend() == "cpu":
        return _by_square(x, coefficients)
    for a, b, c in coefficients:
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.astype(jnp.float32)


def _by_square(x: jax.Array, coefficients: tuple[tuple[Any, Any, Any], ...]) -> jax.Array:
    """With q the product of p(x·xᵀ) = a + b·x·xᵀ + c·(x·xᵀ)² so far, the last result is q·x, its square p·x·xᵀ·p."""
    one, square, q = jnp.eye(x.shape[-2])[None], x @ x.mT, None
    for i, (a, b, c) in enumerate(coefficients):
        p = a * one + b * square + c * (square @ square)
        q = p if q is None else p @ q
        if i + 1 < len(coefficients):
            square = p @ square @ p
    return x if q is None else q @ x
