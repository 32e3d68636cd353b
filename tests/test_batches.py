"""Batches: rows as functions of seed and number, epochs without replacement, packing, mixtures."""

from dataclasses import replace

import chex
import numpy as np
import pytest

from jaxformer.data import batches
from jaxformer.data.batches import Batches, Examples, PackedDocuments, RandomWindows, RowSize, ShuffledWindows, pack
from jaxformer.data.corpora import Clozes
from jaxformer.data.hashes import permuted
from jaxformer.data.sources import Source
from jaxformer.learning.objectives import NextToken
from jaxformer.spec import InputError, checked, known_specs

TOKENS = np.arange(101, dtype=np.uint16)
STARTS = np.array([0, 1, 3, 9, 10, 30, 31, 33, 60, 77, 99])
SOURCE = Source(TOKENS, STARTS, 100)
SAMPLINGS = [RandomWindows(), ShuffledWindows(), PackedDocuments()]
SEVEN = RowSize(7)  # rows of 8 tokens, of which a decoder sees 7
each_sampling = pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)


def drawn(sampling, batch_size=5, seed=3, sources=(SOURCE,), weights=(1.0,)):
    return Batches(sources, weights, sampling, SEVEN, batch_size, seed)


def document(token):
    return np.searchsorted(STARTS, token, "right")


def predicted(batch):
    """The tokens that NextToken predicts."""
    tokens = batch["tokens"]
    segments = batch.get("segments", np.ones_like(tokens))
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert (tokens[:, 1:][inside] == tokens[:, :-1][inside] + 1).all()
    return tokens[:, 1:][inside].tolist()


@each_sampling
def test_a_row_depends_on_seed_step_and_row_alone(sampling):
    many = drawn(sampling)
    batch = many.at(2)
    assert batch.keys() == ({"tokens", "segments"} if sampling.whole_documents else {"tokens"})
    for name, array in many.at(2, np.array([4, 1])).items():
        assert np.array_equal(array, batch[name][[4, 1]]) and array.dtype == np.int32 and array.shape == (2, 8)
    rows = {tuple(row) for seed in range(3) for s in range(3) for row in drawn(sampling, seed=seed).at(s)["tokens"]}
    assert len(rows) > 10
    twice = drawn(sampling, batch_size=10).at(1)  # the size of a batch cuts one and the same stream
    assert np.array_equal(twice["tokens"], np.concatenate([many.at(2)["tokens"], many.at(3)["tokens"]]))


@each_sampling
def test_documents_are_kept_apart_where_they_should(sampling):
    for step in range(20):
        batch = drawn(sampling).at(step)
        if not sampling.whole_documents:
            assert (np.diff(batch["tokens"], axis=1) == 1).all()
            continue
        for row, segments in zip(batch["tokens"], batch["segments"], strict=True):
            real = segments > 0
            assert (row[~real] == 100).all() and segments[0] == 1 and np.isin(np.diff(segments[real]), (0, 1)).all()
            same = np.diff(segments[real]) == 0
            assert np.array_equal(same, (np.diff(document(row[real])) == 0) & (np.diff(row[real]) == 1))


def test_windows_begin_anywhere_with_equal_chances():
    starts = np.concatenate([drawn(RandomWindows(), 100).at(s)["tokens"][:, 0] for s in range(200)])
    counts = np.bincount(starts, minlength=94)
    assert len(counts) == 94 and counts.min() > 0  # 101 − 7 beginnings, the first and the last among them
    assert ((counts - 20_000 / 94) ** 2 / (20_000 / 94)).sum() < 150  # χ² with 93 degrees: mean 93, deviation 14


@pytest.mark.parametrize("n", [8, 9, 14, 15, 101])
def test_an_epoch_of_shuffled_windows_predicts_each_token_once(n):
    source = Source(TOKENS[:n], STARTS[n > STARTS])
    per_epoch = (n - 1) // 7
    orders = []
    for epoch in range(4):
        rows = [drawn(ShuffledWindows(), 1, sources=(source,)).at(epoch * per_epoch + i) for i in range(per_epoch)]
        tokens = sorted(token for row in rows for token in predicted(row))
        assert len(tokens) == len(set(tokens)) == 7 * per_epoch and np.ptp(tokens) == 7 * per_epoch - 1
        orders.append([row["tokens"][0, 0] for row in rows])
    assert n < 101 or len({tuple(np.argsort(order)) for order in orders}) == 4


