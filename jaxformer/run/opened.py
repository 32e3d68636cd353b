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
from jaxformer.data.datasets import Tokens, check_ids, full_pass, prepare, read_tokenizer
from jaxformer.data.tokenizers import Bytes
from jaxformer.generation.decode import generate
from jaxformer.generation.logits_processors import Temperature, TopK, TopP, Unchanged
from jaxformer.model.models import Decoder
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import Checkpoints, sha256
from jaxformer.run.directory import verify_data
from jaxformer.run.step import Hyper, Recipe, TrainState, evaluate_batch, init_state
from jaxformer.spec import InputError, checked, is_declared, to_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A config with its tokenizer and a state: all that sampling needs."""

    config: Config
    tokenizer: Bytes
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
    ) -> list[str]:
        """Texts that begin with the prompt; without one, what follows the tokenizer's start token.

        `temperature`, then `top_k`, then `top_p` act on the logits. Raises InputError for a character of the prompt
        that the tokenizer does not know, and for numbers out of their range.
        """
        for name, value, least in (("tokens", tokens, 0), ("samples", samples, 1)):
            if value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed} must be at least 0 and less than 2**32")
        processors: list[Unchanged] = [checked(Temperature(temperature))]
        processors += [] if top_k is None else [checked(TopK(top_k))]
        processors += [] if top_p is None else [checked(TopP(top_p))]
        try:
            ids = self.tokenizer.encode(prompt).tolist() if prompt else [self.tokenizer.start]
        except InputError as error:
            raise InputError(f"prompt: {error}") from None
        new = generate(
            *(self.model, self.state.params, [ids] * samples, tokens, tuple(processors), seed),
            context=self.config.window,  # longer texts were never seen in training
        )
        return [(prompt or "") + self.tokenizer.decode(row) for row in new]

    def evaluate(self, tokens: Tokens, split: str = "valid") -> dict[str, Any]:
        """Loss in nats per token over all tokens but the first, each predicted once; perplexity; bits per byte."""
        if len(tokens) < 2:
            raise InputError(f"{split}: {len(tokens)} tokens cannot be predicted from one another; give at least 2")
        check_ids(tokens, self.tokenizer.vocab_size)
        loss = evaluate(recipe_of(self.config, self.tokenizer), self.state.params, tokens, self.config)
        lengths = self.tokenizer.byte_lengths()
        n_tokens, n_bytes = len(tokens) - 1, int(np.bincount(tokens[1:], minlength=len(lengths)) @ lengths)
        return {
            "step": int(self.state.step),
            "split": split,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss * n_tokens / n_bytes / math.log(2),
            "tokens": n_tokens,
        }

    def evaluate_file(self, path: str) -> dict[str, Any]:
        """`evaluate` on the text of a file or folder."""
        documents = list(TextFiles(path).documents())
        try:
            ids = [self.tokenizer.encode(document) for document in documents]
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return self.evaluate(np.concatenate([*ids, np.empty(0, np.uint32)]), split=str(path))

    def evaluate_valid(self) -> dict[str, Any]:
        """`evaluate` on the validation split of the run's corpus, which must be what it was."""
        prepared = prepare(self.config.data.corpus, self.config.data.tokenizer)
        verify_data(Path(self.config.directory), prepared)
        return self.evaluate(prepared.split(self.config.data.valid_fraction)[1])

    def inspect(self) -> dict[str, Any]:
        """What is in the run, as JSON values."""
        hashes = {"params_sha256": sha256(self.state.params), "state_sha256": sha256(self.state)}
        return {"step": int(self.state.step), **describe(self.config, self.model), **hashes}


def describe(config: Config, model: Decoder) -> dict[str, Any]:
    """Number of parameters, config, and a row of the table for each group of parameters."""
    boxes = jax.tree_util.tree_flatten_with_path(model.declared(), is_leaf=is_declared)[0]
    table = [
        {
            "name": jax.tree_util.keystr(path, simple=True, separator="/"),
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
    tokenizer = config.data.tokenizer
    if tokenizer.vocab_size is None:
        tokenizer = prepare(config.data.corpus, tokenizer).tokenizer
    hashes = {"params_sha256": None, "state_sha256": None}
    return {"step": None, **describe(config, recipe_of(config, tokenizer).model), **hashes}


def recipe_of(config: Config, tokenizer: Bytes) -> Recipe:
    """The static part of the step; the vocabulary is the tokenizer's."""
    size = tokenizer.vocab_size
    if config.model.vocab_size not in (None, size):
        raise InputError(f"model.vocab_size={config.model.vocab_size} must be {size}, the tokenizer's; None takes that")
    model = dataclasses.replace(config.model, vocab_size=size)
    return Recipe(model, config.objective, config.train.compute_dtype, config.train.accumulation)


def hyper_of(config: Config) -> Hyper:
    return Hyper(np.uint32(config.train.seed), np.int32(config.train.steps), config.optimizer)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """Shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(recipe, hyper_of(config)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def evaluate(recipe: Recipe, params: Any, tokens: Tokens, config: Config) -> float:
    """Nats per token over a full pass."""
    total, last = np.zeros(2), np.zeros(2)
    for batch in full_pass(tokens, config.window, config.data.batch_size):
        sums = evaluate_batch(recipe, params, batch)
        total, last = total + np.asarray(last, np.float64), sums  # one call behind: two in flight
    nats, weight = total + np.asarray(last, np.float64)
    return float(nats / weight)


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
