"""Tiny Shakespeare by characters on a GPU, as nanoGPT's recipe for one: 6 layers, context 256, dropout 0.2.

    jaxformer train shakespeare_gpu

10,745,088 parameters on tinyshakespeare.txt (10,646,784 without the table of positions, as nanoGPT counts). Not yet
run in full, for want of a GPU. Its first 100 steps on 2 cores:

    jaxformer train shakespeare_gpu --train.steps=100 --train.compute_dtype=float32 \\
        --optimizer.learning_rate.shortens=false

take 10 minutes (AMD EPYC, jax 0.10.1) to a validation loss of 2.472.
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import LayerNorm

config = Config(
    directory="runs/shakespeare_gpu",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=64),
    model=Decoder(n_layers=6, n_heads=6, d_model=384, context_length=256, dropout=0.2, norm=LayerNorm(bias=False)),
    optimizer=AdamW(WarmupCosine(peak=1e-3, final=1e-4, warmup_steps=100), b2=0.99, weight_decay=0.1, clip=1.0),
    train=Train(steps=5000, steps_per_call=10, eval_every=250, save_every=250, compute_dtype="bfloat16"),
)
