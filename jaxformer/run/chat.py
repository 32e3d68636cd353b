"""A dialogue with a run."""

import logging
from collections.abc import Iterator
from typing import Any

from jaxformer.data.datasets import ids_of
from jaxformer.data.dialogues import conversations_of
from jaxformer.data.templates import ANSWERS, Message, Template
from jaxformer.generation.decode import TOGETHER, row_keys
from jaxformer.generation.logits_processors import usual_processors
from jaxformer.generation.texts import Writing, write
from jaxformer.run.opened import Run, checked_ends
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


class Chat:
    """What was said so far, `messages`, and the next answer.

    Dialogues are written as the run's corpus has them (of a mixture the first part that has any) or, if it has none, by
    the tokenizer's chat template, or the plain one. Where question, what was said before and an answer of `tokens`, but
    at most half of data.window, are longer than data.window, the oldest question is left out with its answer, and so
    on; a system message never is.
    """

    def __init__(self, run: Run, system: str | None = None, tokens: int = 200, seed: int = 0, **how: Any) -> None:
        if run.model.encodes or not run.writes:
            raise InputError(f"{run.config.directory}: its model is no decoder, which goes on with a dialogue")
        if tokens < 1:
            raise InputError(f"tokens={tokens} must be at least 1")
        own = conversations_of(run.config.data.corpus)
        system = own.system if own and system is None else system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._first = len(self.messages)  # of those that may be left out
        self._template = Template.of(run.tokenizer, own.template if own else None)
        self._run, self._seed, self._asked = run, seed, 0
        self._stop = checked_ends(seed, how.pop("stop", ()))
        self._processors = usual_processors(**how)
        self._tokens, self._room = tokens, min(tokens, run.config.window // 2)

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces, each as soon as it is written. Raises InputError for a question that is too long or
        that the tokenizer does not know; it is then as if it had not been asked."""
        said, tokenizer = [*self.messages, {"role": "user", "content": question}], self._run.tokenizer
        while True:
            parts = [(piece.special, ids_of(piece, tokenizer).tolist()) for piece in self._template.prompt(said)]
            ids, frame = [i for _, own in parts for i in own], [special for special, own in parts for _ in own]
            if len(ids) + self._room <= self._run.config.window:
                break
            if len(said) == self._first + 1:
                raise InputError(
                    f"the question takes {len(ids)} tokens, and leaves no {self._room} of "
                    f"data.window={self._run.config.window} to the answer; ask in fewer words"
                )
            log.info("the first question and its answer are left out: the context is full")
            said = said[: self._first] + said[self._first + 2 :]
        keys = row_keys(self._seed, self._asked * TOGETHER, TOGETHER)
        ends, self._asked = self._template.ends, self._asked + 1
        request = self._run.request([ids] * TOGETHER, self._tokens, self._seed, self._processors)
        request = request._replace(
            keys=keys, frames=[frame] * TOGETHER, stretch=1, end=next(iter(ends.ids), request.end)
        )
        writing, told = Writing(tokenizer, ids, (*self._stop, *ends.texts), (*ends.ids, *self._run.ends)), 0
        for _ in write(self._run.sampler, request, [writing]):
            text = writing.text.lstrip()
            yield text[told:]
            told = len(text)
        yield writing.text.lstrip()[told:]
        self.messages = [*said, {"role": ANSWERS, "content": writing.text.strip()}]
