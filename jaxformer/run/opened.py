"""A run opened for use: sample from it, evaluate it, look inside. Opening executes nothing that the run holds."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.corpora import TextFiles
from jaxformer.data.datasets import Prepared, Source, check_ids, encode, fingerprints, fitted, prepare
from jaxformer.data.tokenizers import Tokenizer, read_tokenizer
from jaxformer.generation.decode import generate
from jaxformer.generation.logits_processors import MinP, Temperature, TopK, TopP, Unchanged
from jaxformer.model.models import Decoder
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import Checkpoints, sha256
from jaxformer.run.directory import verify_data
from jaxformer.run.step import Hyper, Recipe, TrainState, evaluate_batch, init_state
from jaxformer.spec import InputError, checked, is_declared, path_name, to_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A config with its tokenizer and a state: all that sampling needs."""

    config: Config
    tokenizer: Tokenizer
    state: TrainState

    @property
    def model(self) -> Decoder:
        return recipe_of(self.config, self.tokenizer).model

    def sample(self, prompt: str | None = None, tokens: int = 200, seed: int = 0, **how: Any) -> str:
        """The first of `samples`."""
        return self.samples(prompt, tokens, 1, seed, **how)[0]

    def samples(
        self,
        prompt: str | None = None,
        tokens: int = 200,
        samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> list[str]:
        """Texts that begin with the prompt; without one, what follows the tokenizer's start token.

        A text ends before `tokens` are drawn if the tokenizer's end token comes. `temperature`, `top_k`, `top_p` and
        `min_p` act on the logits in this order. Raises InputError for a character of the prompt that the tokenizer
        does not know, and for numbers out of their range.
        """
        for name, value, least in (("tokens", tokens, 0), ("samples", samples, 1)):
            if value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed} must be at least 0 and less than 2**32")
        processors: list[Unchanged] = [checked(Temperature(temperature))]
        processors += [] if top_k is None else [checked(TopK(top_k))]
        processors += [] if top_p is None else [checked(TopP(top_p))]
        processors += [] if min_p is None else [checked(MinP(min_p))]
        try:
            ids = self.tokenizer.encode(prompt or "").tolist()
        except InputError as error:
            raise InputError(f"prompt: {error}") from None
        new = generate(
            *(self.model, self.state.eval_params),
            [[*self.tokenizer.prefix, *ids] if ids else [self.tokenizer.start]] * samples,
            *(tokens, tuple(processors), seed),
            context=self.config.window,  # longer texts were never seen in training
            end=self.tokenizer.end,
        )
        head = self.tokenizer.decode(ids)
        texts = [self.tokenizer.decode([*ids, *_until(row, self.tokenizer.end)]) for row in new.tolist()]
        return [(prompt or "") + text.removeprefix(head) for text in texts]

    def evaluate(self, *sources: Source, split: str = "valid") -> dict[str, Any]:
        """Loss in nats per token, each predicted once; perplexity; bits per byte; the number of tokens."""
        for source in sources:
            check_ids(source.tokens, self.tokenizer.vocab_size)
        recipe = recipe_of(self.config, self.tokenizer)
        found = evaluate(recipe, self.state.eval_params, sources, self.config, self.tokenizer)
        if not found["tokens"]:
            count = sum(len(source.tokens) for source in sources)
            raise InputError(f"{split}: {count} tokens cannot be predicted from one another; give at least 2")
        perplexity = {"perplexity": math.exp(min(found["loss"], 700))}
        return {"step": int(self.state.step), "split": split, "loss": found["loss"]} | perplexity | found

    def evaluate_file(self, path: str) -> dict[str, Any]:
        """`evaluate` on the text of a file or folder."""
        try:
            source = encode(TextFiles(path), self.tokenizer)
        except InputError as error:
            raise InputError(f"file={path!r}: {error}") from None
        return self.evaluate(source, split=str(path))

    def evaluate_valid(self) -> dict[str, Any]:
        """`evaluate` on the validation split of the run's corpus, which must be what it was."""
        data = self.config.data
        verify_data(Path(self.config.directory), fingerprints(data.corpus, data.valid))
        return self.evaluate(*prepare_data(self.config, self.tokenizer).valid)

    def inspect(self) -> dict[str, Any]:
        """What is in the run, as JSON values."""
        hashes = {"params_sha256": sha256(self.state.params), "state_sha256": sha256(self.state)}
        return {"step": int(self.state.step), **describe(self.config, self.model), **hashes}


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def read_prompt(path: str) -> str:
    """The whole text of a file."""
    if not Path(path).is_file():
        raise InputError(f"prompt_file={path!r} is no file; give the path of a UTF-8 text")
    return "".join(TextFiles(path).documents())


