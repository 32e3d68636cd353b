"""The transformer of 2017 (arXiv:1706.03762), its base model: 6 + 6 layers, 512 wide, post-norm, sinusoids.

Give it a table of yours, with a sentence and its translation in each row ($FOLDER/*.tsv, .csv or .jsonl):

    jaxformer train transformer_2017 --data.corpus=Table --data.corpus.path=FOLDER \\
        --data.corpus.text=COLUMN --data.corpus.target=COLUMN

63,045,632 parameters.
"""

from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.tasks import Translation
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import InverseSquareRoot
from jaxformer.model.blocks import PostNorm
from jaxformer.model.layers import MLP, ReLU, XavierUniform
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Sinusoidal

config = Config(
    directory="runs/transformer_2017",
    data=Data(
        corpus=Translation(examples=100_000),
        valid_fraction=0.01,
        tokenizer=BPE(37_000),
        sampling=Examples(n_buckets=8),
        batch_size=800,
    ),
    model=EncoderDecoder(
        n_layers=6,
        n_heads=8,
        d_model=512,
        d_ff=2048,
        context_length=256,
        dropout=0.1,
        embedding=Embedding(scaled=True),
        position=Sinusoidal(),
        feed_forward=MLP(ReLU(), bias=True),
        residual=PostNorm(),
        initializer=XavierUniform(std=512**-0.5),
    ),
    objective=SequenceToSequence(label_smoothing=0.1),
    optimizer=AdamW(
        InverseSquareRoot(peak=(512 * 4000) ** -0.5, warmup_steps=4000), b2=0.98, eps=1e-9, weight_decay=0.0, clip=None
    ),
    train=Train(steps=100_000, accumulation=8, steps_per_call=5, eval_every=1000, save_every=1000),
)
