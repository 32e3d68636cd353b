"""Ideas from papers as a stranger would bring them: one class each, outside the package, with no edit in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.declarations import ByLayer, Param, Slot
from jaxformer.generation.decode import Drawn, Sampler
from jaxformer.generation.logits_processors import Text
from jaxformer.learning.objectives import Example, Masked, NextToken
from jaxformer.model import cache
from jaxformer.model.heads import cross_entropy
from jaxformer.model.kernels import Look, Softmax
from jaxformer.model.layers import Activation, FeedForward, Loss, Out, RMSNorm, SiLU, linear, ones, zeros
from jaxformer.model.masks import places
from jaxformer.model.mixers import Mixer, MultiHead, place, place_slots, view_of
from jaxformer.model.models import Decoder
from jaxformer.model.residuals import Residual

constant, normal = jax.nn.initializers.constant, jax.nn.initializers.normal


# --- kernels


class Borrow(Softmax):
    """Cross-layer attention (arXiv:2405.12981): kernel=(Softmax(), Borrow()) looks at keys of the layer below."""

    projections = ("q",)
    shares = True

    def slots(self):
        return {}

    def share(self, params, seen, below):
        return below["seen"], {}


class Differential(Softmax):
    """The difference of two softmaxes (arXiv:2410.05258), of the even and the odd numbers of a head, whose halves a
    rotary scheme pairs. How much is taken off begins by depth."""

    def params(self):
        start = ByLayer(lambda layer: constant(0.8 - 0.6 * jnp.exp(-0.3 * layer)))
        vectors = {name: Param("K", normal(0.1)) for name in ("q1", "k1", "q2", "k2")}
        return vectors | {"scale": Param("K", ones), "start": Param("", start, trained=False)}

    def masked_scores(self, params, look):  # [B, 2H, T, S]
        half = lambda i: look._replace(q=look.q[..., i::2], seen={**look.seen, "k": look.seen["k"][..., i::2]})
        return jnp.concatenate([super(Differential, self).masked_scores(params, half(i)) for i in (0, 1)], 1)

    def weights(self, params, scores):
        powers, total = super().weights(params, scores)
        one, two = jnp.split(powers / jnp.maximum(total, 1e-30), 2, 1)
        taken = jnp.exp(params["q1"] @ params["k1"]) - jnp.exp(params["q2"] @ params["k2"]) + params["start"]
        return one - taken * two, jnp.ones((*one.shape[:3], 1))

    def __call__(self, params, look, key, rate):
        out = super().__call__(params, look, key, rate)
        return out._replace(h=RMSNorm(eps=1e-5)(params, out.h) * (1 - params["start"]).astype(out.h.dtype))


# --- mixers


class Latent(Mixer):
    """Multi-head latent attention (arXiv:2405.04434): the cache holds a latent vector and one rotated key per token."""

    latent: int = 32
    turned: int = 8  # numbers of queries and keys that know their position

    reads = ("n_heads", "head_width", "position", "kernel", "mask")

    def check_parts(self, parts, at):
        parts.position.check_width(self.turned, at)

    def params(self, parts):
        sizes = {"R": self.latent, "J": self.turned}
        letters = {"q": "D->HK", "q_turned": "D->HJ", "latent": "D->R", "k_turned": "D->J", "o": "HK->D"}
        letters |= {"k": "R->HK", "v": "R->HK"}
        project = {name: Param(value, sizes=sizes) for name, value in letters.items()}
        return {"project": project, "norm": {"scale": Param("R", ones, sizes=sizes)}}

    def slots(self, parts):
        own = {
            "latent": Slot("BSR", sizes={"R": self.latent}),
            "turned": Slot("BSJ", sizes={"J": self.turned}),
        }
        return place_slots(parts) | own

    def __call__(self, params, parts, x, context):
        w, at = params["project"], context.at
        turn = lambda a: parts.position.rotate(context.position, a, at)
        heads = lambda a, name: linear(a, w[name]).swapaxes(1, 2)
        q = jnp.concatenate([heads(x, "q"), turn(heads(x, "q_turned"))], -1)
        latent = RMSNorm()(params["norm"], linear(x, w["latent"]))
        new = place(parts, at) | {"latent": latent, "turned": turn(linear(x, w["k_turned"])[:, None])[:, 0]}
        seen, written = cache.update(context.cache, new, self.slots(parts))
        c = seen["latent"].astype(x.dtype)
        k, v, turned = heads(c, "k"), heads(c, "v"), seen["turned"][:, None].astype(x.dtype)
        k = jnp.concatenate([k, jnp.broadcast_to(turned, (*k.shape[:3], self.turned))], -1)
        look = Look(q, seen, {"k": k, "v": v}, view_of(parts, at, seen))
        h = parts.kernel({}, look, context.key, parts.dropout).h
        return Out(linear(h.swapaxes(1, 2).reshape(*x.shape[:2], -1), w["o"].reshape(-1, x.shape[-1])), written)


class GatedHeads(MultiHead):
    """What each head gives is gated by the token itself (arXiv:2505.06708)."""

    def params(self, parts):
        return {**super().params(parts), "gate": Param("D->HK")}

    def gather(self, params, parts, x, h):
        gate = linear(x, params["gate"].reshape(x.shape[-1], -1)).reshape(*x.shape[:2], *h.shape[1::2])
        return super().gather(params, parts, x, h * jax.nn.sigmoid(gate).swapaxes(1, 2))


class GatedLinear(Mixer):
    """Gated linear attention (arXiv:2312.06635): a state per head that forgets by gates; no entry per token."""

    low: int = 16  # rank of the forget gates

    causal = True
    reads = ("n_heads", "head_width")

    def params(self, parts):
        letters = {
            "q": "D->HK",
            "k": "D->HK",
            "v": "D->HK",
            "gate": "D->HK",
            "down": "D->R",
            "up": "R->HK",
            "o": "HK->D",
        }
        project = {name: Param(value, sizes={"R": self.low}) for name, value in letters.items()}
        return {"project": project | {"bias": Param("HK", constant(3.0))}, "norm": RMSNorm().params("K")}

    def slots(self, parts):
        return {"state": Slot("BHKK", dtype=jnp.float32)}

    def __call__(self, params, parts, x, context):
        w, (B, T, _) = params["project"], x.shape
        q, k, v, gate = (linear(x, w[name]) for name in ("q", "k", "v", "gate"))  # [B, T, H, K]
        decay = jax.nn.log_sigmoid(linear(linear(x, w["down"]), w["up"]) + w["bias"][None, None]) / 16
        real = jnp.broadcast_to(context.at.segment > 0, (B, T))
        first = real & (context.at.position == 0)

        def step(state, token):
            q, k, v, decay, real, first = token
            old = jnp.where(first[:, None, None, None], 0, state)
            new = jnp.exp(decay)[..., None] * old + k[..., None] * v[..., None, :]
            state = jnp.where(real[:, None, None, None], new, state)
            return state, jnp.einsum("BHK,BHKM->BHM", q, state)

        H, K = parts.dims["H"], parts.dims["K"]
        before = jnp.zeros((B, H, K, K), jnp.float32) if context.cache is None else context.cache["state"]
        arrays = (q * K**-0.5, k, v, decay, real, first)
        over_time = [a.swapaxes(0, 1).astype(a.dtype if a.dtype == bool else jnp.float32) for a in arrays]
        state, h = jax.lax.scan(step, before, over_time)
        h = (RMSNorm()(params["norm"], h.swapaxes(0, 1)) * jax.nn.silu(gate)).astype(x.dtype)
        written = None if context.cache is None else {"state": state}
        return Out(linear(h.reshape(B, T, H * K), w["o"].reshape(H * K, -1)), written)


# --- residual rules


class HyperConnections(Residual):
    """Several copies of the stream, mixed by learned matrices around each branch (arXiv:2409.19606, static)."""

    copies: int = 4

    def params(self, branch, n_layers):
        if branch in ("begin", "enter", "end"):
            return {}
        sizes, eye = {"M": self.copies}, lambda key, shape, dtype: jnp.eye(self.copies, dtype=dtype)
        first = lambda key, shape, dtype: jnp.eye(self.copies, dtype=dtype)[0]
        letters = {"width": ("MM", eye), "into": ("M", first), "out": ("M", ones)}
        return {name: Param(*value, sizes=sizes) for name, value in letters.items()}

    def begin(self, params, x, n_layers):
        return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], self.copies, x.shape[-1]))

    def end(self, params, stream):
        return stream.sum(2)

    def before(self, stream, site):
        return site.norms[0](jnp.einsum("BTMD,M->BTD", stream, site.params["into"]))

    def after(self, stream, h, site):
        return (
            jnp.einsum("BTMD,MN->BTND", stream, site.params["width"])
            + site.params["out"][None, None, :, None] * h[:, :, None]
        )


# --- feed-forwards


class Experts(FeedForward):
    """The best `top_k` of several feed-forwards for each token (arXiv:1701.06538), with a loss for an even load, a
    number for each row (arXiv:2101.03961), and a bias that no gradient moves (arXiv:2408.15664)."""

    experts: int = 4
    top_k: int = 2
    alpha: float = 0.01
    rate: float = 0.001  # of the bias, at each step
    activation: Activation = SiLU()

    def params(self):
        sizes = {"E": self.experts}
        matrices = {"router": "D->E", "up": "E|D->F", "down": "E|F->D"}
        bias = Param("E", zeros, sizes=sizes, trained=False, advance=self.balanced)
        return {name: Param(letters, sizes=sizes) for name, letters in matrices.items()} | {"bias": bias}

    def balanced(self, bias, load):
        return bias + self.rate * jnp.sign(load.mean() - load)

    def __call__(self, params, x, at, key):
        chances = jax.nn.softmax(linear(x, params["router"]).astype(jnp.float32), -1)
        biased = chances + params["bias"][None, None]
        chosen = biased >= jax.lax.top_k(biased, self.top_k)[0][..., -1:]
        gates = jnp.where(chosen, chances, 0)
        gates = (gates / gates.sum(-1, keepdims=True)).astype(x.dtype)
        h = self.activation(jnp.einsum("BTD,EDF->BTEF", x, params["up"])) * gates[..., None]
        real = jnp.broadcast_to(at.segment > 0, x.shape[:2]).astype(jnp.float32)[..., None]
        tokens = jnp.maximum(real.sum(1), 1)
        share, chance = (chosen * real).sum(1) / tokens / self.top_k, (chances * real).sum(1) / tokens  # [B, E]
        balance = Loss(self.experts * (share * chance).sum(-1), self.alpha)
        load = (chosen * real).sum((0, 1))
        return Out(jnp.einsum("BTEF,EFD->BTD", h, params["down"]), losses={"balance": balance}, sums={"bias": load})


class ExpertChoice(Experts):
    """Each expert takes the tokens of a row that suit it best (arXiv:2202.09368), later ones as well as earlier."""

    sees_ahead = True

    def params(self):
        return {name: p for name, p in super().params().items() if name != "bias"}

    def __call__(self, params, x, at, key):
        real = jnp.broadcast_to(at.segment > 0, x.shape[:2])
        chances = jax.nn.softmax(linear(x, params["router"]).astype(jnp.float32), -1) * real[..., None]
        capacity = max(1, x.shape[1] * self.top_k // self.experts)
        least = jax.lax.top_k(chances.swapaxes(1, 2), capacity)[0][..., -1]  # [B, E]
        gates = jnp.where(chances >= least[:, None], chances, 0).astype(x.dtype)
        h = self.activation(jnp.einsum("BTD,EDF->BTEF", x, params["up"])) * gates[..., None]
        return Out(jnp.einsum("BTEF,EFD->BTD", h, params["down"]))


# --- models, objectives, samplers


class MultiToken(Decoder):
    """Also predicts the tokens after the next (arXiv:2404.19737), each by a layer of its own before the same head."""

    ahead: int = 2
    share: float = 0.3  # of each further token's loss

    def params(self):
        return {**super().params(), "ahead": {f"layer{i}": Param("D->D") for i in range(self.ahead)}}

    def hidden(self, params, ids, at, key=None, cache=None, memory=None, recorded=False):
        out, losses = super().hidden(params, ids, at, key, cache, memory, recorded), {}
        if cache is not None:  # writing: there is nothing to learn
            return out
        segment = jnp.broadcast_to(at.segment, ids.shape)
        for i in range(self.ahead):
            off = i + 2
            inside = ((segment[:, off:] == segment[:, :-off]) & (segment[:, off:] > 0)).astype(jnp.float32)
            h = out.h[:, :-off]
            h = h + jax.nn.silu(linear(h, params["ahead"][f"layer{i}"]))
            nats = cross_entropy(self.logits(params, h), ids[:, off:])
            value = (nats * inside).sum(1) / jnp.maximum(inside.sum(1), 1)
            losses[f"token_{off}"] = Loss(value, self.share)
        return out.beside(out.h, Out(None, losses=losses))


class EveryLayer(NextToken):
    """Every layer's stream is read by the last norm and the head (arXiv:2404.16710): the higher, the more it counts."""

    scale: float = 0.2

    def hidden(self, model, params, example, key):
        out = model.hidden(params, example.ids, example.at, key, recorded=True)
        count = len(model.kinds("decoder"))
        each = [out.activations[f"decoder/layers/block{i}/after_feed_forward"] for i in range(count)]
        layers = jnp.stack(each, 1).reshape(-1, *each[0].shape[1:])[:-1]  # the last one is h
        return out._replace(h=(out.h, model.norm(params["decoder"]["norm"], layers)))

    def nats(self, model, params, h, example, key):
        last, layers = h
        found = super().nats(model, params, last, example, key)
        shares = self.scale * jnp.arange(1, len(layers) + 1) / (len(layers) + 1)
        each = jax.lax.map(lambda x: NextToken.nats(self, model, params, x, example, key).plain, layers)
        return found._replace(total=found.plain + jnp.einsum("L,LBT->BT", shares, each))