def test_documents_that_share_their_ends_overlap():
    """E a b E c E: the pieces are E a b E and E c E, and each token but the first E is predicted."""
    source = Source(np.array([9, 1, 2, 9, 3, 9]), np.array([0, 3]), 9, shared=1)
    (batch,) = PackedDocuments().full_pass(source, SEVEN, 1)
    assert batch["tokens"].tolist() == [[9, 1, 2, 9, 9, 3, 9, 9]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    train, _ = source.split(0.3)
    (batch,) = PackedDocuments().full_pass(train, SEVEN, 1)
    assert batch["tokens"].tolist() == [[9, 1, 2, 9, 9, 9, 9, 9]] and batch["segments"].sum() == 4


def test_an_epoch_of_packed_documents_predicts_each_token_of_each_document_once():
    per_epoch = len(batches._plan(SOURCE, SEVEN).ends)
    expected = sorted(set(range(101)) - set(STARTS.tolist()))
    for epoch in range(3):
        rows = [drawn(PackedDocuments(), 1).at(epoch * per_epoch + i) for i in range(per_epoch)]
        assert sorted(token for row in rows for token in predicted(row)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 64, 100, 1025])
def test_permutations(n):
    keys = np.array([7], np.uint64)
    index = np.arange(n, dtype=np.uint64)
    found = permuted(index, n, keys)
    assert sorted(found.tolist()) == list(range(n))
    each = permuted(np.tile(index, 2), n, np.repeat(np.array([7, 8], np.uint64), n))
    assert np.array_equal(each[:n], found) and sorted(each[n:].tolist()) == list(range(n))
    if n > 30:
        assert abs(np.corrcoef(index, found)[0, 1]) < 0.5 and not np.array_equal(each[n:], found)
        firsts = permuted(np.zeros(20_000, np.uint64), n, np.arange(20_000, dtype=np.uint64))
        counts = np.bincount(firsts.astype(int), minlength=n)
        assert ((counts - 20_000 / n) ** 2 / (20_000 / n)).sum() < n + 6 * np.sqrt(2 * n)  # χ²


# --- packing


@pytest.mark.parametrize("seed", range(5))
def test_packing_overfills_nothing_and_wastes_little(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 1025, 3000) if seed % 2 else np.minimum(rng.geometric(1 / 200, 3000), 1025)
    rows = pack(sizes, 1025)
    filled = np.bincount(rows, sizes)
    assert filled.max() <= 1025 and filled.min() > 0
    assert len(filled) <= 1.03 * sizes.sum() / 1025 + 1


def test_packing_is_best_fit():
    """Ten lines that place piece by piece."""
    sizes = np.random.default_rng(0).integers(1, 31, 400)
    room = []
    for size in sorted(sizes, reverse=True):
        fits = [(r, i) for i, r in enumerate(room) if r >= size]
        if fits:
            room[min(fits)[1]] -= size
        else:
            room.append(30 - size)
    filled = np.bincount(pack(sizes, 30), sizes)
    assert sorted(30 - filled) == sorted(room)
    assert pack(np.zeros(0, np.int64), 30).tolist() == []


# --- full passes


@pytest.mark.parametrize("n", [2, 7, 8, 9, 15, 57, 101])
@each_sampling
def test_a_full_pass_predicts_each_token_once(sampling, n):
    source, seen = Source(TOKENS[:n], STARTS[n > STARTS], 100), []
    for batch in sampling.full_pass(source, SEVEN, 3):
        assert batch["tokens"].shape == batch["segments"].shape == (3, 8)
        seen += predicted(batch)
    starts = set(source.starts.tolist()) if sampling.whole_documents else {0}
    assert sorted(seen) == sorted(set(range(n)) - starts)


def test_padding_may_be_an_id_that_the_tokens_have_no_room_for():
    (batch,) = RandomWindows().full_pass(Source(np.arange(5, dtype=np.uint8), np.array([0]), 256), SEVEN, 1)
    assert batch["tokens"].tolist() == [[0, 1, 2, 3, 4, 256, 256, 256]] and batch["segments"].sum() == 5