def describe(config: Config, model: Decoder) -> dict[str, Any]:
    """Number of parameters, config, and a row of the table for each group of parameters."""
    boxes = jax.tree_util.tree_flatten_with_path(model.declared(), is_leaf=is_declared)[0]
    table = [
        {
            "name": path_name(path),
            "letters": box.letters,
            "shape": list(box.value.shape),
            "count": math.prod(box.value.shape),
            "decay": box.decay,
        }
        for path, box in boxes
    ]
    return {"n_params": sum(row["count"] for row in table), "config": to_json(config), "table": table}


def inspect_config(path: str) -> dict[str, Any]:
    """`Run.inspect` for a config file, without a state; reads the corpus only if its tokenizer learns from it."""
    config = config_lib.resolve(path)
    hashes = {"params_sha256": None, "state_sha256": None}
    return {"step": None, **describe(config, recipe_of(config, planned_tokenizer(config)).model), **hashes}


def planned_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer whose vocabulary has a size; reads the corpus only if the size depends on it."""
    tokenizer = config.data.tokenizer
    return fitted(tokenizer, config.data.corpus) if tokenizer.vocab_size is None else tokenizer


def prepare_data(config: Config, tokenizer: Tokenizer | None = None) -> Prepared:
    """The ids that a config asks for; `tokenizer` is a fitted one, where there is one already."""
    data = config.data
    return prepare(data.corpus, tokenizer or data.tokenizer, data.valid, data.valid_fraction)


def recipe_of(config: Config, tokenizer: Tokenizer) -> Recipe:
    """The static part of the step; the vocabulary is the tokenizer's."""
    size = tokenizer.vocab_size
    if config.model.vocab_size not in (None, size):
        raise InputError(f"model.vocab_size={config.model.vocab_size} must be {size}, the tokenizer's; None takes that")
    model = dataclasses.replace(config.model, vocab_size=size)
    train = config.train
    return Recipe(model, config.objective, train.compute_dtype, train.accumulation, train.grad_norms)


def hyper_of(config: Config) -> Hyper:
    train = config.train
    ema_decay = None if train.ema_decay is None else np.float32(train.ema_decay)
    return Hyper(np.uint32(train.seed), np.int32(train.steps), config.optimizer, ema_decay)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """Shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(recipe, hyper_of(config)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def evaluate(
    recipe: Recipe, params: Any, sources: Sequence[Source], config: Config, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Nats per token over a full pass of the sources; bits per byte, None if the tokenizer cannot tell; tokens."""
    lengths = tokenizer.byte_lengths()
    known = np.zeros(recipe.model.vocab_size or 0, np.float32) if lengths is None else lengths.astype(np.float32)
    total, last = np.zeros(3), np.zeros(3)
    for source in sources:
        for batch in config.data.sampling.full_pass(source, config.window, config.data.batch_size):
            sums = evaluate_batch(recipe, params, batch, known)
            total, last = total + np.asarray(last, np.float64), sums  # one call behind: two in flight
    nats, weight, n_bytes = total + np.asarray(last, np.float64)
    loss = float(nats / weight) if weight else math.nan
    bits = float(nats / n_bytes / np.log(2)) if n_bytes else None
    return {"loss": loss, "bits_per_byte": bits, "tokens": int(weight)}


def open_run(directory: str | Path, step: int | str | None = None) -> Run:
    """The run of a directory, at its newest checkpoint, at a step, or at its "best" by validation loss."""
    set_flags()
    check_numerics()
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{str(directory)!r} holds no run (no config.json); give a directory that train.py wrote")
    config = dataclasses.replace(config_lib.read(directory / "config.json"), directory=str(directory))
    tokenizer = read_tokenizer(directory / "tokenizer.json")
    abstract = abstract_state(config, recipe_of(config, tokenizer))
    if not (directory / "checkpoints").is_dir():
        raise InputError(f"{directory} holds no checkpoint yet; train it until it saves one")
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if step == "best":
        best = checkpoints.best()
        if best is None:
            raise InputError(f"step='best': no checkpoint of {directory} was evaluated; it has {_list(steps)}")
        step = best[0]
    if step is None:
        state = checkpoints.restore_newest(abstract, set_aside=False)
        if state is None:
            raise InputError(f"{directory} holds no checkpoint yet; train it until it saves one")
    elif isinstance(step, int) and step in steps:
        state = checkpoints.restore(abstract, step)
    else:
        raise InputError(f"step={step!r} must be one of the checkpoints of {directory}: {_list(steps)} or 'best'")
    return Run(config, tokenizer, state)


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
