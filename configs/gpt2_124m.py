"""GPT-2, 124M: 12 layers, 768 wide, context 1024, with nanoGPT's optimizer settings.

Give it a corpus of yours:

    jaxformer train gpt2_124m --data.corpus=JSONLines --data.corpus.path=FOLDER

124,439,808 parameters, as published. The text that it begins with by default is Python's own help, so that it starts
anywhere. Its first 5 steps, with 4 rows a step instead of 480, on 2 cores:

    jaxformer train gpt2_124m --data.batch_size=4 --train.accumulation=1 --train.steps=5 \\
        --train.compute_dtype=float32 --train.log_every=1

take 96 seconds, its corpus prepared, and at most 7.6 GB of memory by `/usr/bin/time -v` (AMD EPYC, jax 0.10.1);
training loss 10.91, 10.07, 9.21, 9.09, 8.87, where the logarithm of the vocabulary is 10.82. (A warm-up of 2,000 steps
would fill such a run: it is shortened to a tenth of it, here to none.)
"""

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.batches import ShuffledWindows
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import BPE
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.layers import MLP

config = Config(
    directory="runs/gpt2_124m",
    data=Data(
        corpus=PythonTopics(),
        valid_fraction=0.005,
        tokenizer=BPE(50257),
        sampling=ShuffledWindows(),
        batch_size=480,
    ),
    model=Decoder(n_layers=12, n_heads=12, d_model=768, context_length=1024, feed_forward=MLP(bias=True), bias=True),
    optimizer=AdamW(WarmupCosine(peak=6e-4, final=6e-5, warmup_steps=2000), b2=0.95, weight_decay=0.1, clip=1.0),
    train=Train(
        steps=600_000, accumulation=40, steps_per_call=5, eval_every=1000, save_every=1000, compute_dtype="bfloat16"
    ),
)
