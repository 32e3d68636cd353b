"""A run opened for use: sample from it, evaluate it, look inside. Opening executes nothing that the run holds."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer import platform
from jaxformer.config import Config
from jaxformer.data.corpora import Corpus, NoCorpus, Piece, TextFiles
from jaxformer.data.datasets import check_known, encode, fingerprints
from jaxformer.data.files import located
from jaxformer.data.sources import Source, check_ids
from jaxformer.data.tables import asked_in
from jaxformer.data.tokenizers import Tokenizer, read_tokenizer
from jaxformer.generation.decode import TOGETHER, LeftToRight, Processors, Request, Sampler, row_keys
from jaxformer.generation.logits_processors import usual_processors
from jaxformer.generation.predict import predict
from jaxformer.generation.texts import Generated, Writing, write
from jaxformer.model.heads import Classes
from jaxformer.model.implementations import Asked, Auto, Implementation
from jaxformer.model.models import Model
from jaxformer.overrides import override
from jaxformer.pictures import loss_curve
from jaxformer.run import inspection
from jaxformer.run.attention import Attention, attention, cross_attention
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.directory import read_classes, read_ends, read_imported, verify_data
from jaxformer.run.manifest import sha256
from jaxformer.run.metrics import read_rows, rows_of
from jaxformer.run.plan import Judged, abstract_state, evaluate, prepare_data, recipe_of, tell_cut
from jaxformer.run.step import Recipe, TrainState
from jaxformer.spec import InputError, changed, checked, counted, naming, within

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A config with its tokenizer and a state: sample from it, evaluate it, ask what it predicts, look inside."""

    config: Config
    tokenizer: Tokenizer
    state: TrainState
    classes: Classes = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        step, steps = int(self.state.step), self.config.train.steps
        count = sum(array.size for array in jax.tree.leaves((self.state.params, self.state.base)))
        rows = [row for row in read_rows(rows_of(self.config), step)[0] if row["step"] == step]
        losses = [row["loss"] for row in rows if row.get("split") in ("valid", "valid_full") and row.get("loss")]
        loss = f", validation loss {losses[-1]:.4f}" if losses else ""
        what = f"{type(self.model).__name__}, {count:,} parameters"
        return f"<Run {self.config.directory}: {what}, step {step:,} of {steps:,}{loss}>"

    @functools.cached_property
    def recipe(self) -> Recipe:
        return recipe_of(self.config, self.tokenizer, self.classes)

    @property
    def model(self) -> Model:
        return self.recipe.model

    @functools.cached_property
    def eval_params(self) -> Any:
        """What it is evaluated and sampled with: an average, or what its optimizer and its adapter make of its
        parameters."""
        return self.state.eval_params(self.recipe, self.config.optimizer)

    @property
    def sampler(self) -> Sampler:
        return self.config.sampler or LeftToRight()

    @property
    def writes(self) -> bool:
        """Whether it writes text: a sampler of its own may know how where no token is predicted from those before."""
        return self.config.sampler is not None or self.model.writes

    def sample(self, prompt: str | None = None, tokens: int = 200, seed: int = 0, **how: Any) -> str:
        """The first of `samples`."""
        return self.samples(prompt, tokens, 1, seed, **how)[0]

    def samples(
        self, prompt: str | None = None, tokens: int = 200, samples: int = 1, seed: int = 0, **how: Any
    ) -> list[str]:
        """Prompt and text of each that `generate` gives with the same arguments; of an encoder–decoder the text."""
        return [self._head(prompt) + found.text for found in self.generate(prompt, tokens, samples, seed, **how)]

    @functools.cached_property
    def imported(self) -> dict[str, Any]:
        """What it was made of, if it was imported."""
        return read_imported(Path(self.config.directory))

    @property
    def ends(self) -> Sequence[int]:
        """The ids that end a text besides the tokenizer's end: those that an imported model names, it or the one that
        it was trained from."""
        return self.imported.get("eos_token_id") or read_ends(Path(self.config.directory))

    def generate(
        self,
        prompt: str | None = None,
        tokens: int = 200,
        samples: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        processors: Processors = (),
        between: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> list[Generated]:
        """Texts that continue the prompt, with their ids and log-probabilities; without a prompt, what follows the
        tokenizer's start token.

        A text ends before `tokens` are drawn if the tokenizer's end token comes, or one of `ends`, or before the first
        of the texts `stop`. `how` is that of `usual_processors`, which act after `processors`. Sample i is the same,
        bit for bit, whatever the number of `samples`. `between` is called every so often; what it raises ends the
        drawing. Raises InputError for a character of the prompt that the tokenizer does not know, and for numbers out
        of their range.
        """
        if samples < 1:
            raise InputError(f"samples={samples} must be at least 1")
        request, before, stop = self._asked(prompt, tokens, seed, stop, processors, how)
        found = list[Generated]()
        for first in range(0, samples, TOGETHER):
            writings = [Writing(self.tokenizer, before, stop, self.ends) for _ in range(min(TOGETHER, samples - first))]
            for _ in write(self.sampler, request._replace(keys=row_keys(seed, first, TOGETHER)), writings):
                between()
            found += [writing.generated(prompt or "", seed, first + i) for i, writing in enumerate(writings)]
        return found

    def stream(
        self,
        prompt: str | None = None,
        tokens: int = 200,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        processors: Processors = (),
        between: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> Iterator[str]:
        """What `sample` gives with the same arguments, in pieces, each as soon as it is written."""
        request, before, stop = self._asked(prompt, tokens, seed, stop, processors, how)

        def pieces() -> Iterator[str]:
            yield self._head(prompt)
            writing, told = Writing(self.tokenizer, before, stop, self.ends), 0
            for _ in write(self.sampler, request._replace(stretch=1), [writing]):
                between()
                yield writing.text[told:]
                told = len(writing.text)
            yield writing.text[told:]

        return filter(None, pieces())

    def _head(self, prompt: str | None) -> str:
        """How texts begin: an answer does not repeat what was asked."""
        return "" if self.model.encodes else prompt or ""

    def _asked(
        self,
        prompt: str | None,
        tokens: int,
        seed: int,
        stop: str | Sequence[str],
        processors: Processors,
        how: Mapping[str, Any],
    ) -> tuple[Request, list[int], tuple[str, ...]]:
        """What is asked of the sampler for the first samples; the ids that stand before what is written; and the stop
        texts."""
        if tokens < 0:
            raise InputError(f"tokens={tokens} must be at least 0")
        stop = checked_ends(seed, stop)
        processors = (*map(checked, processors), *usual_processors(**how))
        with naming("prompt"):
            ids = self.tokenizer.encode(prompt or "").tolist()
        if not self.writes:
            raise InputError(
                f"{self.config.directory}: its model writes no text; use predict, which says what it makes of one"
            )
        start = [*self.tokenizer.prefix, *ids] if ids else [self.tokenizer.start]
        source = None
        if self.model.encodes:
            source, start, ids = self.tokenizer.document(prompt or ""), [self.tokenizer.start], []
        elif ids and self.joins:  # the prompt is a first text, which the second follows
            start = self.tokenizer.document(prompt or "")
        self._tell_cut([source or start])
        sources = None if source is None else [source] * TOGETHER
        first = len(self.tokenizer.prefix)
        frame = [not first <= i < first + len(ids) for i in range(len(start))]
        request = self.request([start] * TOGETHER, tokens, seed, processors, sources)
        return request._replace(frames=[frame] * TOGETHER), ids, stop

    def request(
        self,
        starts: Sequence[Sequence[int]],
        tokens: int,
        seed: int,
        processors: Processors,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Request:
        """What is asked of the sampler: texts that continue these ids."""
        params, _ = prepared = self._prepared
        keys = row_keys(seed, 0, len(starts))
        context, end = self.config.window, self.tokenizer.end  # longer texts were never seen in training
        asked = self.recipe.objective, self.model, params, starts, tokens, keys, processors, context, end, sources
        return Request(*asked, second=self.joins, prepared=prepared)

    @functools.cached_property
    def _prepared(self) -> tuple[Any, Any]:
        """The parameters, off a CPU in the dtype of the computation, and what the sampler makes of them, kept from the
        first text that is written on."""
        params = self.eval_params
        if self.recipe.compute_dtype != "float32" and jax.default_backend() != "cpu":  # halves are slower on a CPU
            params = jax.jit(self.recipe.cast)(params)
        return params, self.sampler.prepared(self.model, params)

    def _tell_cut(self, texts: Sequence[Sequence[int]]) -> None:
        """Says how many texts are longer than what the model reads of them."""
        if cut := sum(len(ids) > self.config.window for ids in texts):
            log.warning(
                "%d of %d texts are longer than data.window=%d, and are cut", cut, len(texts), self.config.window
            )

    @property
    def joins(self) -> bool:
        """Whether it was trained on two texts one behind the other."""
        return self.config.data.sampling.joined

    @property
    def _may_join(self) -> bool:
        """Whether it tells two texts apart, and nobody knows which it was trained on: it was imported."""
        return self.joins or (self.model.tells_parts and isinstance(self.config.data.corpus, NoCorpus))

    def _check_second(self, given: bool) -> None:
        """Raises InputError if it was trained on pairs of texts and no second one is given, or the reverse."""
        if given and not self._may_join:
            raise InputError(f"second: {self.config.directory} was trained on single texts: leave the second out")
        if self.joins and not given:
            raise InputError(f"second: {self.config.directory} was trained on pairs of texts: give a second one, too")

    def answers(
        self, texts: Sequence[str], tokens: int | None = None, between: Callable[[], None] = lambda: None
    ) -> list[str]:
        """What an encoder–decoder writes for each text, always the likeliest token, up to its end token."""
        tokenizer, greedy, found = self.tokenizer, usual_processors(temperature=0), list[str]()
        tokens = self.config.window if tokens is None else tokens
        for some in _batched(texts, self.config.slice_rows):
            sources = [tokenizer.document(text) for text in some]
            starts = [[tokenizer.start]] * len(some)
            writings = [Writing(tokenizer) for _ in some]
            for _ in write(self.sampler, self.request(starts, tokens, 0, greedy, sources), writings):
                between()
            found += [writing.text for writing in writings]
        return found

    def predict(
        self, texts: str | Sequence[str] | Corpus, seconds: str | Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """What the model says of each text, or pair of texts: "text" of an encoder–decoder; of each column the class
        and all probabilities; the "embedding". Of a corpus also where each example stands, as `predict_file`.

        Raises InputError for a model of another kind, and for text that the tokenizer does not know.
        """
        if isinstance(texts, Corpus):
            with naming(f"data.corpus={texts}"):
                return self._predicted([texts], not located(getattr(texts, "path", "")).is_file())
        texts = [texts] if isinstance(texts, str) else texts
        seconds = [seconds] if isinstance(seconds, str) else seconds
        self._check_second(seconds is not None)
        if seconds is not None and len(seconds) != len(texts):
            raise InputError(f"seconds: {len(seconds)} second texts must be as many as the {len(texts)} first ones")
        for text in [*texts, *(seconds or ())]:
            if not text.strip():
                raise InputError("text: must not be empty; give one")
        with naming("text"):
            if self.model.encodes:
                self._tell_cut([self.tokenizer.document(text) for text in texts])
                return [{"text": text} for text in self.answers(texts)]
            pairs = [self._pair(*pair) for pair in zip(texts, seconds or [None] * len(texts), strict=True)]
        self._tell_cut([ids for ids, _ in pairs])
        found: list[dict[str, Any]] = []
        for some in _batched(pairs, self.config.slice_rows):
            ids, places = zip(*some, strict=True)
            parts = None if seconds is None else places
            found += predict(self.model, self.eval_params, ids, parts, self.config.window)
        if not all(found):
            raise InputError(f"{self.config.directory}: its model has no head that classifies a text; use sample")
        return found

    def predict_file(self, path: str | Path) -> list[dict[str, Any]]:
        """`predict` for each example of a file, or of a folder's files, in order: {"line": where it begins, ...}; of a
        folder also "file".

        A table (.csv, .tsv, .jsonl, .ndjson, also .gz or .zst) is read by the fields of the run's own corpus, if that
        has files of this name, else as `Table` is by default; labels are not needed. Anything else has a text in each
        line that is not blank. Raises InputError for what cannot be read or answered.
        """
        with naming(f"file={str(path)!r}"):
            return self._predicted(asked_in(str(path), self.config.data.corpus), located(str(path)).is_dir())

    def _predicted(self, corpora: Sequence[Corpus], several: bool) -> list[dict[str, Any]]:
        pairs = self.joins or (self._may_join and all(corpus.texts > 1 for corpus in corpora))
        found = [texts for corpus in corpora for texts in corpus.asked(pairs).questions()]
        if not found:
            raise InputError("holds no text to be answered; give one that does")
        asked = [texts[: 1 + pairs] for texts in found]
        if pairs and min(map(len, asked)) < 2:
            raise InputError(
                f"{self.config.directory} was trained on pairs of texts; give a table of both, as "
                "data.corpus=Table data.corpus.path=FILE data.corpus.text=COLUMN data.corpus.target=COLUMN"
            )
        check_known((text for texts in asked for text in texts), self.tokenizer)
        seconds = [texts[1].text for texts in asked] if pairs else None
        rows = self.predict([texts[0].text for texts in asked], seconds)
        return [_place(texts[0], several) | row for texts, row in zip(asked, rows, strict=True)]

    def _pair(self, text: str, second: str | None) -> tuple[list[int], int]:
        """Ids of one text or two, and where the second begins."""
        first = self.tokenizer.document(text)
        rest = [] if second is None else self.tokenizer.document(second)[len(self.tokenizer.prefix) :]
        return first + rest, len(first)

    def show(self, source: Source, between: Callable[[], None] = lambda: None) -> str:
        """The first pair of texts, and what the model answers to the first of them."""
        first, second = (self.tokenizer.decode(ids) for ids in source.example(0))
        return f"{first} → {self.answers([first], self.config.train.sample_tokens, between)[0]} (right: {second})"

    def evaluate(self, what: str | Path | Corpus | Source | None = None) -> dict[str, Any]:
        """Loss in nats per token, each predicted once; perplexity; bits per byte; the number of tokens.

        Of the validation split of the run's corpus, which must be what it was; or of a file or folder, read as the
        run's own corpus is, by its fields; or of all of another corpus, or of its ids. "split" says of which.
        """
        if what is None:
            data = self.config.data
            verify_data(Path(self.config.directory), fingerprints(data.corpus, data.valid))
            prepared = prepare_data(self.config, self.tokenizer, self.classes)
            return self._evaluated(Judged.of(prepared), "valid" if data.valid_tokens is None else "valid_full")
        if isinstance(what, Source):
            return self._evaluated(Judged((what,), (1.0,), ("",)), "valid")
        if isinstance(what, Corpus):
            with naming(f"data.corpus={what}"):
                judged = self._judged(what)
            return self._evaluated(judged, getattr(what, "path", type(what).__name__))
        with naming(f"file={str(what)!r}"):
            judged = self._judged(self.config.data.corpus.at(str(what)))
        return self._evaluated(judged, str(what))

    def _evaluated(self, judged: Judged, split: str) -> dict[str, Any]:
        for source in judged.sources:
            check_ids(source.tokens, self.tokenizer.vocab_size)
            tell_cut(self.config, source, split)
        (found,) = evaluate(self.recipe, self.eval_params, judged, self.config, self.tokenizer)
        if math.isnan(found["loss"]) and not found.get("tokens", found.get("examples")):
            tokens = counted(count := sum(source.n_tokens for source in judged.sources), "token")
            if count < 2:
                raise InputError(f"{split}: {tokens} cannot be predicted from one another; give at least 2")
            kind = type(self.config.objective).__name__
            raise InputError(f"{split}: of {tokens} objective={kind} asks for none; give more text")
        perplexity = {"perplexity": math.exp(min(found["loss"], 700))} if "tokens" in found else {}
        return {"step": int(self.state.step), "split": split, "loss": found["loss"]} | perplexity | found

    def _judged(self, corpus: Corpus) -> Judged:
        """The ids of a corpus. Raises InputError if it has not what the run was trained on."""
        sampling, texts = self.config.data.sampling, self.config.data.corpus.texts
        if isinstance(self.config.data.corpus, NoCorpus) and "source" in self.config.objective.needs:
            texts = 2  # of an import
        if corpus.texts != texts:
            what = "single texts, and these are pairs" if texts == 1 else "pairs of texts, and these are single ones"
            remedy = "leave the target out" if texts == 1 else "give a corpus of pairs, as a Table with a target"
            raise InputError(f"{self.config.directory} was trained on {what}; {remedy}")
        if corpus.marked and not self.config.objective.weighs:
            kind = type(self.config.objective).__name__
            raise InputError(
                f"it says which tokens are answers, and objective={kind} does not read it; give plain text"
            )
        classes = {**self.model.classes, **self.classes} if sampling.examples else None
        sources = [encode(part, self.tokenizer, classes) for part, _ in corpus.parts()]
        if sampling.examples and not any(source.n_examples for source in sources):
            raise InputError("it holds no example; give one with rows")
        return Judged(tuple(sources), tuple(share for _, share in corpus.parts()), corpus.part_names())

    def corpus_of(self, overrides: Mapping[str, Any]) -> Corpus:
        """The run's corpus with fields replaced by their paths, as {"data.corpus": "JSONLines", "data.corpus.path": F}.

        A path without a class is read as the run's own corpus is. Raises InputError for fields of anything else.
        """
        config, rest = self.config, dict(overrides)
        if "data.corpus" not in rest and "data.corpus.path" in rest:
            there = config.data.corpus.at(str(rest["data.corpus.path"]))
            names = {path.split(".")[2] for path in rest if path.startswith("data.corpus.")}
            if names <= {field.name for field in dataclasses.fields(there)}:  # else they are of the run's own corpus
                config = override(config, "data.corpus", there)
        config = config_lib.overridden(config, rest)
        for path, value in rest.items():
            if not within(path, {"data.corpus"}):
                raise InputError(f"{path}={value} is as it was in training; only data.corpus may differ: leave it out")
        return checked(config.data.corpus, "data.corpus.")

    def attention(self, text: str, second: str | None = None) -> Attention:
        """How much each token looks at each other, by layer and head; `.plot()` draws it.

        A run on joined pairs is given both texts. An encoder–decoder reads the text with its encoder; given a second
        one, what its tokens look at in the first. Raises InputError for a model that records no weights.
        """
        if not self.model.encodes:
            self._check_second(second is not None)
        tokenizer, window, rows = self.tokenizer, self.config.window, None
        with naming("text"):
            if self.model.encodes:
                ids, start = tokenizer.document(text), None
                rows = None if second is None else tokenizer.document(second)
            else:
                ids, start = self._pair(text, second)
            if not ids:
                raise InputError("must not be empty; give one")
        self._tell_cut([ids] if rows is None else [ids, rows])
        ids, how = ids[:window], (self.model, self.eval_params)
        with naming(self.config.directory):
            if rows is None:
                alone = len(ids) if self.config.objective.second else None  # a prefix, as where texts begin
                weights, layers = attention(*how, ids, alone if second is None else start, window)
            else:
                weights, layers = cross_attention(*how, ids, rows[:window], window)
        return Attention(self._tokens(ids if rows is None else rows[:window]), self._tokens(ids), weights, layers)

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, or the name of one that stands for none."""
        named = {i: f"<{name}>" for name, own in self.tokenizer.special.items() for i in own}
        return [self.tokenizer.decode([i]) or named.get(i, f"<{i}>") for i in ids]

    def plot(self) -> Any:
        """A Matplotlib figure of the run's losses by step, of training and of validation."""
        rows, _ = read_rows(rows_of(self.config))
        if not rows:
            raise InputError(f"{self.config.directory}: there are no rows in metrics.jsonl to plot; train first")
        return loss_curve(rows, self.config.directory)

    def inspect(self) -> dict[str, Any]:
        """What is in the run, as JSON values."""
        hashes = {"params_sha256": sha256(self.state.params), "state_sha256": sha256(self.state)}
        return {"step": int(self.state.step), **inspection.describe(self.config, self.recipe), **hashes}


def _place(piece: Piece, several: bool) -> dict[str, Any]:
    """Where an example begins: the line, and of several files which one."""
    unit, number = piece.record or ("line", piece.line)
    return ({"file": piece.path} if several and piece.path else {}) | {unit: number}


def checked_ends(seed: int, stop: str | Sequence[str]) -> tuple[str, ...]:
    """The texts before which what is written ends. Raises InputError for an empty one, and for a seed that is none."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} must be at least 0 and less than 2**32")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise InputError("stop='' must not be empty; give the text before which to end")
    return stop


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def read_prompt(path: str) -> str:
    """The whole text of a file."""
    if not located(path).is_file():
        raise InputError(f"prompt_file={path!r} is no file; give the path of a UTF-8 text")
    return "".join(TextFiles(path).documents())


def open_run(directory: str | Path, step: int | str | None = None) -> Run:
    """The run of a directory, at its newest checkpoint of finite numbers, at a step, or at its "best"
    (`train.best_by`)."""
    platform.prepare()
    directory = located(str(directory))
    if not (directory / "config.json").is_file():
        runs = sorted(
            (str(path.parent) for path in directory.glob("*/config.json")), key=lambda name: (len(name), name)
        )
        more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
        remedy = f"give one of {', '.join(runs[:10])}{more}" if runs else "give the directory of a run"
        raise InputError(f"{str(directory)!r} holds no run (no config.json); {remedy}")
    config = _here(dataclasses.replace(config_lib.read(directory / "config.json"), directory=str(directory)))
    tokenizer = read_tokenizer(directory / "tokenizer.json")
    classes = read_classes(directory)
    abstract = abstract_state(config, recipe_of(config, tokenizer, classes))
    state = Checkpoints(directory / "checkpoints").chosen(abstract, step, finite)
    return Run(config, tokenizer, state, classes)


EASY = Asked(64, dtype="bfloat16", whole=True)  # what any implementation can do


def _here(config: Config) -> Config:
    """With `Auto` in place of implementations that this machine has not, which is told: they compute the same."""

    reasons: dict[str, str] = {}

    def lacks(spec: Any) -> bool:
        own = getattr(spec, "implementation", None)
        reason = own.refuses(EASY) if isinstance(own, Implementation) else None
        reasons.update({type(own).__name__: reason} if reason else {})
        return reason is not None

    model = changed(config.model, lambda spec: {"implementation": Auto()} if lacks(spec) else {})
    for name, reason in reasons.items():
        log.warning("implementation=%s of attention: %s; Auto takes its place", name, reason)
    return dataclasses.replace(config, model=model)


def finite(state: TrainState) -> bool:
    return all(bool(np.isfinite(np.asarray(a, np.float32)).all()) for a in jax.tree.leaves(state.ema or state.params))
