"""Llama 3.2, 1B: rotary positions, RMSNorm, gated SiLU, 32 query heads on 8 key/value heads.

Give it a corpus of yours:

    jaxformer train llama_1b --data.corpus=JSONLines --data.corpus.path=FOLDER

1,235,814,400 parameters, as published. Documents are packed and do not see each other. It was planned on 2 cores, and
trained on none:

    jaxformer train llama_1b --dry_run
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.batches import PackedDocuments
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import GatedFeedForward, Normal, RMSNorm, SiLU
from jaxformer.model.positions import Rotary

config = Config(
    directory="runs/llama_1b",
    data=Data(
        corpus=PythonTopics(),
        valid_fraction=0.005,
        tokenizer=BPE(128_256),
        sampling=PackedDocuments(),
        batch_size=128,
    ),
    model=Decoder(
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_model=2048,
        d_ff=8192,
        context_length=8192,
        position=Rotary(base=500_000.0),
        norm=RMSNorm(eps=1e-5),
        feed_forward=GatedFeedForward(SiLU()),
        initializer=Normal(std=0.02),
        remat="nothing_saveable",
    ),
    optimizer=AdamW(WarmupCosine(peak=3e-4, final=3e-5, warmup_steps=2000), b2=0.95, weight_decay=0.1, clip=1.0),
    train=Train(
        steps=100_000, accumulation=128, steps_per_call=1, eval_every=1000, save_every=1000, compute_dtype="bfloat16"
    ),
)
