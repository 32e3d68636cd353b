"""Names that are missing in short biographies, before the questions of `birth_places`.

    jaxformer train birth_places_pretrain

It reads $JAXFORMER_DATA/birth_places/wiki.txt: of each biography its title, the words before a name, and the name, for
the first two names (salient span masking, arXiv:2002.08909). It is validated on the text that it learns: what counts is
what it remembers of it. 1,443,200 parameters. Not measured yet on 2 cores; span corruption, with 4,622,272 parameters,
BPE(16384), 4,600 steps and 43 minutes (AMD EPYC, jax 0.10.1, other programs beside it), led to 4.2 % in `birth_places`.
"""

from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import MissingNames
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupLinear
from jaxformer.model.layers import RMSNorm
from jaxformer.model.positions import RelativeBias

config = Config(
    directory="runs/birth_places_pretrain",
    data=Data(
        corpus=MissingNames("$JAXFORMER_DATA/birth_places/wiki.txt"),
        valid=MissingNames("$JAXFORMER_DATA/birth_places/wiki.txt"),
        tokenizer=BPE(6144),
        sampling=Examples(n_buckets=2),
        batch_size=64,
    ),
    model=EncoderDecoder(
        n_layers=1,
        n_encoder_layers=2,
        n_heads=4,
        d_model=128,
        context_length=48,
        position=RelativeBias(),
        norm=RMSNorm(),
    ),
    objective=SequenceToSequence(),
    optimizer=AdamW(WarmupLinear(peak=3e-3, final=0.0, warmup_steps=200), weight_decay=0.01),
    train=Train(steps=5000, eval_every=500, save_every=500, log_every=50, sample_tokens=0),
)
