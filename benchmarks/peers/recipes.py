"""What a peer trains: a model, its optimizers, and the learning rate of every update. Imports no library."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW: of all arrays, or of those that Muon leaves."""

    rates: Sequence[float]  # the learning rate of each update
    b1: float
    b2: float
    eps: float
    decay: float  # of matrices, times the learning rate


@dataclasses.dataclass(frozen=True)
class Muon:
    """Of the matrices of layers: each a step in the direction of the nearest orthogonal matrix (Jordan, 2024)."""

    rates: Sequence[float]
    decay: float
    momentum: float
    coefficients: Sequence[Sequence[float]]  # a, b, c of each step of Newton–Schulz: X ← aX + bXXᵀX + c(XXᵀ)²X


@dataclasses.dataclass(frozen=True)
class Modern:
    """How the decoder differs from nanoGPT's: rotary positions, norms without gains, queries and keys normed, ReLU²,
    matrices that write to the stream and an untied head that begin at zero."""

    base: float  # the base of rotary wavelengths
    scale: float  # of scores, in place of 1/√K
    normed: bool  # whether the embedding is
    cap: float | None  # logits are cap · tanh(logits / cap)
    embedding: float  # standard deviation of the embedding at first
    matrix: float  # of other matrices, times the root of the numbers that go into one


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A decoder of characters, trained for as many updates as `adam` has rates."""

    layers: int
    heads: int
    width: int
    context: int
    hidden: int  # width of feed-forward layers
    valid: float  # the share of the text, its end, that is kept for validation
    batch: int  # rows in a batch, of `context` tokens
    seed: int
    adam: Adam
    clip: float | None  # largest global norm of gradients
    muon: Muon | None = None  # None: AdamW has all
    modern: Modern | None = None  # None: nanoGPT's decoder, without biases

    @classmethod
    def of(cls, given: dict) -> "Recipe":
        """From the JSON of `dataclasses.asdict`."""
        kinds = {"adam": Adam, "muon": Muon, "modern": Modern}
        return cls(
            **{name: kinds[name](**value) if name in kinds and value else value for name, value in given.items()}
        )
