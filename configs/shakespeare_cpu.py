"""Tiny Shakespeare by characters on a CPU, as nanoGPT's recipe for one: no dropout, no biases, tied head.

    jaxformer train shakespeare_cpu --train.seed=0 --directory=runs/shakespeare_cpu_0

804,096 parameters on tinyshakespeare.txt. Loss over the full validation split after 2,000 steps, seeds 0, 1 and 2:
1.9184, 1.9069, 1.8963; mean 1.907. 50 to 52 seconds each on 2 cores (AMD EPYC, jax 0.10.1), all included.

Its speed beside compiled PyTorch and others is in BENCHMARKS.md, by `python benchmarks/compare.py step small`.
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import LayerNorm

config = Config(
    directory="runs/shakespeare_cpu",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=12),
    model=Decoder(n_layers=4, n_heads=4, d_model=128, context_length=64, norm=LayerNorm(bias=False)),
    optimizer=AdamW(WarmupCosine(peak=1e-3, final=1e-4, warmup_steps=100), b2=0.99, weight_decay=0.1, clip=1.0),
    train=Train(steps=2000, steps_per_call=10, eval_every=500, save_every=500),
)
