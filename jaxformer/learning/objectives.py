"""Objectives: from a batch of tokens to inputs, targets and weights, and to sums of nats and of weights."""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.keys import fold
from jaxformer.learning import chunks
from jaxformer.learning.chunks import in_chunks
from jaxformer.learning.rows import any_of_document, compact, composition, ends, same_texts, second_parts
from jaxformer.mesh import row_parts, vocabulary_part
from jaxformer.model.heads import (
    ClassificationHead,
    EmbeddingHead,
    FirstToken,
    LanguageHead,
    cross_entropy,
    is_likeliest,
    unit,
)
from jaxformer.model.layers import Out
from jaxformer.model.masks import Places, one_document, places
from jaxformer.model.models import HEAD, Model
from jaxformer.spec import Spec

Batch = Mapping[str, Any]
Key = jax.Array | None
Number = Float[Array, ""]
ByteLengths = Int[Array, "V"] | Float[Array, "V"]


class Text(NamedTuple):
    """Ids and where they stand."""

    ids: Int[Array, "B T"]
    at: Places


class Example(NamedTuple):
    """What the model sees and what it should say. Arrays that are alike for all rows have a batch of one."""

    ids: Int[Array, "B T"]
    at: Places
    targets: Any  # int32[B, T], or labels by column
    weights: Float[Array, "B ..."]  # of nats
    source: Text | None = None  # what an encoder reads
    counted: Any = None  # float32[B, ...]: how much each counts in the mean; None: as in the sum of nats


class Nats(NamedTuple):
    """For each thing that is asked, a token or a text."""

    plain: Float[Array, "B ..."]  # −log of the answer's probability
    right: Bool[Array, "B ..."]  # whether the answer is the likeliest
    total: Any = None  # float32[B, ...], what is minimised, as with smoothing or a z-loss; None: plain nats
    sums: Mapping[str, Number] = {}  # of an evaluation, besides those of the fields above

    @property
    def minimised(self) -> Float[Array, "B ..."]:
        return self.plain if self.total is None else self.total


class Sums(NamedTuple):
    """Over a batch, or a slice of one."""

    nats: Number  # plain ones, weighted
    weight: Number  # what the sums are divided by
    total: Number | None = None  # what is minimised; None: plain nats
    losses: Mapping[str, Number] = {}  # of parts, each times the weight of its rows
    state: Mapping[str, Any] = {}  # for parameters that are not trained: `Param.advance`

    @property
    def minimised(self) -> Number:
        """What the gradient is of."""
        return self.nats if self.total is None else self.total