class FillInTheMiddle(NextToken):
    """A share of the rows becomes prefix, suffix, middle (arXiv:2207.14255), between three marks."""

    rate: float = 0.5
    marks: tuple[int, int, int] = (0, 1, 2)

    def prepare(self, batch, key, step=None):
        tokens = batch["tokens"]
        of_rate, of_span = jax.random.split(key)
        turned = jax.vmap(self.turned)(jax.random.split(of_span, len(tokens)), tokens)
        chosen = jax.random.bernoulli(of_rate, self.rate, (len(tokens), 1))
        if "segments" in batch:  # rows of one whole document alone
            chosen &= (batch["segments"] == 1).all(1, keepdims=True)
        return super().prepare({**batch, "tokens": jnp.where(chosen, turned, tokens)}, key, step)

    def turned(self, key, row):
        kept = len(row) - 3  # the marks need room
        a, b = jnp.sort(jax.random.randint(key, (2,), 0, kept + 1))
        i, middle = jnp.arange(kept), kept + 3 - (b - a)
        where = jnp.where(i < a, 1 + i, jnp.where(i < b, middle + i - a, a + 2 + i - b))
        marks = jnp.stack([0, a + 1, middle - 1])
        return jnp.zeros_like(row).at[where].set(row[:kept]).at[marks].set(jnp.asarray(self.marks))