def asked_for(batch, lookahead):
    """The tokens that an objective of this lookahead asks for."""
    tokens, segments = batch["tokens"], batch.get("segments", np.ones_like(batch["tokens"]))
    width = tokens.shape[1] - lookahead
    inside = (segments[:, lookahead:] == segments[:, :width]) & (segments[:, lookahead:] > 0)
    return tokens[:, lookahead:][inside].tolist()


@pytest.mark.parametrize("lookahead", sorted({kind.lookahead for kind in [NextToken, *known_specs(NextToken)]} | {3}))
@each_sampling
def test_each_token_is_asked_for_once_whatever_the_objective(sampling, lookahead):
    """Of a full pass and of an epoch, for rows of primes that divide nothing."""
    size = RowSize(7, lookahead)
    starts = STARTS if sampling.several else STARTS[:1]
    documents = np.split(TOKENS, starts[1:])
    expected = [token for document in documents for token in document[lookahead:].tolist()]
    seen = [token for batch in sampling.full_pass(SOURCE, size, 3) for token in asked_for(batch, lookahead)]
    assert sorted(seen) == expected
    if isinstance(sampling, ShuffledWindows | PackedDocuments):
        per_epoch = len(batches._plan(SOURCE, size).ends) if sampling.several else (101 - lookahead) // 7
        many = Batches((SOURCE,), (1.0,), sampling, size, per_epoch, 3)
        for epoch in range(2):
            tokens = sorted(asked_for(many.at(epoch), lookahead))
            assert len(tokens) == len(set(tokens)) and (tokens == expected or not sampling.several)
            assert sampling.several or len(tokens) == 7 * per_epoch


