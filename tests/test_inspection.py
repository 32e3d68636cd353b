"""What is said of a model: against formulas for its products, and against what it really leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from jax.experimental import pallas as pl
from tiny import SIZES, B, T, decoder, ids, loud

from jaxformer.learning.objectives import Classification, Contrastive, Masked, NextToken, SequenceToSequence
from jaxformer.model.baselines import GRU
from jaxformer.model.heads import ClassificationHead, EmbeddingHead, LanguageHead, MaskedLanguageHead
from jaxformer.model.layers import GatedFeedForward, RMSNorm
from jaxformer.model.masks import Causal, Window
from jaxformer.model.models import Embedding, Encoder, EncoderDecoder
from jaxformer.model.positions import Rotary
from jaxformer.run.inspection import (
    ELSEWHERE,
    activations,
    flops,
    human,
    inspect,
    layers,
    model_flops,
    parameters,
    render,
)
from jaxformer.run.step import Recipe

S, V, D, L, H, G, K, F = 17, 29, 84, 5, 6, 2, 14, 11
NEXT, SEQUENCES, MASKED = NextToken(), SequenceToSequence(), Masked(mask=3, special=(3,), vocab_size=V)
LAYERS = "decoder/layers/block0"


def batch(source=None, more=0, **labels):
    """Shapes of a batch whose texts have a segment for each token."""
    texts = {"tokens": (B, T + more), "segments": (B, T + more)} | labels
    texts |= {} if source is None else {"source": (B, source), "source_segments": (B, source)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in texts.items()}


def attention(queries, keys):
    """Products of one layer: q, o; k, v; scores and values."""
    return 2 * B * (2 * queries * D * H * K + 2 * keys * D * G * K + 2 * H * queries * keys * K)


def feed_forward(tokens, matrices=2):
    return 2 * B * tokens * D * F * matrices


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


LOGITS = 2 * B * T * D * V
FAMILIES = {
    "decoder": (
        *(NEXT, decoder(), batch(more=1)),
        {f"{LAYERS}/attention": L * attention(T, T), f"{LAYERS}/feed_forward": L * feed_forward(T)}
        | {"head_language": LOGITS},
    ),
    "encoder": (
        *(MASKED, Encoder(**SIZES, feed_forward=GatedFeedForward(), head=MaskedLanguageHead()), batch()),
        {"encoder/layers/block0/attention": L * attention(T, T)}
        | {"encoder/layers/block0/feed_forward": L * feed_forward(T, 3), "head_language": LOGITS + 2 * B * T * D * D},
    ),
    "encoder-decoder": (
        *(SEQUENCES, EncoderDecoder(**SIZES, n_encoder_layers=3), batch(S, more=1)),
        {"encoder/layers/block0/attention": 3 * attention(S, S)}
        | {"encoder/layers/block0/feed_forward": 3 * feed_forward(S), f"{LAYERS}/attention": L * attention(T, T)}
        | {f"{LAYERS}/cross_attention": L * attention(T, S), f"{LAYERS}/feed_forward": L * feed_forward(T)}
        | {"head_language": LOGITS},
    ),
    "stranger": (
        *(NEXT, decoder(kernel=outside.SinkWithStatistic(), position=outside.LearnedPace()), batch(more=1)),
        {
            f"{LAYERS}/attention": L * (attention(T, T) + 2 * B * T * G * K),
            f"{LAYERS}/feed_forward": L * feed_forward(T),
        }
        | {"head_language": LOGITS},
    ),
}


def column(found, name):
    """Part → number, where there is one."""
    return {row["name"]: row[name] for row in found["layers"] if row[name]}


@pytest.mark.parametrize(("objective", "model", "texts", "expected"), FAMILIES.values(), ids=FAMILIES.keys())
def test_operations_are_those_of_the_formula(objective, model, texts, expected):
    """And three times as many in a step: each product's gradients are two products; lookups have none."""
    found = inspect(objective, model, texts)
    assert column(found, "flops_forward") == expected
    assert column(found, "flops_step") == {name: 3 * count for name, count in expected.items()}
    assert found["flops_forward"] == sum(expected.values()) and found["flops_step"] == 3 * sum(expected.values())
    assert model_flops(Recipe(model, objective), texts) == found["flops_step"]


@pytest.mark.parametrize("fields", [{}, {"remat": "nothing_saveable"}, {"unroll": 5, "dropout": 0.1}])
def test_model_flops_are_those_of_the_formula(fields):
    """6·N + 12·L·H·K·T for each token, whatever is recomputed."""
    n = L * (2 * D * H * K + 2 * D * G * K + 2 * D * F) + D * V
    recipe = Recipe(decoder(**fields), NEXT, "bfloat16", slices=3)
    assert model_flops(recipe, batch(more=1)) == B * T * (6 * n + 12 * L * H * K * T)


