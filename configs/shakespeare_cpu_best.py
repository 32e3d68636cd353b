"""Tiny Shakespeare by characters on a CPU: the lowest loss in the time that PyTorch takes for `shakespeare_cpu`.

    jaxformer train shakespeare_cpu_best --train.seed=0 --directory=runs/shakespeare_cpu_best_0

803,072 parameters on tinyshakespeare.txt. The recipe of `shakespeare_cpu_fast` with twice the context, for more steps;
these want a longer memory of Muon's and lower rates. Loss over the full validation split after 1,600 steps, seeds 0 to
4: 1.5646, 1.5563, 1.5571, 1.5671, 1.5526. On 2 cores (AMD EPYC, jax 0.10.1, a slow hour) 177.2 seconds from the start
of the process to its end, where PyTorch takes 175.5 to 1.898 by the recipe of `shakespeare_cpu`, and 202.1 to 1.563 by
this one (medians):

    python benchmarks/recipe.py best
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
    directory="runs/shakespeare_cpu_best",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=8),
    model=Decoder(
        n_layers=4,
        n_heads=4,
        d_model=128,
        context_length=128,
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
            Group(Hidden(), Muon(Constant(0.02), coefficients=PolarExpress(), steps=3, weight_decay=0.0)),
            Group(Everything(), AdamW(Constant(0.01), b2=0.95, weight_decay=0.0, clip=None)),
        ),
        clip=None,
    ),
    train=Train(steps=1600, steps_per_call=25, eval_every=1600, save_every=1600, sample_tokens=0),
)
