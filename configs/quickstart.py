"""A small decoder on the text that comes with Python: no download, recognisable help pages in a minute.

    jaxformer train quickstart
    jaxformer sample runs/quickstart --prompt "The " --temperature 0.8

810,112 parameters with the 103 characters of Python 3.11. Validation loss 1.355 after 2,000 steps; 61 seconds from
command to end on 2 cores (AMD EPYC, jax 0.10.1), compilation, evaluations and samples included.
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import Characters

config = Config(
    directory="runs/quickstart",
    data=Data(corpus=PythonTopics(), tokenizer=Characters(), batch_size=16),
    model=Decoder(n_layers=4, n_heads=4, d_model=128, context_length=64),
    train=Train(steps=2000, steps_per_call=10, eval_every=500, save_every=500),
)
