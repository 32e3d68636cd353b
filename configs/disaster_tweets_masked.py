"""Masked-language pretraining of the encoder of `disaster_tweets`, on the same tweets without their classes.

    jaxformer train disaster_tweets_masked
    jaxformer train disaster_tweets --init_from=runs/disaster_tweets_masked

It reads $JAXFORMER_DATA/disaster_tweets.csv, without the fifth that `disaster_tweets` puts aside. 941,952 parameters.
After 600 steps 11 % of the masked tokens are right, after 49 s of training on 2 cores (AMD EPYC, family 26).
What it adds to the accuracy: -0.005 ± 0.024 (standard deviation over 3 splits; `jaxformer reproduce encoder`).
"""

from jaxformer import Config, Data, Encoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.tables import Fold
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.objectives import Masked
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupLinear
from jaxformer.model.heads import MaskedLanguageHead
from jaxformer.model.layers import MLP, ReLU, XavierUniform
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Sinusoidal

config = Config(
    directory="runs/disaster_tweets_masked",
    data=Data(
        corpus=Fold("$JAXFORMER_DATA/disaster_tweets.csv"),
        valid_fraction=0.05,
        tokenizer=BPE(4096, mask_token=True, lowercase=True, drop=r"https?://\S+|@\w+|&\w+;"),
        sampling=Examples(n_buckets=4),
        batch_size=64,
        window=100,
    ),
    model=Encoder(
        d_model=128,
        context_length=100,
        n_layers=2,
        n_heads=8,
        dropout=0.1,
        position=Sinusoidal(),
        feed_forward=MLP(ReLU(), bias=True),
        bias=True,
        embedding=Embedding(scaled=True),
        head=MaskedLanguageHead(),
        initializer=XavierUniform(std=0.09),
    ),
    objective=Masked(),
    optimizer=AdamW(WarmupLinear(peak=2e-3, final=0.0, warmup_steps=100), weight_decay=0.01),
    train=Train(steps=600, eval_every=600, save_every=600, log_every=100),
)
