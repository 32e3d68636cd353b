"""PyTorch, compiled: a whole recipe from start to end, as nanoGPT trains, with a save and one evaluation at the end.

    python -m peers.pytorch_recipe CORPUS DIRECTORY < recipe.json

prints its loss, and how many tokens that is of, as JSON.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peers.pytorch import Transformer
from peers.recipes import Modern, Muon, Recipe
from peers.sizes import Size
from torch import nn

EVALUATED = 256  # rows of an evaluation's batch


class ModernBlock(nn.Module):
    def __init__(self, recipe: Recipe, modern: Modern):
        super().__init__()
        width, self.heads, self.scale = recipe.width, recipe.heads, modern.scale
        self.qkv, self.out = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.up, self.down = nn.Linear(width, recipe.hidden, False), nn.Linear(recipe.hidden, width, False)
        deviation = modern.matrix / math.sqrt(width) / 0.8796  # of what is not cut off, as jaxformer's LeCunNormal
        for matrix in (self.qkv, self.up):
            nn.init.trunc_normal_(matrix.weight, 0, deviation, -2 * deviation, 2 * deviation)
        for matrix in (self.out, self.down):
            nn.init.zeros_(matrix.weight)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(normed(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated(normed(q), cos, sin), rotated(normed(k), cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(normed(x))).square())


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class ModernTransformer(nn.Module):
    """Gives the loss for rows [B, T+1]."""

    def __init__(self, recipe: Recipe, modern: Modern, vocabulary: int):
        super().__init__()
        self.normed, self.cap = modern.normed, modern.cap
        self.tokens, self.head = nn.Embedding(vocabulary, recipe.width), nn.Linear(recipe.width, vocabulary, False)
        self.blocks = nn.ModuleList(ModernBlock(recipe, modern) for _ in range(recipe.layers))
        nn.init.normal_(self.tokens.weight, std=modern.embedding)
        nn.init.zeros_(self.head.weight)
        half = recipe.width // recipe.heads // 2
        turns = torch.arange(recipe.context)[:, None] * modern.base ** (-torch.arange(half) / half)
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[1] - 1
        x = self.tokens(rows[:, :-1])
        x = normed(x) if self.normed else x
        for block in self.blocks:
            x = block(x, self.cos[:count], self.sin[:count])
        logits = self.head(normed(x))
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class Baseline(Transformer):
    """nanoGPT's decoder and first weights."""

    def __init__(self, recipe: Recipe, vocabulary: int):
        size = Size(recipe.layers, recipe.heads, recipe.width, recipe.context, vocabulary)
        super().__init__(size)
        for block in self.blocks:
            for matrix in (block.out, block.down):
                nn.init.normal_(matrix.weight, std=0.02 / math.sqrt(2 * recipe.layers))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows, rows)  # all are real


class BatchedMuon:
    """Muon with Nesterov's momentum, of all matrices of a shape at once and in float32: torch.optim.Muon takes one
    after another, in bfloat16. Queries, keys and values are matrices of their own."""

    def __init__(self, blocks: Sequence[ModernBlock], given: Muon):
        self.given = given
        matrices = [matrix for block in blocks for matrix in (block.qkv, block.out, block.up, block.down)]
        self.weights = [matrix.weight for matrix in matrices]  # [out, in]
        self.moments = [torch.zeros_like(weight) for weight in self.weights]
        self.parts = [3, 1, 1, 1] * len(blocks)  # matrices in each

    @torch.no_grad()
    def step(self, rate: float) -> None:
        momentum = self.given.momentum
        torch._foreach_lerp_(self.moments, [weight.grad for weight in self.weights], 1 - momentum)
        ahead = torch._foreach_lerp([weight.grad for weight in self.weights], self.moments, momentum)
        split = [part for each, count in zip(ahead, self.parts, strict=True) for part in each.chunk(count)]
        wide = [part if part.shape[0] <= part.shape[1] else part.T for part in split]
        for shape in {part.shape for part in wide}:
            here = [i for i, part in enumerate(wide) if part.shape == shape]
            for i, found in zip(here, orthogonal(torch.stack([wide[i] for i in here]), self.given), strict=True):
                out, into = split[i].shape
                split[i].copy_(found if split[i].shape == shape else found.T).mul_(max(1, out / into) ** 0.5)
        torch._foreach_mul_(self.weights, 1 - rate * self.given.decay)
        torch._foreach_add_(self.weights, ahead, alpha=-rate)


def orthogonal(x: torch.Tensor, given: Muon) -> torch.Tensor:
    """About UVᵀ of each UΣVᵀ in [N, rows, columns], no more rows than columns."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in given.coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def trained(recipe: Recipe, corpus: str, directory: Path) -> dict[str, float]:
    torch.manual_seed(recipe.seed)
    text = Path(corpus).read_bytes().decode()
    known = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[character] for character in text])
    train, valid = ids.tensor_split([int((1 - recipe.valid) * len(ids))])
    modern = recipe.modern
    model = ModernTransformer(recipe, modern, len(known)) if modern else Baseline(recipe, len(known))
    muon = BatchedMuon(model.blocks, recipe.muon) if recipe.muon else None
    own, taken = recipe.adam, {id(weight) for weight in muon.weights} if muon else set()
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    groups = [{"params": [p for p in matrices if id(p) not in taken], "weight_decay": own.decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    adam = torch.optim.AdamW(groups, betas=(own.b1, own.b2), eps=own.eps, fused=True)
    compiled, rows = torch.compile(model), train.unfold(0, recipe.context + 1, 1)
    for step, rate in enumerate(own.rates):
        for group in adam.param_groups:
            group["lr"] = rate
        loss = compiled(rows[torch.randint(len(rows), (recipe.batch,))])
        model.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        if muon is not None:
            muon.step(muon.given.rates[step])
        loss.item()
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, directory / "checkpoint.pt")
    return evaluated(model, valid, recipe.context)


@torch.no_grad()
def evaluated(model: nn.Module, ids: torch.Tensor, context: int) -> dict[str, float]:
    """Loss of all ids but the first, each predicted once, in windows side by side, as `jaxformer evaluate`."""
    rows, total = ids.unfold(0, context + 1, context), 0.0
    for some in rows.split(EVALUATED):
        total += model(some).item() * some.shape[0] * context
    done = len(rows) * context
    if rest := len(ids) - 1 - done:
        total += model(ids[done:][None]).item() * rest
    return {"loss": total / (len(ids) - 1), "tokens": len(ids) - 1}


if __name__ == "__main__":
    print(json.dumps(trained(Recipe.of(json.load(sys.stdin)), sys.argv[1], Path(sys.argv[2]))))
