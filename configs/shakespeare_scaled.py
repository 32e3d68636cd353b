"""Tiny Shakespeare by characters at the size of the ladder's last rung, by a recipe for a CPU with matrix units.

    jaxformer train shakespeare_scaled

4,751,872 parameters on tinyshakespeare.txt. The recipe of `shakespeare_cpu_best` at context 256, with what holds
overfitting back: dropout of 0.2 on the embedding, branches and attention's weights, decay of matrices, an average of
the parameters. Published for 10.8 million parameters: 1.477 at best (`ladder_scaled`).

Not run in full: it is meant for a CPU with matrix units. Its first 20 steps on 2 cores (AMD EPYC, jax 0.10.1), by
`--train.steps=20`, come to a training loss of 2.514 and a validation loss of 2.509.
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.groups import Everything, Group, Groups, Hidden
from jaxformer.learning.muon import Muon, PolarExpress
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WSD, Constant
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import MLP, LeCunNormal, RMSNorm, SquaredReLU, ZeroOutputs
from jaxformer.model.positions import Rotary

config = Config(
    directory="runs/shakespeare_scaled",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=16),
    model=Decoder(
        n_layers=6,
        n_heads=4,
        d_model=256,
        context_length=256,
        dropout=0.2,
        position=Rotary(base=1000.0),
        norm=RMSNorm(gain=False),
        qk_norm=RMSNorm(gain=False),
        kernel=Softmax(scale=0.24),
        feed_forward=MLP(SquaredReLU()),
        head=LanguageHead(tied=False),
        initializer=ZeroOutputs(LeCunNormal(std=1.0, scale=0.8)),
    ),
    optimizer=Groups(
        WSD(peak=1.0, warmup_steps=0, decay=0.65),
        groups=(
            Group(Hidden(), Muon(Constant(0.02), coefficients=PolarExpress(), weight_decay=0.1)),
            Group(Everything(), AdamW(Constant(0.01), b2=0.95, weight_decay=0.0, clip=None)),
        ),
        clip=None,
    ),
    train=Train(steps=3000, steps_per_call=10, eval_every=250, save_every=250, ema_decay=0.98),
)
