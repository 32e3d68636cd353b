"""s"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import LayerNorm

config = Config(
    directory="runs/shakespeare_cpu",
    data=Data(corpus=TinyShakespeare(), tokenizer=Characters(), batch_size=12),
    model=Decoder(n_layers=4, n_heads=4, d_model=128, context_length=64, norm=LayerNorm(bias=False), unroll=4),
    optimizer=AdamW(learning_rate=WarmupCosine(1e-3, 1e-4, 100), b2=0.99, weight_decay=0.1, clip=1.0),
    train=Train(steps=2000, steps_per_call=10, eval_every=500, save_every=500),
)
