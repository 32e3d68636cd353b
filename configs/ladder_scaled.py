"""The last rung of the ladder, scaled: tiny Shakespeare by characters, 6 layers, 384 wide, context 256, for a GPU.

    jaxformer train ladder_scaled
    jaxformer reproduce ladder

10,788,929 parameters on tinyshakespeare.txt. The recipe of its author: PyTorch's initial values, AdamW at a constant
3e-4 with decay 0.01, no warm-up, no clipping, ReLU, biases in the feed-forward, the output projection and the head, an
untied head, dropout 0.2.
Published: validation loss 1.477 at best, 1.494 at the end, training loss 1.122 and 1.048, in 16 min 45 s on its GPU.

On an NVIDIA H200 (jax 0.11.2): validation loss 1.4792 at best and at the end, in two minutes beside other programs on
the same GPU (`experiments/gpu/ladder_scaled.log`).

Its first 20 steps on 2 cores:

    jaxformer train ladder_scaled --train.steps=20 --train.compute_dtype=float32 --train.log_every=2

come to a training loss of 2.803 and a validation loss of 2.786 (AMD EPYC, jax 0.10.1).
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import MLP, ReLU, TorchUniform

config = Config(
    directory="runs/ladder_scaled",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=64),
    model=Decoder(
        n_layers=6,
        n_heads=6,
        d_model=384,
        context_length=256,
        dropout=0.2,
        feed_forward=MLP(ReLU(), bias=True),
        bias=True,
        qkv_bias=False,
        head=LanguageHead(tied=False, bias=True),
        initializer=TorchUniform(),
    ),
    optimizer=AdamW(Constant(3e-4), b2=0.999, weight_decay=0.01, clip=None),
    train=Train(steps=5000, steps_per_call=10, eval_every=500, save_every=500, compute_dtype="bfloat16"),
)
