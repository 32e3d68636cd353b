"""quick"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import Characters

config = Config(
    directory="runs/quickstart",
    data=Data(corpus=PythonTopics(), tokenizer=Characters(), batch_size=16),
    model=Decoder(n_layers=4, n_heads=4, d_model=128, context_length=64, unroll=4),
    train=Train(steps=2000, steps_per_call=10, eval_every=500, save_every=500),
)
