"""The architectures that there are."""

from jaxformer.interop.architecture import Architecture
from jaxformer.interop.bert import Bert
from jaxformer.interop.gpt2 import GPT2
from jaxformer.interop.llama import Llama

ARCHITECTURES: tuple[Architecture, ...] = (GPT2(), Llama(), Bert())