def test_execution_changes_no_forward_count():
    texts = batch(more=1)
    scanned = inspect(NEXT, decoder(dropout=0.1), texts)
    assert inspect(NEXT, decoder(unroll=5), texts) == scanned  # dropout costs no product
    assert inspect(NEXT, decoder(), texts, "bfloat16")["flops_step"] == scanned["flops_step"]
    again = inspect(NEXT, decoder(remat="nothing_saveable"), texts)
    assert column(again, "flops_forward") == column(scanned, "flops_forward")
    assert column(again, "flops_step") == {  # all of a layer is computed anew, but for what no gradient needs
        f"{LAYERS}/attention": 4 * L * attention(T, T),
        f"{LAYERS}/feed_forward": L * (3 * feed_forward(T) + feed_forward(T, 1)),
        "head_language": 3 * LOGITS,
    }


def test_heads_and_what_is_in_no_module():
    N = 7
    head = ClassificationHead(classes=tuple("abcdefg"))
    found = inspect(Classification(), Encoder(**SIZES, head=head), batch(labels_label=(B,)))
    mean, last = 2 * B * T * D, 2 * B * D * N
    assert column(found, "flops_forward")["head_classes_of_label"] == mean + last
    assert column(found, "flops_step")["head_classes_of_label"] == 2 * mean + 3 * last  # the mask has no gradient
    found = inspect(Contrastive(), Encoder(**SIZES, head=(EmbeddingHead(width=N), LanguageHead())), batch(S))
    texts = [attention(T, T) + feed_forward(T), attention(S, S) + feed_forward(S)]
    heads = [2 * B * D * (tokens + N) for tokens in (T, S)]
    assert found["flops_forward"] == L * sum(texts) + sum(heads) + 2 * B * B * N
    assert column(found, "flops_forward")[ELSEWHERE] == 2 * B * B * N
    assert "head_language" not in column(found, "flops_forward")


def test_the_rows_of_a_recurrent_network():
    """Its layers lie stacked, too; what is in no module is told as that."""
    found = inspect(NEXT, GRU(D, 23, V, n_layers=3), batch(more=1))
    rows = {row["name"]: row["layers"] for row in found["layers"]}
    names = list(rows)
    assert names[0] == "embedding" and names[1] == "layers" and names[-2:] == ["head_language", ELSEWHERE]
    assert rows == {name: 3 if name.startswith("layers") else 1 for name in names}
    gates = {f"layers/{of}{gate}": 3 * 2 * B * T * D * D for of in "hi" for gate in "nrz"}
    assert column(found, "flops_forward") == gates | {"head_language": LOGITS}
    assert column(found, "activations_bytes")[ELSEWHERE] == 2 * 4 * B * T * D


def test_products_are_found_wherever_they_are():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 3))
    square, own = 2 * 3 * 3 * 3, 2 * 2 * 3 * 3

    @jax.custom_jvp
    def custom(a, b):
        return a @ b

    custom.defjvp(lambda primals, tangents: (custom(*primals), custom(*tangents)))

    def function(a, b):
        with jax.named_scope("loops"):
            a = jax.lax.scan(lambda a, _: (jax.jit(jnp.matmul)(a, b), None), a, None, 5)[0]
            a = jax.lax.while_loop(lambda a: (a @ b).sum() < 0, lambda a: a @ b, a)  # both of its parts, once
        with jax.named_scope("branches"):
            a = jax.lax.cond(a.sum() > 0, lambda: a @ (b @ b), lambda: a @ b)
        with jax.named_scope("wrapped"):
            a = jax.checkpoint(custom)(a, b)
            c = jax.vmap(lambda x: jnp.einsum("i,ij->j", x, b))(a)
        return c @ b

    by_scope = lambda found: {name: sum(n for path, n in found.items() if name in path) for name in expected}
    expected = {"loops": 7 * own, "branches": own + square, "wrapped": 2 * own}
    found = flops(function, a, b)
    assert by_scope(found) == expected and found[()] == own and sum(found.values()) == 11 * own + square
    assert by_scope(flops(jax.vmap(function, (0, None)), jnp.ones((7, 2, 3)), b))["wrapped"] == 14 * own
    assert flops(lambda a, b: a * b, 2.0, 3.0) == {}


def test_of_what_depends_on_the_platform_the_part_for_this_one_counts():
    a, twice = jnp.ones((3, 3)), lambda a: a @ a @ a
    depends = lambda **parts: flops(lambda a: jax.lax.platform_dependent(a, **parts), a).get((), 0)
    assert depends(cpu=lambda a: a, default=twice) == 0
    assert depends(cuda=lambda a: a, default=twice) == 2 * 2 * 3**3


def test_a_kernel_of_pallas_is_counted_for_each_block():
    def product(a, b, out):
        out[...] = a[...] @ b[...]

    def function(a, b):
        blocks = pl.BlockSpec((2, 3), lambda i: (i, 0))
        spec = {"grid": (7,), "in_specs": [blocks, pl.BlockSpec((3, 3), lambda i: (0, 0))], "out_specs": blocks}
        return pl.pallas_call(product, jax.ShapeDtypeStruct((14, 3), jnp.float32), interpret=True, **spec)(a, b)

    assert flops(function, jnp.ones((14, 3)), jnp.ones((3, 3))) == {(): 2 * 14 * 3 * 3}


