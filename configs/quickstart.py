"""A small decoder on the text that comes with Python: no download, recognisable help pages in half a minute.

    jaxformer train quickstart
    jaxformer sample runs/quickstart --prompt "The " --temperature 0.8

812,800 parameters with the 103 characters of Python 3.11. The recipe of `shakespeare_cpu_fast`, with what `Groups` and
`Muon` do unless told otherwise.
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.groups import Groups
from jaxformer.learning.schedules import WSD
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import MLP, RMSNorm, SquaredReLU, ZeroOutputs
from jaxformer.model.positions import Rotary

config = Config(
    directory="runs/quickstart",
    data=Data(corpus=PythonTopics(), tokenizer=Characters(), batch_size=16),
    model=Decoder(
        n_layers=4,
        n_heads=4,
        d_model=128,
        context_length=64,
        position=Rotary(),
        norm=RMSNorm(gain=False),
        qk_norm=RMSNorm(gain=False),
        feed_forward=MLP(SquaredReLU()),
        head=LanguageHead(tied=False, cap=15.0),
        initializer=ZeroOutputs(),
    ),
    optimizer=Groups(WSD(peak=1.0, warmup_steps=0, decay=0.8)),
    train=Train(steps=600, steps_per_call=20, eval_every=300, save_every=300),
)
