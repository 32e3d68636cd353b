"""Dialogues, of which the answers are learned: corpora whose documents a chat template writes."""

import abc
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

from jaxformer.data.corpora import Corpus, Piece, TextFiles, json_lines
from jaxformer.data.tables import Table
from jaxformer.data.templates import ANSWERS, PLAIN, Message, Template
from jaxformer.data.tokenizers import END_OF_TEXT, Tokenizer
from jaxformer.spec import InputError


class Conversations(Corpus):
    """Messages that a chat template writes, each dialogue a document. Loss is on the answers, with what ends them.

    The template is that of the tokenizer, as a published model has one, or plain: "User: ...", "Assistant: ...".
    """

    template: str | None = dataclasses.field(default=None, kw_only=True)  # Jinja2; None: the tokenizer's, or plain
    system: str | None = dataclasses.field(default=None, kw_only=True)  # begins a dialogue without one; None: nothing

    marked = True
    framed = False

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.template is not None and "{" not in self.template:
            raise ValueError(f"{at}template={self.template!r} must be a template's text, in Jinja2, not its file")

    @abc.abstractmethod
    def dialogues(self) -> Iterator[tuple[list[Message], Piece]]:
        """The messages of each, and a piece without text that tells where it stands."""

    def documents(self) -> Iterator[str]:
        for pieces in self._written(UNKNOWN):
            yield "".join(piece.text for piece in pieces)

    def pieces(self) -> Iterator[Piece]:
        """As the plain template writes them, unless another is given."""
        return itertools.chain.from_iterable(self._written(UNKNOWN))

    def pieces_for(self, tokenizer: Tokenizer) -> Iterator[Piece]:
        return itertools.chain.from_iterable(self._written(Template.of(tokenizer)))

    def _written(self, template: Template) -> Iterator[list[Piece]]:
        if self.template is not None:
            template = dataclasses.replace(template, source=self.template)
        for messages, at in self.dialogues():
            try:
                template.check(messages)
                if all(message["role"] != ANSWERS for message in messages):
                    raise InputError(f"no message is of the role {ANSWERS!r}, which is learned")
                if self.system is not None and messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": self.system}, *messages]
                found = template.dialogue(messages)
            except InputError as error:
                raise InputError(f"{at.place()}: {error}") from None
            yield [piece._replace(record=at.record, path=at.path, line=at.line) for piece in found]


UNKNOWN = Template(PLAIN, ((END_OF_TEXT, 0),), END_OF_TEXT, END_OF_TEXT)  # before there is a tokenizer


def conversations_of(corpus: Corpus) -> Conversations | None:
    """Those that say how dialogues are written: the corpus, or of a mixture the first part that has any."""
    return next((part for part, _ in corpus.parts() if isinstance(part, Conversations)), None)


class Dialogues(Conversations, TextFiles):
    """Files of JSON lines, each a dialogue: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
    "content": "..."}, ...]}."""

    field: str = "messages"  # the key of the messages
    suffixes: tuple[str, ...] = dataclasses.field(default=(".jsonl", ".ndjson"), kw_only=True, repr=False)

    def dialogues(self) -> Iterator[tuple[list[Message], Piece]]:
        for path in self.files():
            for number, messages in json_lines(path, self.field, list, "a list of messages"):
                yield messages, Piece("", True, 1, ("line", number), str(path))


class Instructions(Conversations, Table):
    """Tables of questions and answers, each row a dialogue of the two: CSV, TSV or JSON lines, read as a `Table`."""

    text: str = "prompt"  # the column of the question
    target: str = "answer"  # the column of the answer  # pyright: ignore[reportIncompatibleVariableOverride]

    aligned = False

    @property
    def texts(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both are one document."""
        return 1

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.labels:
            raise ValueError(f"{at}labels={self.labels} must be (): answers are what is learned")

    def asked(self, pairs: bool) -> Table:
        return self.plain().asked(pairs)

    def dialogues(self) -> Iterator[tuple[list[Message], Piece]]:
        for path in self.files():
            for row in self._rows_of(path):
                question, answer = row.texts
                messages: list[Message] = [
                    {"role": "user", "content": question},
                    {"role": ANSWERS, "content": answer},
                ]
                yield messages, Piece("", True, 1, ("line", row.line), str(path))


class PythonQuestions(Conversations):
    """What do Python's own functions do? Answered by the first sentences of their help texts, in every CPython.

    A question is "What does len do?", of each function of the standard modules below; they differ between Python's
    versions.
    """

    turns: int = 2  # how many questions a dialogue has

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.turns < 1:
            raise ValueError(f"{at}turns={self.turns} must be at least 1")

    def dialogues(self) -> Iterator[tuple[list[Message], Piece]]:
        pairs = iter(self._answers().items())
        number = 0
        while some := list(itertools.islice(pairs, self.turns)):
            number += 1
            messages: list[Message] = [
                {"role": role, "content": text}
                for name, answer in some
                for role, text in (("user", f"What does {name} do?"), (ANSWERS, answer))
            ]
            yield messages, Piece("", True, 1, ("dialogue", number))

    def _answers(self) -> dict[str, str]:
        """Name of a function → the first sentence of its help text, in order."""
        import builtins
        import math
        import operator
        import os
        import shutil
        import statistics
        import string
        import textwrap

        owners: list[tuple[str, Any]] = [("", builtins), *((f"{kind.__name__}.", kind) for kind in KINDS)]
        owners += [(f"{m.__name__}.", m) for m in (math, operator, os, os.path, shutil, statistics, string, textwrap)]
        found: dict[str, str] = {}
        for prefix, owner in owners:
            for name in sorted(vars(owner)):
                value = getattr(owner, name)
                if name.startswith("_") or not callable(value) or inspect.isclass(value):
                    continue
                text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
                sentence = text.partition(". ")[0].rstrip(".") + "."
                if PROSE.fullmatch(sentence):
                    found[prefix.replace("posixpath", "os.path") + name] = sentence
        return found


KINDS = (str, bytes, list, dict, set, int, float)
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/\-]{12,150}\.")
