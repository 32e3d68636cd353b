"""What happens to logits before a token is drawn. Processors apply in the order in which they are given."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.spec import Spec, checked

ONE = 0x3F800000  # the bits of the float32 1.0
BLOCK = 128  # tokens whose largest logit is found first, but on CPU


class Text(NamedTuple):
    """The texts so far, prompts and what has been drawn, in their order; no matter how much of them the model sees."""

    ids: Int[Array, "B S"]
    real: Bool[Array, "B S"]  # False: there is no token yet
    frame: Bool[Array, "B S"] | None = None  # True: nobody wrote it, as the token that begins a prompt; None: all wrote

    def counts(self, vocab_size: int) -> Int[Array, "B V"]:
        """How often each token stands in what was written of each text."""
        row, written = jnp.arange(len(self.ids))[:, None], self.real if self.frame is None else self.real & ~self.frame
        return jnp.zeros((len(self.ids), vocab_size), jnp.int32).at[row, self.ids].add(written)

    def append(self, new: Int[Array, "B"]) -> "Text":
        """With one token more in each text."""
        at = jnp.arange(len(new)), self.real.sum(1)
        return self._replace(ids=self.ids.at[at].set(new), real=self.real.at[at].set(True))


class LogitsProcessor(Spec):
    """What becomes of logits."""

    reads_text = False  # True: it is given the text; else that may be None, and costs nothing

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        """Other logits of the same tokens; −inf where one must not be drawn. `text` is what they follow."""


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that were written in prompt or text less likely (arXiv:1909.05858, section 4.1): logits above 0 are
    divided by `repetition_penalty`, others multiplied, so that more than 1 discourages whatever their sign."""

    repetition_penalty: float  # more than 1 makes such tokens less likely; 1.2 is usual

    reads_text = True

    def check(self, at: str = "") -> None:
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"{at}repetition_penalty={self.repetition_penalty} must be more than 0; 1 changes nothing, 1.2 is usual"
            )

    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        if text is None:  # nothing is known to have been said
            return logits
        rarer = jnp.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return jnp.where(text.counts(logits.shape[-1]) > 0, rarer, logits)


class Temperature(LogitsProcessor):
    """Divides by `temperature`: less than 1 sharpens, 0 leaves the likeliest token alone."""

    temperature: float = 1.0  # logits are divided by it

    def check(self, at: str = "") -> None:
        if self.temperature < 0:
            raise ValueError(
                f"{at}temperature={self.temperature} must be at least 0; 0 always takes the likeliest token"
            )

    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        likeliest = logits == logits.max(-1, keepdims=True)
        greedy = jnp.where(_ids(logits) == first(likeliest), logits, -jnp.inf)
        cold = self.temperature < 1e-30  # as good as 0; the quotient might be infinite
        return jnp.where(cold, greedy, logits / jnp.where(cold, 1, self.temperature))


class TopK(LogitsProcessor):
    """Keeps the `top_k` likeliest tokens (arXiv:1805.04833); of equal ones, those of lower id."""

    top_k: int  # how many tokens are kept

    def check(self, at: str = "") -> None:
        if self.top_k < 1:
            raise ValueError(f"{at}top_k={self.top_k} must be at least 1; 1 always takes the likeliest token")

    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        values, ids = _largest(logits, min(self.top_k, logits.shape[-1]))
        least = values.min(-1, keepdims=True)  # values[:, -1:] would keep XLA from its fast program for top_k
        last = jnp.where(values == least, ids, -1).max(-1, keepdims=True)  # of those as likely as the least
        return jnp.where((logits > least) | ((logits == least) & (_ids(logits) <= last)), logits, -jnp.inf)


def _largest(logits: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """jax.lax.top_k, which on a GPU sorts all of a row: the k largest are in the k blocks with the largest maxima, of
    equal ones those that come first, too, as the blocks stay in the order of their ids."""
    B, V = logits.shape
    if jax.default_backend() == "cpu" or 2 * k * BLOCK >= V:
        values, ids = jax.lax.top_k(logits, k)
        return values, ids
    blocks = jnp.pad(logits, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf).reshape(B, -1, BLOCK)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(-1), k)[1])
    values, places = jax.lax.top_k(jnp.take_along_axis(blocks, chosen[..., None], 1).reshape(B, -1), k)
    return values, jnp.take_along_axis(chosen, places // BLOCK, 1) * BLOCK + places % BLOCK


class TopP(LogitsProcessor):
    """Keeps the fewest likeliest tokens whose probabilities reach `top_p` together (nucleus, arXiv:1904.09751)."""

    top_p: float  # the probability that the kept tokens reach

    def check(self, at: str = "") -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{at}top_p={self.top_p} must be more than 0 and at most 1; 1 keeps every token")

    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        probabilities = jax.nn.softmax(logits, axis=-1)
        bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)  # in the same order: none is negative
        mass = lambda kept: jnp.where(kept, probabilities, 0).sum(-1, keepdims=True)

        def halve(_: Any, ends: Any) -> Any:
            low, high = ends  # those from `low` on reach top_p, those from `high` on do not
            middle = low + (high - low) // 2
            reaches = mass(bits >= middle) >= self.top_p
            return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

        ends = jnp.zeros_like(bits[:, :1]), jnp.full_like(bits[:, :1], ONE + 1)
        least = jax.lax.fori_loop(0, 31, halve, ends)[0]
        equal = bits == least
        wanted = jnp.ceil((self.top_p - mass(bits > least)) / jax.lax.bitcast_convert_type(least, jnp.float32))
        kept = (bits > least) | (equal & (jnp.cumsum(equal, -1) <= jnp.maximum(wanted, 1)))
        return jnp.where(kept | (self.top_p >= 1), logits, -jnp.inf)


class MinP(LogitsProcessor):
    """Keeps the tokens at least `min_p` times as probable as the likeliest (arXiv:2407.01082)."""

    min_p: float  # least share of the likeliest token's probability

    def check(self, at: str = "") -> None:
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"{at}min_p={self.min_p} must be at least 0 and at most 1; 0 keeps every token")

    def __call__(self, logits: Float[Array, "B V"], text: Text | None = None) -> Float[Array, "B V"]:
        least = logits.max(-1, keepdims=True) + jnp.log(self.min_p)
        return jnp.where(logits >= least, logits, -jnp.inf)


def usual_processors(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> tuple[LogitsProcessor, ...]:
    """Those of `jaxformer sample`, in the order in which they act. Raises InputError for numbers out of their range."""
    found: list[LogitsProcessor] = []
    found += [] if repetition_penalty is None else [RepetitionPenalty(repetition_penalty)]
    found += [Temperature(temperature)]
    found += [] if top_k is None else [TopK(top_k)]
    found += [] if top_p is None else [TopP(top_p)]
    found += [] if min_p is None else [MinP(min_p)]
    return tuple(checked(processor) for processor in found)


def first(found: Bool[Array, "B V"]) -> Int[Array, "B 1"]:
    """The least id that is found in each row; V if there is none. On CPU faster than argmax."""
    return jnp.where(found, _ids(found), found.shape[-1]).min(-1, keepdims=True)


def _ids(logits: jax.Array) -> Int[Array, "1 V"]:
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
