"""Where was somebody born? Questions about the people of the biographies, answered by an encoder–decoder.

    jaxformer train birth_places --init_from=runs/birth_places_pretrain
    jaxformer train birth_places --directory=runs/birth_places_scratch

It reads $JAXFORMER_DATA/birth_places/{train,dev}.tsv, and the tokenizer of `birth_places_pretrain`.
4,622,272 parameters. Exact answers to the 500 questions of dev.tsv, best of ten evaluations: pretrained 4.2 %, from
scratch 2.2 %; always "London" would be 5.0 %. 4 minutes each on 2 cores (AMD EPYC, jax 0.10.1). So the pretraining is
far too short to remember who was born where: asked for a missing place amid the rest of a line, it does not name it.
(With the spans of then: see `birth_places_pretrain`.)
"""

from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import TokenizerFile
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupLinear
from jaxformer.model.layers import RMSNorm
from jaxformer.model.positions import RelativeBias

config = Config(
    directory="runs/birth_places",
    data=Data(
        corpus=Table("$JAXFORMER_DATA/birth_places/train.tsv", "question", "answer", columns=("question", "answer")),
        valid=Table("$JAXFORMER_DATA/birth_places/dev.tsv", "question", "answer", columns=("question", "answer")),
        tokenizer=TokenizerFile("runs/birth_places_pretrain/tokenizer.json"),
        sampling=Examples(),
        batch_size=64,
    ),
    model=EncoderDecoder(
        n_layers=1,
        n_encoder_layers=2,
        n_heads=4,
        d_model=192,
        context_length=64,
        position=RelativeBias(),
        norm=RMSNorm(),
    ),
    objective=SequenceToSequence(),
    optimizer=AdamW(WarmupLinear(peak=5e-4, final=0.0, warmup_steps=50), weight_decay=0.01),
    train=Train(steps=600, eval_every=60, save_every=60, best_by="exact"),
)
