"""The transformer of 2017 (arXiv:1706.03762), its base model: 6 + 6 layers, 512 wide, post-norm, sinusoids.

Give it a table of yours, .tsv, .csv or .jsonl, with a sentence and its translation in each row:

    jaxformer train transformer_2017 --data.corpus=Table --data.corpus.path=FILE \\
        --data.corpus.text=COLUMN --data.corpus.target=COLUMN

63,045,632 parameters, as `--dry_run` prints: a table of 37,000 rows for both languages and the head, 6 × 3,150,336 in
the encoder's layers, 6 × 4,199,936 in the decoder's, no biases in attention. The paper says 65 million (table 3) and
"about 37000" tokens, no more; 3,817 more rows of the table would make up the difference. Other than there, a batch is
800 pairs, whatever their length, not about 25,000 tokens a side; checkpoints are not averaged; answers are greedy.

The text that it begins with is made up, so that it starts anywhere. Five steps of 16 pairs, on 2 cores:

    jaxformer train transformer_2017 --data.batch_size=16 --train.accumulation=1 --train.steps=5 \\
        --train.steps_per_call=1 --train.log_every=1 --data.valid_tokens=2000 --directory=runs/five

go from 11.05 to 10.87 nats per token; the logarithm of the vocabulary is 10.52 (AMD EPYC, jax 0.10.1). A small one of
the same recipe learns that language: `jaxformer reproduce seq2seq`.
"""

from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.tasks import Translation
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import InverseSquareRoot
from jaxformer.model.layers import MLP, ReLU, XavierUniform
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Sinusoidal
from jaxformer.model.residuals import PostNorm

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