class MaskedDiffusion(Masked):
    """Each row is masked at a rate of its own, and its losses weigh 1 / rate (arXiv:2406.07524)."""

    least: float = 0.05  # rate of masking

    def prepare(self, batch, key, step=None):
        tokens = batch["tokens"]
        segments = batch.get("segments", jnp.ones_like(tokens))
        of_rate, of_choice = jax.random.split(key)
        u = (jax.random.uniform(of_rate) + jnp.arange(len(tokens)) / len(tokens)) % 1
        rate = (self.least + (1 - self.least) * u)[:, None]
        chosen = (jax.random.uniform(of_choice, tokens.shape) < rate) & (segments > 0)
        counted = (segments > 0).astype(jnp.float32)
        masked = jnp.where(chosen, self.mask, tokens)
        return Example(masked, places(segments), tokens, chosen / rate, counted=counted)

    def logits(self, model, params, h):  # a mask is never the answer
        logits = super().logits(model, params, h)
        return jnp.where(jnp.arange(logits.shape[-1])[None, None] == self.mask, -1e30, logits)


class Unmasking(Sampler):
    """Fills in masks, the surest tokens first, the same share of them in each round."""

    rounds: int = 16

    def check_model(self, objective, model):
        if not isinstance(objective, Masked):
            raise ValueError(f"sampler=Unmasking must have a model that fills in masks, not {type(objective).__name__}")

    def __call__(self, request):
        context, mask = request.context or request.model.context_length, request.objective.mask
        rows = [[*prompt[-context + request.tokens :], *[mask] * request.tokens] for prompt in request.prompts]
        width = max(map(len, rows))
        ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
        segments = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int32)
        how = self.rounds, request.params, ids, segments, request.processors, request.keys
        yield Drawn(np.asarray(_unmask(request.model, request.objective, *how))[:, -request.tokens :])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _unmask(model, objective, rounds, params, ids, segments, processors, keys):
    at, total = places(segments), (ids == objective.mask).sum(1)

    def one(i, ids):
        still = ids == objective.mask
        text = Text(ids, ~still & (segments > 0))
        logits = objective.logits(model, params, model.hidden(params, ids, at).h)
        for processor in processors:
            logits = jax.vmap(lambda a, f=processor: f(a, text), 1, 1)(logits)
        drawn = jax.vmap(lambda key, a: jax.random.categorical(jax.random.fold_in(key, i), a))(keys, logits)
        sure = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        count = still.sum(1) - (total * (rounds - 1 - i)) // rounds
        rank = jnp.argsort(jnp.argsort(jnp.where(still, -sure, jnp.inf), 1), 1)
        return jnp.where(still & (rank < count[:, None]), drawn, ids)

    return jax.lax.fori_loop(0, rounds, one, ids)
