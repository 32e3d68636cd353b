"""Tiny Shakespeare by characters on a CPU, the loss of `shakespeare_cpu` in a ninth of the steps.

    jaxformer train shakespeare_cpu_fast --train.seed=0 --directory=runs/shakespeare_cpu_fast_0

803,072 parameters on tinyshakespeare.txt: Muon for the matrices of layers, AdamW for the embedding and a head of its
own, norms without gains, normed queries and keys, rotary positions, ReLU², outputs that begin at zero. Loss over the
full validation split after 210 steps, seeds 0 to 4: 1.8909, 1.8851, 1.8835, 1.8891, 1.8733. On 2 cores (AMD EPYC, jax
0.10.1, a slow hour) 35.1 seconds from the start of the process to its end, with programs in the cache 26.3, where
PyTorch takes 175.5 to 1.898 by the recipe of `shakespeare_cpu`, compilation included (medians):

    python benchmarks/recipe.py fast

What each ingredient is worth: `jaxformer reproduce recipe`.
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
    directory="runs/shakespeare_cpu_fast",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=12),
    model=Decoder(
        n_layers=4,
        n_heads=4,
        d_model=128,
        context_length=64,
        position=Rotary(base=1000.0),
        norm=RMSNorm(gain=False),
        qk_norm=RMSNorm(gain=False),
        kernel=Softmax(scale=0.34),
        feed_forward=MLP(SquaredReLU()),
        head=LanguageHead(tied=False),
        initializer=ZeroOutputs(LeCunNormal(std=1.0, scale=0.8)),
    ),
    optimizer=Groups(
        WSD(peak=1.0, warmup_steps=0, decay=0.8),
        groups=(
            Group(Hidden(), Muon(Constant(0.03), momentum=0.9, coefficients=PolarExpress(), steps=3, weight_decay=0.0)),
            Group(Everything(), AdamW(Constant(0.02), b2=0.95, weight_decay=0.0, clip=None)),
        ),
        clip=None,
    ),
    train=Train(steps=210, steps_per_call=30, eval_every=210, save_every=210, sample_tokens=0),
)
