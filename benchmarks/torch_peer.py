"""The peer of a training step: the same GPT in PyTorch, compiled, with the same AdamW, clipping and sizes.

python benchmarks/torch_peer.py LAYERS HEADS WIDTH CONTEXT BATCH VOCABULARY CALLS prints the seconds of each step.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed_forward = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_feed_forward(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, context: int, vocabulary: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]]))
        return F.cross_entropy((h @ self.tokens.weight.T).flatten(0, 1), y.flatten())


def main(layers: int, heads: int, width: int, context: int, batch: int, vocabulary: int, calls: int) -> None:
    torch.manual_seed(0)
    model = GPT(layers, heads, width, context, vocabulary)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, loss = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True), torch.compile(model)
    tokens = torch.randint(vocabulary, (batch, context + 1))
    seconds = []
    for _ in range(calls + 5):
        started = time.perf_counter()
        value = loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value.item()
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[5:]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
