"""The ladder's nine small rungs in PyTorch, written from their description, with its own initial values and AdamW.

    pip install -e ".[peers]" && python experiments/controls/ladder.py RUNG SEEDS CHARACTERS OUT.json

RUNG is a key of RUNGS. Prints nothing; OUT.json has for each seed the loss of the whole validation split, the mean
over 200 random batches of it, that of the last 500 training steps, and the seconds that the training took.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CONTEXT, WIDTH, BATCH = 8, 32, 32


class Heads(nn.Module):
    """Causal attention without biases; uniform weights if `averages`."""

    def __init__(self, heads: int, width: int, averages: bool = False, projects: bool = False):
        super().__init__()
        self.heads, self.averages = heads, averages
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * width, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH) if projects else nn.Identity()
        self.register_buffer("past", torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = torch.zeros_like(scores) if self.averages else scores
        weights = scores.masked_fill(~self.past, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))


class Sums(nn.Module):
    """Residual sums around attention and feed-forward, with a norm before each if `norms`."""

    def __init__(self, norms: bool):
        super().__init__()
        norm = nn.LayerNorm if norms else nn.Identity
        self.attention = nn.Sequential(norm(WIDTH), Heads(4, 8, projects=True))
        self.feed_forward = nn.Sequential(norm(WIDTH), two_layers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Network(nn.Module):
    """Embeddings of tokens and places, blocks, and a linear head."""

    def __init__(self, vocabulary: int, *blocks: nn.Module, width: int = WIDTH, places: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH) if places else None
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places.weight
        return self.head(self.blocks(x))


RUNGS: dict[str, Callable[[int], nn.Module]] = {
    "bigram table": lambda v: nn.Embedding(v, v),
    "token embedding and linear head": lambda v: Network(v, places=False),
    "token averaging": lambda v: Network(v, Heads(1, 16, averages=True), width=16),
    "one head of 16": lambda v: Network(v, Heads(1, 16), width=16),
    "four heads of 8": lambda v: Network(v, Heads(4, 8)),
    "and feed-forward": lambda v: Network(v, Heads(4, 8), one_layer()),
    "three blocks without sums": lambda v: Network(
        v, *(f() for _ in range(3) for f in (lambda: Heads(4, 8), one_layer))
    ),
    "and residual sums": lambda v: Network(v, *(Sums(norms=False) for _ in range(3))),
    "and LayerNorm": lambda v: Network(v, *(Sums(norms=True) for _ in range(3)), nn.LayerNorm(WIDTH)),
}


def train(rung: str, seed: int, tokens: torch.Tensor, vocabulary: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = RUNGS[rung](vocabulary)
    table = rung in list(RUNGS)[:2]
    steps, rate = (3000, 1e-2) if table else (5000, 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    first = int(0.9 * len(tokens))
    training, validation = tokens[:first], tokens[first:]

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def batch(text: torch.Tensor) -> torch.Tensor:
        at = torch.randint(len(text) - CONTEXT, (BATCH, 1))
        return text[at + torch.arange(CONTEXT + 1)]

    losses, started = [], time.perf_counter()
    for _ in range(steps):
        value = loss(batch(training))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    seconds = time.perf_counter() - started
    with torch.no_grad():
        count = (len(validation) - 1) // CONTEXT
        rows = validation[torch.arange(count)[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]
        whole = loss(rows).item()
        batches = statistics.fmean(loss(batch(validation)).item() for _ in range(200))
    return {"whole": whole, "batches": batches, "training": statistics.fmean(losses[-500:]), "seconds": seconds}


def main(rung: str, seeds: str, characters: str, out: str) -> None:
    torch.set_num_threads(1)  # quicker than two for products so small
    text = Path(characters).read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    found = [train(rung, seed, tokens, len(ids)) for seed in range(int(seeds))]
    Path(out).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
