"""What is measured: sizes of models, prompts, and the work that a step cannot do without. Imports no library."""

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer, and the batch that it is trained on.

    Every contestant builds it alike: norms before the branches, tables of positions, GELU (tanh), no biases, the head
    tied to the embedding. What `transformers` cannot leave out it keeps: biases and, of BERT, norms behind the sums,
    token types and a pooler.
    """

    layers: int
    heads: int
    width: int
    context: int  # rows of the table of positions
    vocabulary: int
    batch: int = 1  # rows in a batch
    tokens: int = 1  # in each of them
    causal: bool = True  # False: an encoder that classifies texts of 5 to `tokens` tokens, with ReLU and biases
    dropout: float = 0.0  # of the embedding, of attention's weights, and of each branch
    config: str = "shakespeare_cpu"  # of jaxformer, on which the sizes are put

    @property
    def params(self) -> int:
        """How many there are, gains of norms included."""
        inside = self.layers * (12 * self.width**2 + 2 * self.width) + self.width
        return (self.vocabulary + self.context) * self.width + inside

    @property
    def weights(self) -> int:
        """Numbers in the matrices that each token is multiplied by."""
        head = self.vocabulary * self.width if self.causal else 0
        return self.layers * 12 * self.width**2 + head


SIZES = {
    "small": Size(4, 4, 128, 64, 65, batch=12, tokens=64),
    "10.7M": Size(6, 6, 384, 256, 65, batch=8, tokens=256),
    "124M": Size(12, 12, 768, 1024, 50257, batch=2, tokens=256),
    "encoder": Size(2, 8, 128, 100, 4096, batch=64, tokens=100, causal=False, dropout=0.3, config="disaster_tweets"),
    "small, 256": Size(4, 4, 128, 256, 65),
    "124M, 1024": Size(12, 12, 768, 1024, 50257, batch=16, tokens=1024),
}


def tiny(size: Size) -> Size:
    """The size with next to nothing in it, to see that a measurement runs."""
    small = {"layers": 1, "heads": 2, "width": 16, "context": 64, "vocabulary": 65}
    return dataclasses.replace(size, **small, batch=min(size.batch, 2), tokens=min(size.tokens, 16))


@dataclasses.dataclass(frozen=True)
class Texts:
    """How many texts are continued, from how many tokens, by how many."""

    batch: int
    prompt: int  # tokens in a prompt; if ragged, in the longest
    new: int  # tokens drawn for each text
    ragged: bool = False  # True: the shortest prompt has one token, the others lie evenly between

    def prompts(self, vocabulary: int) -> list[list[int]]:
        draw = random.Random(0)
        last = max(self.batch - 1, 1)
        lengths = [1 + i * (self.prompt - 1) // last if self.ragged else self.prompt for i in range(self.batch)]
        return [[draw.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


TOP_K = 20  # of decoding
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Work:
    """What must at least be done: it takes as long as the slower of the two at the machine's peaks."""

    flops: float  # multiplications and additions in matrix products
    bytes: float  # read from or written to memory


def work_of_step(size: Size) -> Work:
    """Of one training step: 6 operations per weight and token, and those of attention as if it saw every pair, as in
    arXiv:2204.02311, appendix B; parameters, gradients and both moments of Adam read, all but gradients written."""
    attention = 12 * size.layers * size.width * size.tokens
    return Work(size.batch * size.tokens * (6 * size.weights + attention), 7 * 4 * size.params)


def work_of_token(size: Size, texts: Texts, dtype: str) -> Work:
    """Of one more token for each text: weights and the cache are read once."""
    seen = sum(map(len, texts.prompts(2))) + texts.batch * texts.new / 2  # tokens, of all texts
    cache = 2 * size.layers * size.width * seen
    return Work(2 * texts.batch * size.weights + 2 * cache, BYTES[dtype] * (size.weights + cache))
