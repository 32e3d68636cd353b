"""Tiny Shakespeare by characters on a GPU: nanoGPT's config/train_shakespeare_char.py, 6 layers, context 256.

    jaxformer train shakespeare_gpu

10,745,088 parameters on tinyshakespeare.txt (10,646,784 without the table of positions, as nanoGPT counts). Data,
split, windows, model, exact GELU, initial values, dropout, AdamW, decay of all matrices and tables, clipping, warm-up
and cosine are nanoGPT's. What stays different:

* random numbers: other initial values, batches and dropout masks; seed 0, not 1337
* with bfloat16 the residual stream is rounded to it, too, and logits are float32 (nanoGPT: the reverse); attention's
  scores and softmax, norms and the loss are float32 in both
* one update less: nanoGPT makes a last one, of 5,001, behind its last evaluation
* no evaluation before the first step; a sample is shown at each evaluation; the newest two checkpoints are kept beside
  the best
* the loss: ours is that of the whole validation split, each token asked for once, in windows side by side. nanoGPT's is
  the mean of 200 random batches, of each split; its best, 1.4697, is the least of 21 such estimates. Both of a run:

    jaxformer evaluate runs/shakespeare_gpu --step best
    python -c 'import jaxformer, jaxformer.lab.measures as m; print(m.estimate_loss(jaxformer.open_run(
        "runs/shakespeare_gpu", "best")))'

On an NVIDIA H200 (jax 0.11.2), of the whole validation split: 1.4617 at best, at step 1,750, and 1.620 at step 3,750,
overfitting as nanoGPT's does; the estimates of that best: 1.4636 of validation, 1.0989 of training (nanoGPT's best:
1.4697). That run was stopped at step 4,000 of 5,000, after 63 s of steps of 16 ms; with layers unrolled, as they now
are, a step takes 9.2 ms (LOG.md).

Its first 20 steps on 2 cores:

    jaxformer train shakespeare_gpu --train.steps=20 --train.compute_dtype=float32 \\
        --optimizer.learning_rate.shortens=false

come to a training loss of 2.774 and a validation loss of 2.721 (AMD EPYC, jax 0.10.1).
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import GELU, MLP, LayerNorm
from jaxformer.model.positions import Learned

config = Config(
    directory="runs/shakespeare_gpu",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=64),
    model=Decoder(
        n_layers=6,
        n_heads=6,
        d_model=384,
        context_length=256,
        dropout=0.2,
        position=Learned(decay=True),
        feed_forward=MLP(GELU(approximate=False)),
        norm=LayerNorm(bias=False),
    ),
    optimizer=AdamW(WarmupCosine(peak=1e-3, final=1e-4, warmup_steps=100), b2=0.99, weight_decay=0.1, clip=1.0),
    train=Train(steps=5000, steps_per_call=10, eval_every=250, save_every=250, compute_dtype="bfloat16"),
)