def test_activations_are_those_of_a_real_run():
    """Of the shapes and dtypes that are told, and what their names say, of a padded batch."""
    model = EncoderDecoder(**(SIZES | {"n_layers": 2}), n_encoder_layers=3, feed_forward=GatedFeedForward())
    segment = lambda n, last: jnp.asarray((np.arange(n) < np.array([[n], [n - 2], [last]])).astype(np.int32))
    texts = {"source": ids(B, S), "source_segments": segment(S, 0)}  # the last source is empty: nothing is seen of it
    texts |= {"tokens": ids(B, T + 1), "segments": segment(T + 1, 3)}
    example = SEQUENCES.prepare(texts, jax.random.key(0))
    params = loud(model)
    real = jax.jit(lambda params, e: model.activations(params, e.ids, e.at, e.source))(params, example)
    told = {row["name"]: row for row in activations(model, example)}
    assert set(told) == set(real)
    for name, array in real.items():
        assert (told[name]["shape"], told[name]["dtype"]) == (list(array.shape), str(array.dtype)), name
        assert told[name]["bytes"] == array.nbytes
        assert name.endswith("scores") or jnp.isfinite(array).all(), name
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    block = {name.removeprefix(f"{LAYERS}/"): array for name, array in real.items() if name.startswith(LAYERS)}
    stream = jnp.concatenate([real["decoder/embedded"][None], block["after_feed_forward"][:-1]])
    for branch in ("attention", "cross_attention", "feed_forward"):
        stream = stream + block[f"{branch}/out"]
        close(stream, block[f"after_{branch}"])
    down = params["decoder"]["layers"]["block0"]["feed_forward"]["down"]
    close(jnp.einsum("LBTF,LFD->LBTD", block["feed_forward/inner"], down), block["feed_forward/out"])
    for name in ("attention", "cross_attention"):
        values = jnp.repeat(block[f"{name}/v"], H // G, 2)
        close(block[f"{name}/weights"] @ values, block[f"{name}/values"])
        close(jnp.exp(jax.nn.log_softmax(block[f"{name}/scores"]))[:, 0], block[f"{name}/weights"][:, 0])
    close(real["decoder/out"] @ params["embedding"]["table"].T, real["head_language/out"])


def test_each_parameter_and_activation_is_in_one_row():
    model = decoder(
        n_layers=6,
        mask=(Window(5), Causal()),
        **{"kernel": outside.SinkWithStatistic(), "position": outside.LearnedPace(), "bias": True},
        **{
            "qk_norm": RMSNorm(),
            "embedding": Embedding(normed=True, token_types=2),
            "head": LanguageHead(tied=False, bias=True),
        },
    )
    example = jax.eval_shape(lambda b: NEXT.prepare(b, jax.random.key(0)), batch(more=1))
    rows = {row["name"]: row for row in layers(NEXT, model, example)}
    for table, size, name in (
        (parameters(model), "count", "n_params"),
        (activations(model, example), "bytes", "activations_bytes"),
    ):
        sums = dict.fromkeys(rows, 0)
        for array in table:
            sums[max((row for row in rows if array["name"].startswith(f"{row}/")), key=len)] += array[size]
        assert sums == {row: rows[row][name] for row in rows}
    count = sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    assert sum(row["n_params"] for row in rows.values()) == count
    for name, row in rows.items():
        assert row["layers"] == (3 if "/layers/" in name else 1)
    block = ["", "/attention", "/feed_forward", "/norm_attention", "/norm_feed_forward"]
    assert list(rows) == [
        *("embedding", "decoder", *(f"decoder/layers/block{i}{part}" for i in (0, 1) for part in block)),
        *("decoder/norm", "decoder/norm_embedding", "head_language"),
    ]


def test_half_precision_halves_what_is_not_softmax():
    """Scores, weights and logits are float32 always."""
    example = jax.eval_shape(lambda b: NEXT.prepare(b, jax.random.key(0)), batch(more=1))
    rows = activations(decoder(position=Rotary()), example, "bfloat16")
    wide = {row["name"] for row in rows if row["dtype"] == "float32"}
    assert wide == {f"{LAYERS}/attention/scores", f"{LAYERS}/attention/weights", "head_language/out"}


def test_the_page_for_people():
    found = inspect(NEXT, decoder(), batch(more=1))
    parts, arrays, table = (text.splitlines() for text in render(found).split("\n\n"))
    assert parts[0].split() == ["part", "layers", "n_params", "flops_forward", "flops_step", "activations_bytes"]
    assert len(parts) == len(found["layers"]) + 2 and len({len(line) for line in parts}) == 1
    assert parts[-1].split()[2:] == [
        human(found[name]) for name in ("n_params", "flops_forward", "flops_step", "activations_bytes")
    ]
    assert len(arrays) == len(found["activations"]) + 1 and len(table) == len(found["table"]) + 1
    assert table[1].split() == [f"{LAYERS}/attention/project/k", "L|D->GK", "5×84×2×14", "11,760", "yes"]
