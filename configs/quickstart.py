"""A small decoder on the text that comes with Python: no download, recognisable help pages in less than a minute.

    jaxformer train quickstart
    jaxformer sample runs/quickstart --prompt "The " --temperature 0.8

812,800 parameters with the 103 characters of Python 3.11. The recipe of `shakespeare_cpu_fast`, with weight decay
in Muon, clipped gradients, and `b2=0.99` in AdamW.
Validation loss 1.273 after 500 steps. On 2 cores of a slow machine (AMD EPYC, jax 0.10.1), with nothing in the cache,
the first text, after half of the steps, is there 36 seconds after the command, and the end comes after 55 to 66,
compilation, evaluations and samples included (43 on a faster machine).
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import PythonTopics
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
    directory="runs/quickstart",
    data=Data(corpus=PythonTopics(), tokenizer=Characters(), batch_size=16),
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
            Group(Hidden(), Muon(Constant(0.03), momentum=0.9, coefficients=PolarExpress(), steps=3)),
            Group(Everything(), AdamW(Constant(0.02), weight_decay=0.0)),
        ),
    ),
    train=Train(steps=500, steps_per_call=25, eval_every=250, save_every=250),
)
