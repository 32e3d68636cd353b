"""What an architecture of other people's tells of itself: its options, and the names that its arrays have in files."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxformer.declarations import Declared, by_path
from jaxformer.learning.objectives import NextToken, Objective
from jaxformer.model.layers import GELU, Activation, ReLU, SiLU, SquaredReLU, Tanh
from jaxformer.model.models import Decoder
from jaxformer.spec import InputError

# The first name of each is the one that is written.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": GELU(),
    "gelu_pytorch_tanh": GELU(),
    "gelu": GELU(approximate=False),
    "relu": ReLU(),
    "relu2": SquaredReLU(),
    "silu": SiLU(),
    "swish": SiLU(),
    "tanh": Tanh(),
}
# Options of every architecture that change no number, or only how text is written.
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    *("initializer_range", "initializer_factor", "gradient_checkpointing", "return_dict", "output_attentions"),
    *("output_hidden_states", "task_specific_params", "problem_type", "id2label", "label2id", "pretraining_tp"),
    *("finetuning_task", "attn_implementation", "_attn_implementation", "n_ctx", "num_labels"),
}
LAYERS = 10_000  # at most


class Row(NamedTuple):
    """A parameter here and the tensor of a file that holds it. "*" stands for the number of a layer.

    Tensors are as PyTorch's Linear keeps them, outputs × inputs, unless `transposed` says otherwise.
    """

    path: str  # as "decoder/layers/*/attention/project/q"
    name: str  # as "model.layers.*.self_attn.q_proj.weight"
    transposed: bool = True  # of a matrix: the file has outputs × inputs; False: inputs × outputs
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n equal parts of the tensor's outputs


class Place(NamedTuple):
    """One layer's share of a parameter, and where it stands in a file."""

    row: Row
    path: str
    layer: int | None  # of the stacked parameter; None: it is not stacked
    box: Declared

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this share alone, as the file has it: [out, in], [in, out] or, of no matrix, [*N]."""
        sizes = self.box.sizes()
        count = lambda letters: math.prod(sizes[letter] for letter in letters)
        _, into, out = self.box.letters
        if into:
            return (count(out), count(into)) if self.row.transposed else (count(into), count(out))
        return (count(out),) if self.box.fan_in else tuple(sizes[letter] for letter in out)

    @property
    def axis(self) -> int:
        """Of the tensor, along which its parts lie."""
        return int(bool(self.box.letters.into) and not self.row.transposed)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the tensor with all of its parts."""
        return tuple(n * self.row.part[1] if i == self.axis else n for i, n in enumerate(self.shape))


class Options:
    """A config.json that is being read; what is wrong with it is collected, to be told at once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.read = set[str]()
        self.problems = list[str]()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, most: int = 2**31 - 1, least: int = 1) -> int:
        """A whole number, at least 1 or what is given."""
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= most:
            self.problems.append(f"{name}={_short(value)} must be a whole number from {least} to {most:,}")
            return least
        return value

    def layers(self, name: str, default: int | None = None) -> int:
        return self.count(name, default, LAYERS)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            self.problems.append(f"{name}={_short(value)} must be a number")
            return default
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.problems.append(f"{name}={_short(value)} must be true or false")
        return bool(value)

    def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            self.problems.append(f"{name}={_short(value)} must be one of {', '.join(choices)}")
            value = default
        return choices[value]

    def must(self, name: str, *values: Any) -> None:
        """The option, where it is set, must have one of these values: no other is supported."""
        if self.get(name, values[0]) not in values:
            told = " or ".join(map(_short, values))
            self.problems.append(f"{name}={_short(self.get(name))} is not supported, {told} is")

    def dropout(self, *names: str) -> float:
        """The rate that all of these have; 0 where they differ, as they matter in training alone."""
        rates = {self.number(name, 0.0) for name in names}
        rate = rates.pop() if len(rates) == 1 else 0.0
        return rate if 0 <= rate < 1 else 0.0

    def unknown(self) -> list[str]:
        """Options that are set and that nobody has asked for."""
        rest = self.values.keys() - self.read - HARMLESS
        return sorted(name for name in rest if self.values[name] not in (None, False, {}, []))


class Architecture(abc.ABC):
    """An architecture of other people's: its config.json to a model and back, and its table of names."""

    kinds: ClassVar[tuple[str, ...]]  # as config.json's model_type has it
    prefix: ClassVar[str]  # that names have in files of a whole model, and lack in those of its trunk
    ignored: ClassVar[tuple[str, ...]] = ()  # patterns of tensors that are no parameters
    tied: ClassVar[str | None] = None  # the output matrix, which a file may have though it is the embedding
    optional: ClassVar[tuple[str, ...]] = ()  # fields of a model that may be off: biases, which are written as zeros

    @abc.abstractmethod
    def model(self, options: Options, names: Sequence[str]) -> Decoder:
        """The model of a config.json; `names` are those of the file's tensors."""

    @abc.abstractmethod
    def options(self, model: Decoder, like: str | None = None) -> dict[str, Any]:
        """The config.json of a model, as near as this architecture comes to it; where several kinds have the same
        parts, of the kind `like`."""

    @abc.abstractmethod
    def rows(self, model: Decoder) -> list[Row]:
        """The table of names."""

    def lacks(self, model: Decoder) -> list[str]:
        """What of a model has no place here, though each of its parts has."""
        return []

    def objective(self, model: Decoder) -> Objective:
        """What it was trained for."""
        return NextToken()

    def older_tokenizer(self, folder: Path, about: Mapping[str, Any]) -> Any:
        """The tokenizer, of the library `tokenizers`, of a folder that has it in the files of before tokenizer.json;
        None if it has none. `about` is tokenizer_config.json."""

    def bare(self, model: Decoder) -> bool:
        """Whether its files have names without the prefix."""
        return False

    def renamed(self, name: str) -> str:
        """The name that a tensor has today."""
        return name

    def places(self, model: Decoder) -> dict[str, list[Place]]:
        """Tensor → the parameters that it holds, in the order of its parts; of all of the model's parameters."""
        boxes, found = by_path(model.declared()), dict[str, list[Place]]()
        (stack,) = model.stacks
        blocks, left = len(model.kinds(stack)), set(boxes)
        for row in self.rows(model):
            for layer in range(model.n_layers) if "*" in row.name else (None,):
                path = row.path if layer is None else row.path.replace("*", f"block{layer % blocks}")
                name = row.name if layer is None else row.name.replace("*", str(layer))
                place = Place(row, path, None if layer is None else layer // blocks, boxes[path])
                found.setdefault(name, []).append(place)
                left.discard(path)
        if left:
            raise InputError(f"{', '.join(sorted(left))} have no name in a file of {self.kinds[0]}; leave them out")
        return found


def explicit(model: Decoder) -> Decoder:
    """The model with the widths that it leaves to others, so that equal models are equal specs."""
    widths = model.widths
    return dataclasses.replace(
        model,
        n_kv_heads=widths["G"],
        head_width=widths["K"],
        d_ff=widths["F"],
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
    )


def activation_name(feed_forward: Any, default: str) -> str:
    """That of its activation; without one, or with one that has no name, the architecture's own."""
    own = getattr(feed_forward, "activation", None)
    return next((name for name, known in ACTIVATIONS.items() if known == own), default)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