@each_sampling
def test_a_part_of_a_full_pass_is_spread_over_it(sampling):
    whole = list(sampling.full_pass(SOURCE, SEVEN, 2))
    rows = [tuple(row) for batch in whole for row in batch["tokens"] if (row != 100).any()]
    for share, kept in ((1.0, len(rows)), (0.5, len(rows) // 2), (0.01, 1)):
        some = [tuple(r) for b in sampling.full_pass(SOURCE, SEVEN, 2, share) for r in b["tokens"] if (r != 100).any()]
        assert some == [rows[i * len(rows) // kept] for i in range(kept)] and len(rows) > 12


def test_sources_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="7 tokens, but a row has 8"):
        RandomWindows().check_source(Source(TOKENS[:7], np.array([0])), SEVEN)
    with pytest.raises(InputError, match="7 tokens, of which no document has 2"):
        PackedDocuments().check_source(Source(TOKENS[:7], np.arange(7)), SEVEN)
    RandomWindows().check_source(Source(TOKENS[:8], np.array([0])), SEVEN)
    PackedDocuments().check_source(Source(TOKENS[:2], np.array([0])), SEVEN)


# --- mixtures


def three():
    return tuple(Source(TOKENS + np.uint16(1000 * i), np.zeros(1, np.int64)) for i in range(3))


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.9989, 0.001, 0.0001), (7.0, 2.0, 1.0)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_shares_are_exact(weights, batch_size):
    """Within 0.1 % in every thousand steps, and within one row from the beginning on."""
    many = drawn(ShuffledWindows(), batch_size, sources=three(), weights=weights)
    rows = np.concatenate([many.at(step)["tokens"][:, 0] // 1000 for step in range(4000)])
    exact = np.array(weights) / sum(weights)
    taken = np.cumsum(rows[:, None] == np.arange(3), 0)
    due = np.arange(1, len(rows) + 1)[:, None] * exact
    assert np.abs(taken - due).max() <= 1 + 1e-4 * len(rows)  # weights are rounded to a ten-thousandth
    for first in (0, 137, 3000):
        window = rows[first * batch_size : (first + 1000) * batch_size]
        share = (window[:, None] == np.arange(3)).mean(0)
        assert np.abs(share - exact).max() <= (0.001 if first == 0 else 0.002 / batch_size + 1e-4)


def test_a_mixture_draws_each_source_without_replacement():
    many = drawn(ShuffledWindows(), 5, sources=three(), weights=(0.5, 0.3, 0.2))
    rows = np.concatenate([many.at(step)["tokens"][:, 0] for step in range(28)])  # 140 rows: 70, 42, 28
    for i, count in enumerate((70, 42, 28)):
        own = rows[rows // 1000 == i]
        assert len(own) == count and (np.bincount(own % 1000 // 7, minlength=14)[:14] >= count // 14 - 1).all()
        assert all(len(set(own[k : k + 14])) == 14 for k in range(0, count - 13, 14))
    orders = [rows[rows // 1000 == i] % 1000 for i in range(3)]
    assert not np.array_equal(orders[0][:28], orders[2])  # of equal size, and in orders of their own
    assert np.array_equal(many.at(9, np.array([3]))["tokens"][0], many.at(9)["tokens"][3])


@pytest.mark.parametrize("sampling", [RandomWindows(), ShuffledWindows()], ids=str)
def test_corpora_past_two_to_the_31(sampling):
    class Huge:
        """Each token is its own place."""

        def __len__(self):
            return 2**40

        def __getitem__(self, index):
            return index >> 10

    source = Source(Huge(), np.zeros(1, np.int64))  # type: ignore[arg-type]
    rows = Batches((source,), (1.0,), sampling, RowSize(1), 1000, 2**32 - 1).at(2**31 - 1)["tokens"]
    assert rows.max() > 2**29 and rows.min() < 2**28 and len(set(rows[:, 0].tolist())) == 1000


# --- examples

SIZES = [3, 9, 4, 17, 2, 30, 5, 6, 11, 3]  # of ten texts; each token tells its text and its place


def texts(per_example=1):
    tokens = np.concatenate([100 * i + np.arange(size) for i, size in enumerate(SIZES)])
    labels = {"x": np.arange(10 // per_example, dtype=np.int32)}
    starts = np.cumsum([0, *SIZES[:-1]])
    return Source(tokens, starts, 7, texts=per_example, labels=labels, prefix=1)


def rows_of(batch, name="tokens"):
    segments = batch["segments" if name == "tokens" else f"{name}_segments"]
    assert (batch[name][segments == 0] == 7).all()
    assert (np.diff((segments > 0).astype(int), axis=1) <= 0).all()  # padding is on the right
    return [row[real > 0] for row, real in zip(batch[name], segments, strict=True)]


@pytest.mark.parametrize("n_buckets", [1, 3])
def test_each_example_once_in_an_epoch(n_buckets):
    sampling = Examples(n_buckets=n_buckets, bucket_steps=1)
    many = Batches((texts(),), (1.0,), sampling, RowSize(40), 1, 3)
    seen = [row for step in range(3000) for row in rows_of(many.at(step))]
    counts = np.bincount([row[0] // 100 for row in seen], minlength=10)
    assert (counts == 300).all() if n_buckets == 1 else abs(counts - 300).max() < 26  # buckets of 4, 3 and 3 examples
    for step in range(40):
        batch = many.at(step)
        (row,) = rows_of(batch)
        assert len(row) == SIZES[row[0] // 100] and batch["labels_x"].tolist() == [row[0] // 100]
    assert [r.tolist() for s in range(10) for r in rows_of(many.at(s))] != [r.tolist() for r in seen[10:20]]


def test_each_bucket_has_a_turn_and_more_than_may_have_one_are_refused():
    for n in range(13, 53):
        sizes = tuple(len(part) for part in np.array_split(np.arange(n), 13))
        assert set(batches._turns(sizes, period=13)[0]) == {*range(13)}
    checked(Examples(n_buckets=batches.PERIOD))
    with pytest.raises(InputError, match="n_buckets=10001 must lie between 1 and 10000; with more, some get no turn"):
        checked(Examples(n_buckets=batches.PERIOD + 1))


def test_a_buckets_width_is_that_of_its_longest():
    many = Batches((texts(),), (1.0,), Examples(n_buckets=3, bucket_steps=4), RowSize(40), 5, 3)
    widths = [many.at(step)["tokens"].shape[1] for step in range(48)]
    assert set(widths) == {8, 32} or set(widths) == {8, 16, 32}
    for first in range(0, 48, 4):
        assert len(set(widths[first : first + 4])) == 1 and [many.same_shapes(first + i) for i in range(4)] == [
            4,
            3,
            2,
            1,
        ]
    assert Batches((texts(),), (1.0,), Examples(), RowSize(40), 5, 3).same_shapes(5) > 10**9
    batch = many.at(9)
    chex.assert_trees_all_equal(many.at(9, np.array([4, 1])), {name: a[[4, 1]] for name, a in batch.items()})


@pytest.mark.parametrize("sampling", [Examples(), Examples(n_buckets=3)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_full_pass_has_each_example_once(sampling, batch_size):
    rows, labels = [], []
    for batch in sampling.full_pass(texts(), RowSize(40), batch_size):
        assert len(batch["tokens"]) == batch_size
        found = rows_of(batch)
        rows += [row.tolist() for row in found if len(row)]
        labels += [label for label, row in zip(batch["labels_x"].tolist(), found, strict=True) if len(row)]
    assert sorted(rows) == [(100 * i + np.arange(size)).tolist() for i, size in enumerate(SIZES)]
    assert labels == [row[0] // 100 for row in rows]


def test_pairs_apart_and_joined():
    apart = next(Examples().full_pass(texts(2), RowSize(20), 5))
    assert apart.keys() == {"tokens", "segments", "source", "source_segments", "labels_x"}
    assert [len(row) for row in rows_of(apart)] == [9, 17, 21, 6, 3]  # the third is cut to the window and one
    assert [len(row) for row in rows_of(apart, "source")] == [3, 4, 2, 5, 11]
    assert [row[0] for row in rows_of(apart, "source")] == [0, 200, 400, 600, 800]
    joined = next(Examples(joined=True).full_pass(texts(2), RowSize(20), 5))
    assert joined.keys() == {"tokens", "segments", "parts", "labels_x"}
    rows = rows_of(joined)
    assert rows[0].tolist() == [0, 1, 2, *range(101, 109)]  # without what stands before the second text
    assert joined["parts"][0, :11].tolist() == [0] * 3 + [1] * 8 and len(rows[2]) == 21
    longest = max(texts(2).sizes.sum(1)) - texts(2).prefix
    room = [Examples(joined=True).count_cut(texts(2), RowSize(size, 0)) for size in (longest, longest - 1)]
    assert texts(2).prefix and room == [0, 1]


def test_joined_pairs_are_as_wide_as_the_longest_of_them():
    """A long first text beside a long second one of another pair takes no room."""
    sizes = np.array([38, 3, 3, 38, 20, 22])
    source = Source(np.arange(sizes.sum()), np.cumsum(sizes) - sizes, texts=2, examples=True, prefix=1)
    (batch,) = Examples(joined=True).full_pass(source, RowSize(100), 3)
    assert batch["tokens"].shape == (3, 48) and batch["segments"].sum(1).tolist() == [40, 40, 41]


def test_marks_of_joined_pairs_are_those_of_their_tokens():
    rng, pairs = np.random.default_rng(0), texts(2)
    marked = replace(pairs, answers=rng.integers(0, 2, len(pairs.tokens), np.uint8))
    mark_of = dict(zip(pairs.tokens.tolist(), marked.answers.tolist(), strict=True))
    assert len(mark_of) == len(pairs.tokens)
    for joined in (False, True):
        batch = next(Examples(joined=joined).full_pass(marked, RowSize(60), 5))
        for row, weights in zip(rows_of(batch), batch["weights"], strict=True):
            assert weights[: len(row)].tolist() == [mark_of[token] for token in row.tolist()]
            assert not weights[len(row) :].any()


def test_a_split_would_part_the_pairs_of_a_name():
    several, one = Clozes("a.txt"), Clozes("a.txt", words=(2,))
    with pytest.raises(ValueError, match=r"data.valid=None .*data.corpus.words=\(2, 6\) has a pair for each number"):
        Examples().check_corpus(several, None, "data.")
    Examples().check_corpus(one, None, "data.")
    Examples().check_corpus(several, one, "data.")


def test_examples_refuse_an_empty_source():
    with pytest.raises(InputError, match="no example"):
        Examples().check_source(Source(np.empty(0, np.uint8), np.empty(0, np.int64)), SEVEN)
