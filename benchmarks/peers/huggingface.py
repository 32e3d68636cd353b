"""`transformers`: GPT-2 and BERT of the same sizes, random weights, on PyTorch."""

import torch
import torch.nn.functional as F
import transformers
from peers.pytorch import DEVICE, trained
from peers.sizes import TOP_K, Size, Texts
from peers.timing import Found, timed


def gpt2(size: Size) -> transformers.GPT2LMHeadModel:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), size.dropout)
    config = transformers.GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        bos_token_id=0,
        eos_token_id=None,
        **rates,
    )
    return transformers.GPT2LMHeadModel(config).to(DEVICE)


def bert(size: Size) -> transformers.BertForSequenceClassification:
    config = transformers.BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        hidden_act="relu",
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        max_position_embeddings=size.context,
        num_labels=1,
    )
    return transformers.BertForSequenceClassification(config).to(DEVICE)


def step(size: Size, seconds: float, dtype: str = "float32") -> Found:
    """Of a step with its batch, compiled, its loss fetched."""
    torch.manual_seed(0)
    model = (gpt2 if size.causal else bert)(size).train()

    def loss(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if size.causal:
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        logits = model(input_ids=rows, attention_mask=real.long()).logits[:, 0]
        return F.binary_cross_entropy_with_logits(logits, (real.sum(1) % 2).float())

    return trained(model, loss, size, seconds, dtype)


def decode(size: Size, seconds: float, texts: Texts, dtype: str = "float32", static: bool = False) -> Found:
    """Of one more token for each text, by `generate`, the prompts' share included; with a `static` cache its forward
    pass is compiled, otherwise neither."""
    torch.manual_seed(0)
    model = gpt2(size).eval().to(getattr(torch, dtype))
    prompts = texts.prompts(size.vocabulary)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    how = {"do_sample": True, "top_k": min(TOP_K, size.vocabulary), "use_cache": True, "pad_token_id": 0}
    if static:
        how |= {"cache_implementation": "static"}
        if DEVICE == "cpu":  # elsewhere `generate` compiles of itself
            model.forward = torch.compile(model.forward)

    def call() -> None:
        with torch.inference_mode():
            found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=texts.new, **how)
        assert found.cpu().shape[1] == longest + texts.new

    return timed(call, seconds, texts.new)