class Objective(Spec):
    """From a batch to what a model should say of it, and to nats.

    Three hooks make one: `prepare`, `nats` and `summary`. Override `hidden` where the model is called more than once,
    as on pairs of texts.
    """

    lookahead = 1  # how many tokens more a row has than the model sees
    needs = ("tokens",)  # of a batch
    weighs = False  # it reads the `weights` of a batch, which say what is to be predicted
    among_rows = False  # what it measures of a row depends on the others of the batch
    one_document = False  # the model sees each row of a batch without `segments` as one document, without padding
    second = False  # whether what it teaches to write is the second text of a row, told by its token type
    measures: ClassVar[type[Spec] | None] = None  # whose evaluations its own are, for `compare`; not inherited

    def check_model(self, model: Model) -> None:
        """Raises ValueError if the model cannot learn this."""

    def check_rows(self, at: str, rows: int, accumulation: int) -> None:
        """Raises ValueError if batches of so many rows, in so many slices, cannot be learned from."""

    def filled(
        self, special: Mapping[str, tuple[int, ...]], vocab_size: int, length: int, several: bool = True
    ) -> Self:
        """The objective with the tokenizer's special ids, by name, for rows of at most `length` tokens, each of one
        text or, as it may be, of `several`.

        Raises ValueError if an id is missing or is none of the vocabulary, or if such rows cannot be learned from.
        """
        return self

    def label_shapes(self, model: Model, tokens: int) -> dict[str, tuple[int, ...]]:
        """Column → the shape of the labels that a row of so many tokens has."""
        return {}

    @abc.abstractmethod
    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        """`key` is for draws; `step` counts from 0, traced, and is None in an evaluation."""

    def hidden(self, model: Model, params: Any, example: Example, key: Key) -> Out:
        """Out of the hidden states that `nats` reads. A key of None means evaluation."""
        if example.source is None:
            return model.hidden(params, example.ids, example.at, key)
        encoded = model.encode(params, *example.source, key=key)
        out = model.hidden(params, example.ids, example.at, key, memory=encoded.h)
        return out._replace(sums={**encoded.sums, **out.sums}).beside(out.h, encoded)

    @abc.abstractmethod
    def nats(self, model: Model, params: Any, h: Any, example: Example, key: Key) -> Nats:
        """Of hidden states, which may be a chunk of the rows' places, with the example's same chunk."""

    def loss(self, model: Model, params: Any, example: Example, key: Key) -> Sums:
        """What a step sums up. A key of None means evaluation.

        The gradient is asked for of `Sums.minimised`: where the loss is made in chunks, no other of the sums has one.
        """
        return self._summed(model, params, example, key)[0]

    def sums(self, model: Model, params: Any, example: Example, byte_lengths: ByteLengths) -> dict[str, Number]:
        """Sums over a batch, without dropout, smoothing and z-loss, from which `summary` makes what is reported."""
        sums, nats = self._summed(model, params, example, None)
        weights = jnp.broadcast_to(example.weights, nats.plain.shape)
        found = {"nats": sums.nats, "weight": sums.weight}
        found |= {f"{LOSS}{name}": value for name, value in sums.losses.items()}
        return {**found, **nats.sums} | self.more_sums(nats, weights, example, byte_lengths)

    def chunk_size(self, model: Model, h: Any, example: Example) -> int | None:
        """How many of the rows' places `nats` is given at a time; None: all at once."""
        return None

    def _summed(self, model: Model, params: Any, example: Example, key: Key) -> tuple[Sums, Nats]:
        out = self.hidden(model, params, example, key)

        def loss(h: Any, beside: Example, key: Key) -> tuple[Number, Nats, dict[str, Number]]:
            nats = self.nats(model, params, h, beside._replace(source=example.source), key)
            return (nats.minimised * beside.weights).sum(), nats._replace(sums={}), dict(nats.sums)

        size, given = self.chunk_size(model, out.h, example), (out.h, example._replace(source=None), key)
        minimised, nats, sums = loss(*given) if size is None else in_chunks(loss, size, *given)
        weights = jnp.broadcast_to(example.weights, nats.plain.shape)
        counted = weights if example.counted is None else jnp.broadcast_to(example.counted, nats.plain.shape)
        rows = counted.reshape(len(counted), -1).sum(1)  # the losses of parts weigh as what is asked of a row does
        losses = {name: (jnp.where(rows > 0, loss.value, 0) * rows).sum() for name, loss in out.losses.items()}
        added = [out.losses[name].weight * value for name, value in losses.items() if out.losses[name].weight]
        plain = minimised if nats.total is None else (nats.plain * weights).sum()
        more = added or nats.total is not None
        total = sum(added, minimised) if more else None
        return Sums(plain, rows.sum(), total, losses, out.sums), nats._replace(sums=sums)

    def more_sums(
        self, nats: Nats, weights: Float[Array, "B ..."], example: Example, byte_lengths: ByteLengths
    ) -> dict[str, Number]:
        """Besides `nats` and `weight`: what `summary` needs."""
        return {"right": (nats.right * weights).sum()}

    @abc.abstractmethod
    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """`loss` in nats, `tokens` or `examples`, and what else the objective is judged by."""

    def report(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """`summary`, and the `losses` of the model's parts, where there are any."""
        losses = {name.removeprefix(LOSS): _ratio(sums, name) for name in sums if name.startswith(LOSS)}
        return self.summary(sums) | ({"losses": losses} if losses else {})


LOSS = "loss of "  # a part, in the sums of an evaluation


class TokenObjective(Objective):
    """Predict tokens by the language head; also the base of all objectives that do."""

    label_smoothing: float = 0.0  # share of the target's weight that is spread over the vocabulary (arXiv:1512.00567)
    z_loss: float = 0.0  # weight of (log of the sum of exp(logits))², which keeps logits small (arXiv:2204.02311)

    def check(self, at: str = "") -> None:
        _check_smoothing(self.label_smoothing, at)
        if self.z_loss < 0:
            raise ValueError(f"{at}z_loss={self.z_loss} must be at least 0; 1e-4 is usual, 0 turns it off")

    def chunk_size(self, model: Model, h: Any, example: Example) -> int | None:
        """Chunks where the float32 logits of all places take more than `chunks.unchunked` bytes."""
        arrays, ready = jax.tree.leaves(example._replace(source=None)), any(head.reads_logits for head in model.heads)
        if ready or not isinstance(h, jax.Array) or any(a.shape[1:2] != h.shape[1:2] for a in arrays):
            return None
        n_bytes = 4 * h.shape[0] * h.shape[1] * vocabulary_part(model.vocab_size or 0) // row_parts()  # of a device
        return None if n_bytes <= chunks.unchunked() else chunks.chunk_size(h.shape[1], n_bytes)

    def logits(self, model: Model, params: Any, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return model.logits(params, h)

    def nats(self, model: Model, params: Any, h: Float[Array, "B T D"], example: Example, key: Key) -> Nats:
        logits = self.logits(model, params, h)
        plain, right, total = cross_entropy(logits, example.targets), is_likeliest(example.targets, logits), None
        if self.label_smoothing or self.z_loss:
            z = jax.nn.logsumexp(logits, -1) ** 2 if self.z_loss else 0
            total = cross_entropy(logits, example.targets, self.label_smoothing) + self.z_loss * z
        return Nats(plain, right, total)

    def more_sums(
        self, nats: Nats, weights: Float[Array, "B T"], example: Example, byte_lengths: ByteLengths
    ) -> dict[str, Number]:
        return {"bytes": (byte_lengths[example.targets] * weights).sum()}

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        bits = sums["nats"] / sums["bytes"] / math.log(2) if sums["bytes"] else None
        return {"loss": _ratio(sums, "nats"), "bits_per_byte": bits, "tokens": int(sums["weight"])}


class NextToken(TokenObjective):
    """Predict each token from those before it.

    A batch holds `tokens` int32[B, T + 1] and, where rows have padding or several documents, `segments` of that shape:
    0 is padding, and nothing is predicted across a change of segment. Where it has `weights` of that shape, as of
    dialogues, each token counts so often: 0 of what is not learned, such as a question.
    """

    one_document = True
    weighs = True

    def check_model(self, model: Model) -> None:
        model.head_of(LanguageHead)
        if model.encodes or not model.generates or model.sees_ahead:
            _refuse(self, model, "a decoder whose masks are causal: the answer must not be seen")

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        return next_tokens(batch)


def next_tokens(batch: Batch) -> Example:
    """Of rows that are a token longer than what the model sees: each token, from those before it."""
    tokens = batch["tokens"]
    if "segments" not in batch:
        length = tokens.shape[1] - 1
        weights = batch["weights"][:, 1:].astype(jnp.float32) if "weights" in batch else jnp.ones((1, length))
        return Example(tokens[:, :-1], one_document(length), tokens[:, 1:], weights)
    segments, parts = batch["segments"], batch.get("parts")
    inside = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    weights = inside * batch["weights"][:, 1:] if "weights" in batch else inside
    at = places(segments[:, :-1], None if parts is None else parts[:, :-1])
    return Example(tokens[:, :-1], at, tokens[:, 1:], weights)


class PrefixLM(TokenObjective):
    """Predict each token of a document's second part; its first is seen whole (arXiv:1910.10683, section 3.2.1).

    Where a batch has `parts`, they say which is which (0, 1); else each document is divided anywhere, by chance.
    """

    second = True

    def check_model(self, model: Model) -> None:
        model.head_of(LanguageHead)
        if model.encodes or not model.generates or model.sees_answers:
            _refuse(self, model, "a decoder with the mask Prefix, or a causal one")

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        segments = batch.get("segments", jnp.ones_like(batch["tokens"]))
        parts = batch["parts"] if "parts" in batch else second_parts(key, segments)
        example = next_tokens({"tokens": batch["tokens"], "segments": segments, "parts": parts})
        return example._replace(weights=example.weights * parts[:, 1:])


class Masked(TokenObjective):
    """Predict a share of the tokens, of which 80 % are replaced by the mask, 10 % by any token, 10 % stay (BERT,
    arXiv:1810.04805, section 3.1).

    A batch holds `tokens` and `segments` int32[B, T].
    """

    share: float = 0.15  # the share of tokens that is predicted
    mask: int | None = None  # the id that hides a token; None: the tokenizer's
    special: tuple[int, ...] | None = None  # ids that are never predicted, nor put in; None: the tokenizer's
    vocab_size: int | None = None  # how many ids there are; None: as the tokenizer

    lookahead = 0

    def check(self, at: str = "") -> None:
        super().check(at)
        if not 0 < self.share < 1:
            raise ValueError(f"{at}share={self.share} must lie between 0 and 1; 0.15 is usual")

    def check_model(self, model: Model) -> None:
        model.head_of(LanguageHead)
        if model.encodes or not model.sees_ahead:
            _refuse(self, model, "an Encoder, which sees what comes after a token")

    def filled(
        self, special: Mapping[str, tuple[int, ...]], vocab_size: int, length: int, several: bool = True
    ) -> "Masked":
        if self.mask is None and not special["mask"]:
            raise ValueError("objective=Masked needs a mask token: data.tokenizer.mask_token=true, or objective.mask")
        mask = special["mask"][0] if self.mask is None else self.mask
        given = (i for ids in special.values() for i in ids) if self.special is None else self.special
        every = tuple(sorted({mask, *given}))
        _check_ids("objective.mask and objective.special", every, vocab_size)
        if len(every) == vocab_size:
            raise ValueError(f"objective.special={every} are all ids; leave one out, as only others are predicted")
        if self.vocab_size not in (None, vocab_size):
            raise ValueError(f"objective.vocab_size={self.vocab_size} must be {vocab_size}, the tokenizer's, or None")
        return dataclasses.replace(self, mask=mask, special=every, vocab_size=vocab_size)

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        tokens = batch["tokens"]
        segments = batch.get("segments", jnp.ones_like(tokens))
        assert self.mask is not None and self.special is not None and self.vocab_size is not None
        of_choice, of_token = jax.random.split(key)
        ordinary = ~jnp.isin(tokens, jnp.asarray(self.special))
        u = jax.random.uniform(of_choice, tokens.shape)
        chosen = (u < self.share) & (segments > 0) & ordinary
        other = jax.random.randint(of_token, tokens.shape, 0, self.vocab_size - len(self.special))
        for i in sorted(set(self.special)):  # in rising order: ids from each special one on move up by one
            other += other >= i
        ids = jnp.where(u < 0.8 * self.share, self.mask, jnp.where(u < 0.9 * self.share, other, tokens))
        at = places(segments, batch.get("parts"))
        return Example(jnp.where(chosen, ids, tokens), at, tokens, chosen.astype(jnp.float32))

    more_sums = Objective.more_sums

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"loss": _ratio(sums, "nats"), "accuracy": _ratio(sums, "right"), "tokens": int(sums["weight"])}


class SequenceToSequence(TokenObjective):
    """Predict a text from another, each token from those before it: teacher forcing (arXiv:1409.3215).

    A batch holds `source`, `source_segments` int32[B, S] for the encoder, `tokens`, `segments` int32[B, T + 1] for the
    decoder. `exact` is the share of texts of which each token is the likeliest after the true ones before it: just
    those, by induction, that greedy decoding writes without a fault.
    """

    needs = ("source", "source_segments", "tokens", "segments")

    def check_model(self, model: Model) -> None:
        _check_pairs(self, model)

    def filled(
        self, special: Mapping[str, tuple[int, ...]], vocab_size: int, length: int, several: bool = True
    ) -> Self:
        if not special["end"]:
            raise ValueError(
                "objective=SequenceToSequence needs an id at which texts begin and end: data.tokenizer.end_token=true"
            )
        return self

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        source = Text(batch["source"], places(batch["source_segments"]))
        return next_tokens({n: batch[n] for n in ("tokens", "segments")})._replace(source=source)

    def more_sums(
        self, nats: Nats, weights: Float[Array, "B T"], example: Example, byte_lengths: ByteLengths
    ) -> dict[str, Number]:
        real = (weights > 0).any(1)
        exact = {"exact": (nats.right | (weights == 0)).all(1) & real, "texts": real}
        more = {name: array.sum().astype(jnp.float32) for name, array in exact.items()}
        return super().more_sums(nats, weights, example, byte_lengths) | more

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        exact = sums["exact"] / sums["texts"] if sums["texts"] else math.nan
        return super().summary(sums) | {"exact": exact}


class SpanCorruption(TokenObjective):
    """Predict spans that are missing from a text, each marked by a sentinel (T5, arXiv:1910.10683, section 3.1.4).

    A batch holds `tokens` and `segments` int32[B, T]. A text `a b c d e f` becomes the source `a X d e Y` and the
    target `X b c Y f`, between the ids that begin and end a text. Of a row that is one text the first token stays.
    Where a row holds several documents, every token is as likely to be missing as any other; spans are drawn over the
    row and cut between documents, and the sentinels of each document begin anew.

    Nothing that is missing is left out of the targets, so that a target row is as wide as the worst case: of T tokens
    about density · T and a sentinel for each span, and up to twice density · T where special ids inside the text cut
    spans; but four times density · T if rows may hold several documents, which may each be short and miss one token.
    """

    density: float = 0.15  # the share of tokens that is missing
    mean_span: float = 3.0  # mean length of a missing span, in tokens
    sentinels: tuple[int, ...] | None = None  # ids that stand for spans; None: the tokenizer's
    start: int | None = None  # the id that a target begins with; None: the tokenizer's
    end: int | None = None  # the id that a target ends with; None: the tokenizer's
    several: bool | None = None  # whether rows may hold several documents; None: as the sampling says

    lookahead = 0

    def check(self, at: str = "") -> None:
        super().check(at)
        if not 0 < self.density < 1:
            raise ValueError(f"{at}density={self.density} must lie between 0 and 1; 0.15 is usual")
        if self.mean_span < 1:
            raise ValueError(f"{at}mean_span={self.mean_span} must be at least 1; 3 is usual")

    def check_model(self, model: Model) -> None:
        _check_pairs(self, model)

    def filled(
        self, special: Mapping[str, tuple[int, ...]], vocab_size: int, length: int, several: bool = True
    ) -> "SpanCorruption":
        fields: dict[str, Any] = {"sentinels": self.sentinels or special["sentinels"]}
        for name in ("start", "end"):
            given = getattr(self, name)
            fields[name] = given if given is not None else next(iter(special[name]), None)
        if not fields["sentinels"] or fields["start"] is None or fields["end"] is None:
            raise ValueError(
                "objective=SpanCorruption needs sentinels, a start and an end: "
                "data.tokenizer.sentinels=100 and data.tokenizer.end_token=true"
            )
        ids = (*fields["sentinels"], fields["start"], fields["end"])
        _check_ids("objective.sentinels, start and end", ids, vocab_size)
        if len({*ids}) < len(ids) - (fields["start"] == fields["end"]):
            raise ValueError(
                f"objective.sentinels={fields['sentinels']} must differ, and none be the start {fields['start']} or "
                f"the end {fields['end']}; leave out what comes twice"
            )
        if several and self.several is False:
            raise ValueError("objective.several=False must be True: rows of data.sampling hold several documents")
        found = dataclasses.replace(self, **fields, several=several if self.several is None else self.several)
        n_sentinels, n_spans, longest = len(fields["sentinels"]), found.most_spans(length), found.longest_target(length)
        if n_spans > n_sentinels:
            raise ValueError(
                f"objective=SpanCorruption has {n_sentinels} sentinels, but up to {n_spans} spans are missing of a "
                f"text in a row of {length} tokens; data.tokenizer.sentinels={n_spans}, or a larger objective.mean_span"
            )
        if longest - 1 > length:  # the last one is predicted, and not read
            raise ValueError(
                f"objective.density={self.density} and objective.mean_span={self.mean_span} make targets of {longest} "
                f"tokens from rows of {length}, more than data.window={length} and the last, which is not read; "
                "take a smaller density or a larger mean_span"
            )
        return found

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        tokens = batch["tokens"]
        segments = batch.get("segments", jnp.ones_like(tokens))
        assert self.sentinels and self.start is not None and self.end is not None and self.several is not None
        T, sentinels = tokens.shape[1], jnp.asarray(self.sentinels)
        special = jnp.asarray((self.start, self.end, *self.sentinels))
        free = (segments > 0) & ~jnp.isin(tokens, special)
        at, place = places(segments), jnp.arange(T)[None]
        begin, end = ends(at)
        begins, stops = (segments > 0) & (place == begin), (segments > 0) & (place == end)
        documents = (begins & any_of_document(free, at)).sum(1)  # of which something can be missing
        missing = jax.vmap(self.spans)(jax.random.split(key, len(tokens)), free, documents > 1)
        some = any_of_document(missing, at)
        first = missing & ~(jnp.pad(missing[:, :-1], ((0, 0), (1, 0))) & ~begins)  # of a span
        count = jnp.cumsum(first, 1)
        before = jnp.take_along_axis(count - first, begin, 1)  # spans of documents before
        number = jnp.minimum(count - before, len(self.sentinels)) - 1
        marks = sentinels[jnp.maximum(number, 0)]
        source, source_segments = compact(
            jnp.where(first, marks, tokens), segments, (segments > 0) & (~missing | first), T
        )
        # what each token adds to the target: a start, a sentinel, itself, an end
        parts = [(jnp.full_like(tokens, self.start), begins & some), (marks, first), (tokens, missing)]
        parts.append((jnp.full_like(tokens, self.end), stops & some))
        ids, kept = (jnp.stack(arrays, -1).reshape(len(tokens), 4 * T) for arrays in zip(*parts, strict=True))
        target, target_segments = compact(ids, jnp.repeat(segments, 4, axis=1), kept, self.target_width(T))
        text = next_tokens({"tokens": target, "segments": target_segments})
        return text._replace(source=Text(source, places(source_segments)))

    def target_width(self, length: int) -> int:
        """Tokens that the targets of a row of `length` take at most.

        Of several documents the worst are those of which one token each is missing: a start, a sentinel, the token
        and an end. Positions begin anew with each, so that such a row may be wider than what the model sees at once.
        """
        return 4 * math.ceil(length * self.density) if self.several else self.longest_target(length)

    def longest_target(self, length: int) -> int:
        """Tokens that the target of one document in a row of `length` takes at most: a start, what is missing, a
        sentinel for each span, an end. A special id inside the text is not missing, and may cut a span."""

        def inner(free: int) -> int:
            missing = max(min(math.ceil(free * self.density), free - 1), 0)
            return missing + min(missing, self._n_spans(missing, free - missing) + length - free)

        return 2 + max(inner(free) for free in range(length + 1))

    def most_spans(self, length: int) -> int:
        """Spans that one document in a row of `length` misses at most, but for those that a special id inside of it
        cuts. Of several documents, one may have both ends of a span that goes round the row."""

        def spans(missing: int) -> int:
            n = self._n_spans(missing, length - missing)
            return max(n, min(n + 1, missing - 1)) if self.several else n

        return max(spans(math.floor(length * self.density)), spans(math.ceil(length * self.density)))

    def _n_spans(self, missing: int, kept: int) -> int:
        """Before each span a token is kept."""
        return min(max(round(missing / self.mean_span), 1), kept)

    def spans(self, key: jax.Array, free: Bool[Array, "T"], several: Bool[Array, ""]) -> Bool[Array, "T"]:
        """Which tokens of a row are missing: of the free ones the share `density`, exactly so in the mean over keys,
        in as many spans as `mean_span` says.

        Spans and what lies between them have lengths drawn evenly from all that add up. Of one text the first token
        stays. Of `several` the whole is turned round the row by chance: no token is likelier to be missing.
        """
        T, n = free.shape[0], free.sum()
        of_missing, of_kept, of_lost, of_turn = jax.random.split(key, 4)
        share = np.arange(T + 1) * self.density  # exact where float32 is not: the width of targets relies on it
        more = jax.random.uniform(of_missing) < jnp.asarray(share % 1, jnp.float32)[n]
        n_missing = jnp.asarray(share.astype(np.int32))[n] + more
        n_missing = jnp.where(several, n_missing, jnp.minimum(n_missing, jnp.maximum(n - 1, 0)))
        by_mean = jnp.asarray(np.round(np.arange(T + 1) / self.mean_span).astype(np.int32))
        n_spans = jnp.clip(by_mean[n_missing], 1, jnp.maximum(n - n_missing, 1))
        kept = composition(of_kept, n - n_missing, n_spans, T)
        lost = composition(of_lost, n_missing, n_spans, T)
        edges = jnp.cumsum(jnp.stack([kept, lost], 1).ravel())
        turned = jnp.where(several, jax.random.randint(of_turn, (), 0, jnp.maximum(n, 1)), 0)
        place = (jnp.cumsum(free) - 1 + turned) % jnp.maximum(n, 1)  # among the free tokens
        return free & (jnp.searchsorted(edges, place, side="right") % 2 == 1)


class Classification(Objective):
    """Predict a class for each text, by every classification head of the model: its distribution is that of the head.

    In training each text counts as one, however many of its tokens have a class; without any label (−1) it counts
    nothing. An evaluation tells the means of each head over what has a class of its column, texts or tokens; `loss` is
    their sum over heads, `accuracy` their mean.

    A batch holds `tokens` and `segments` int32[B, T], and for each head `labels_COLUMN`.
    """

    label_smoothing: float = 0.0  # share of the target's weight that is spread over the classes (arXiv:1512.00567)

    lookahead = 0

    def check(self, at: str = "") -> None:
        _check_smoothing(self.label_smoothing, at)

    def check_model(self, model: Model) -> None:
        model.head_of(ClassificationHead)
        _check_texts(self, model)

    def label_shapes(self, model: Model, tokens: int) -> dict[str, tuple[int, ...]]:
        shapes = [head.label_shapes(tokens) for head in model.heads]
        return {column: shape for own in shapes for column, shape in own.items()}

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        tokens = batch["tokens"]
        segments = batch.get("segments", jnp.ones_like(tokens))
        labels = {n.removeprefix("labels_"): labels for n, labels in batch.items() if n.startswith("labels_")}
        real = (segments > 0).any(1).astype(jnp.float32)
        return Example(tokens, places(segments, batch.get("parts")), labels, real)

    def nats(self, model: Model, params: Any, h: Float[Array, "B T D"], example: Example, key: Key) -> Nats:
        """The sum over heads; right is what is so for all of them."""
        plain, total, right, sums = jnp.float32(0), jnp.float32(0), jnp.bool_(True), dict[str, Number]()
        for head, logits, labels, weights in self._heads(model, params, h, example, key):
            nats, hits = head.nats(logits, labels, 0.0), head.right(logits, labels)
            mean = weights / jnp.maximum(weights.sum(1, keepdims=True), 1) if weights.ndim == 2 else weights
            each = lambda a, mean=mean: (a * mean).reshape(len(a), -1).sum(1)  # each text counts as one
            plain, right = plain + each(nats), right & (hits | (weights == 0)).reshape(len(hits), -1).all(1)
            total += each(head.nats(logits, labels, self.label_smoothing))
            known = {"nats": (nats * weights).sum(), "right": (hits * weights).sum(), "weight": weights.sum()}
            sums |= {f"{name} of {head.column}": value for name, value in known.items()}
        return Nats(plain, right, total if self.label_smoothing else None, sums)

    def _summed(self, model: Model, params: Any, example: Example, key: Key) -> tuple[Sums, Nats]:
        real = example.at.segment > 0
        each = [_known(head, example.targets[head.column], real) for head in model.heads if head.column is not None]
        known = functools.reduce(jnp.logical_or, (own.reshape(len(own), -1).any(1) for own in each))
        return super()._summed(model, params, example._replace(weights=example.weights * known), key)

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        columns = [name.removeprefix("nats of ") for name in sums if name.startswith("nats of ")]
        loss = {c: _ratio(sums, f"nats of {c}", f"weight of {c}") for c in columns}
        right = {c: _ratio(sums, f"right of {c}", f"weight of {c}") for c in columns}
        mean = {"loss": sum(loss.values()), "accuracy": sum(right.values()) / len(right)}
        each = {f"accuracy_{c}": value for c, value in right.items()} if len(columns) > 1 else {}
        return mean | each | {"examples": int(sums["weight"])}

    def _heads(self, model: Model, params: Any, h: Float[Array, "B T D"], example: Example, key: Key) -> list[Any]:
        """Head, logits, labels, weights of each classification head; a label of −1, which is none, weighs 0."""
        real, found = example.at.segment > 0, []
        for i, head in enumerate[Any](model.heads):
            if head.column is not None:
                labels = example.targets[head.column]
                logits = model.read(params, head, h, real, fold(key, HEAD, i))
                known = _known(head, labels, real).astype(jnp.float32)
                found.append((head, logits, jnp.maximum(labels, 0), known))
        return found


def _known(head: Any, labels: Int[Array, "B ..."], real: Bool[Array, "B T"]) -> Bool[Array, "B ..."]:
    """Which texts, or tokens of them, have a label of the head's column."""
    asked = real if head.of_tokens else real.any(1)
    return asked & (labels >= 0).reshape(*asked.shape, -1).all(-1)


class Contrastive(Objective):
    """Of all second texts of a batch, tell the one that belongs to a first text, and the reverse (InfoNCE,
    arXiv:1807.03748; both directions as in arXiv:2103.00020).

    A batch holds `source`, `source_segments` int32[B, S] and `tokens`, `segments` int32[B, T], the pairs' two texts.
    A text that belongs to a first text as well is not told from its own: of two pairs whose first or second texts are
    equal, neither has the other's among those to choose from.

    In an evaluation each pair is told from all of a whole batch, unless fewer are as wide (`data.sampling.n_buckets`):
    the last batch is filled up with pairs that do not count and are there to choose from.
    """

    label_smoothing: float = 0.0  # share of the target's weight that is spread over the choices (arXiv:1512.00567)
    temperature: float = 0.05  # similarities are divided by it

    lookahead = 0
    among_rows = True
    needs = ("source", "source_segments", "tokens", "segments")

    def check(self, at: str = "") -> None:
        _check_smoothing(self.label_smoothing, at)
        if self.temperature <= 0:
            raise ValueError(f"{at}temperature={self.temperature} must be more than 0; 0.05 is usual")

    def check_model(self, model: Model) -> None:
        model.head_of(EmbeddingHead)
        _check_texts(self, model)

    def prepare(self, batch: Batch, key: jax.Array, step: jax.Array | None = None) -> Example:
        source = Text(batch["source"], places(batch["source_segments"]))
        real = (batch["segments"] > 0).any(1).astype(jnp.float32)
        return Example(batch["tokens"], places(batch["segments"]), (), real, source)

    def check_rows(self, at: str, rows: int, accumulation: int) -> None:
        if accumulation > 1 or rows < 2:
            raise ValueError(
                f"{at}objective=Contrastive compares the rows of a batch: {at}data.batch_size={rows} "
                f"must be at least 2, and {at}train.accumulation={accumulation} must be 1"
            )

    def hidden(self, model: Model, params: Any, example: Example, key: Key) -> Out:
        """Out of the hidden states of both texts."""
        assert example.source is not None
        texts = example.source, Text(example.ids, example.at)
        first, second = (model.hidden(params, *text, fold(key, i)) for i, text in enumerate(texts))
        both = jax.tree.map(jnp.add, first.sums, second.sums)
        return first._replace(sums=both).beside((first.h, second.h), second)

    def nats(self, model: Model, params: Any, h: Any, example: Example, key: Key) -> Nats:
        """The mean of both directions'."""
        scores, choices = self._scores(model, params, h, example)
        own, n, total = jnp.arange(len(scores)), choices.sum(1), None
        plain = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
        if self.label_smoothing:  # the target's weight is spread over the choices
            even = [jnp.where(choices, s, 0).sum(1) / n for s in (scores, scores.T)]
            total = plain + self.label_smoothing * (jnp.diagonal(scores) - sum(even) / 2)
        return Nats(plain, is_likeliest(own, scores), total)

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"loss": _ratio(sums, "nats"), "accuracy": _ratio(sums, "right"), "examples": int(sums["weight"])}

    def _scores(
        self, model: Model, params: Any, h: Any, example: Example
    ) -> tuple[Float[Array, "B B"], Bool[Array, "B B"]]:
        """Cosines over the temperature, −1e30 where there is no choice; and what each row chooses from: its own
        partner and, unless it is padding, those of other rows, but no duplicates."""
        assert example.source is not None
        head, segments = model.head_of(EmbeddingHead), (example.source.at.segment, example.at.segment)
        vectors = [model.read(params, head, each, s > 0) for each, s in zip(h, segments, strict=True)]
        vectors = vectors if head.unit else [unit(each) for each in vectors]
        scores = jnp.einsum("BM,CM->BC", *vectors) / self.temperature
        real = (segments[1] > 0).any(1)
        same = same_texts(example.source.ids, segments[0]) | same_texts(example.ids, segments[1])
        choices = (real[:, None] & real[None] & ~same) | jnp.eye(len(real), dtype=bool)
        return jnp.where(choices, scores, -1e30), choices


