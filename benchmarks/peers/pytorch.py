"""PyTorch, compiled: the same transformer written as nanoGPT is, with the same AdamW and clipping."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from peers.sizes import Size
from peers.timing import Found, best, sides_of, timed
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies there and nanoGPT does


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        width, biased = size.width, not size.causal
        self.size = size
        self.norm_attention, self.norm_feed_forward = (nn.LayerNorm(width, bias=biased) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, biased), nn.Linear(width, width, biased)
        self.up, self.down = nn.Linear(width, 4 * width, biased), nn.Linear(4 * width, width, biased)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        causal, rate = self.size.causal, self.size.dropout
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.size.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=rate, is_causal=causal)
        x = x + self.dropout(self.out(h.transpose(1, 2).flatten(2)))
        h = self.up(self.norm_feed_forward(x))
        return x + self.dropout(self.down(F.gelu(h, approximate="tanh") if causal else F.relu(h)))


class Transformer(nn.Module):
    """Gives the loss: of a decoder for rows [B, T+1], of an encoder for rows [B, T] of which some tokens are real."""

    def __init__(self, size: Size):
        super().__init__()
        width, biased = size.width, not size.causal
        self.size = size
        self.tokens, self.positions = nn.Embedding(size.vocabulary, width), nn.Embedding(size.context, width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.dropout = nn.LayerNorm(width, bias=biased), nn.Dropout(size.dropout)
        if not size.causal:
            self.between, self.last = nn.Linear(width, width), nn.Linear(width, 1)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        ids = rows[:, :-1] if self.size.causal else rows
        mask = None if self.size.causal else real[:, None, None]
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if self.size.causal:
            return F.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), rows[:, 1:].flatten())
        pooled = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        logits = self.last(self.dropout(F.relu(self.between(pooled))))[:, 0]
        return F.binary_cross_entropy_with_logits(logits, (real.sum(1) % 2).float())


def step(size: Size, seconds: float, dtype: str = "float32", padded: int = 1) -> Found:
    """Of a step with its batch, its loss fetched; bfloat16 by autocast. The table of tokens is `padded` to a multiple,
    as nanoGPT's is."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(size, vocabulary=-(-size.vocabulary // padded) * padded)).to(DEVICE)
    return trained(model, model, size, seconds, dtype)


def trained(
    model: nn.Module, loss: Callable[..., torch.Tensor], size: Size, seconds: float, dtype: str = "float32"
) -> Found:
    """Of a step that lowers `loss(rows, real)`, compiled."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, compiled = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True), torch.compile(loss)
    tokens, width = torch.randint(size.vocabulary, (1_000_000,)), size.tokens + size.causal
    cast = torch.autocast(DEVICE, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def call() -> None:
        first = torch.randint(len(tokens) - width, (size.batch, 1))
        real = torch.arange(size.tokens) < torch.randint(5, size.tokens + 1, (size.batch, 1))
        with cast:
            value = compiled(tokens[first + torch.arange(width)].to(DEVICE), real.to(DEVICE))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value.item()

    return timed(call, seconds)


def checkpoint(size: Size, seconds: float) -> Found:
    """Of `torch.save` of the parameters and Adam's moments, which returns when all is written."""
    model = Transformer(size)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        state, path = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder, "saved")
        return timed(lambda: torch.save(state, path), seconds, after=path.unlink)


def limits(seconds: float, sides: int, room: int) -> Found:
    """Operations a second in products of each dtype with the first so many `sides`, and bytes a second, copied or
    read, by arrays of `room` numbers."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    found: Found = {"float32": 0.0, "bfloat16": 0.0}
    for dtype, side in sides_of(("float32", "bfloat16"), sides, found):
        a = torch.randn(side, side, device=DEVICE, dtype=getattr(torch, dtype))
        out = torch.empty_like(a)
        taken = best(lambda a=a, out=out: (torch.mm(a, a, out=out), wait()), seconds)
        found[dtype] = max(found[dtype], 2 * side**3 / taken)
    a, b = torch.ones(room, device=DEVICE), torch.empty(room, device=DEVICE)
    copied = 8 * room / best(lambda: (b.copy_(a), wait()), seconds)
    read = 4 * room / best(lambda: (a.sum(), wait()), seconds)
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()} & {"torch", "transformers"}
    versions = {name: metadata.version(name) for name in sorted(installed)}
    return {**found, "bytes": max(copied, read), "versions": versions}