def _refuse(objective: Objective, model: Model, what: str) -> None:
    raise ValueError(f"objective={type(objective).__name__} must have {what}; model={type(model).__name__} is none")


def _check_texts(objective: Objective, model: Model) -> None:
    if model.encodes:
        _refuse(objective, model, "an Encoder or a Decoder")
    for head in model.heads:
        if not model.sees_ahead and isinstance(getattr(head, "pooling", None), FirstToken):
            raise ValueError(
                f"model.head.pooling=FirstToken has seen no other token of a text in a causal {type(model).__name__}; "
                "LastToken has seen all, and in an Encoder so has the first"
            )


def _check_pairs(objective: Objective, model: Model) -> None:
    model.head_of(LanguageHead)
    if not model.encodes or model.sees_ahead:
        _refuse(objective, model, "an EncoderDecoder whose decoder's masks are causal")


def _check_smoothing(label_smoothing: float, at: str) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{at}label_smoothing={label_smoothing} must be at least 0 and less than 1; 0.1 is usual")


def _check_ids(fields: str, ids: tuple[int, ...], vocab_size: int) -> None:
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise ValueError(f"{fields}: {wrong[0]} must be at least 0 and less than {vocab_size}, the vocabulary's size")


def _ratio(sums: Mapping[str, float], name: str, weight: str = "weight") -> float:
    return float(sums[name] / sums[weight]) if sums[weight] else math.nan
