"""Chat templates: a dialogue as one text, as pieces of which those that are answers are known."""

import atexit
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxformer.data.corpora import Piece
from jaxformer.data.definitions import any_of
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.spec import InputError, counted

Message = Mapping[str, str]  # "role": system, user, assistant or what else a template knows; "content"
SECONDS = 10.0  # that a template may take for one text
ANSWERS = "assistant"  # the role whose messages are learned
RENDERING = Path(__file__).with_name("rendering.py")  # with -P no file of the user's passes for a module of it
# For tokenizers without a template of their own: "User: …", "Assistant: …", each line ended by the end token, if any.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}{{ eos_token or '\\n' }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Ends(NamedTuple):
    """Where an answer ends: at one of the ids, or before one of the texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template, Jinja2 as in tokenizer_config.json, and the special tokens that it writes."""

    source: str
    tokens: tuple[tuple[str, int], ...] = ()  # name and id of each special token
    start: str = ""  # the name of the one that begins texts
    end: str = ""  # the name of the one that ends them
    added: tuple[tuple[str, int], ...] = ()  # name and id of each other token that is found in text by its name

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> "Template":
        """The given one, or the tokenizer's own, or the plain one."""
        named = tokenizer.special_tokens
        name = {i: name for name, i in named.items()}
        start, end = (name.get(-1 if i is None else i, "") for i in (tokenizer.start, tokenizer.end))
        source, added = source or tokenizer.chat_template or PLAIN, tuple(tokenizer.added_tokens.items())
        return cls(source, tuple(named.items()), start, end, added)

    def dialogue(self, messages: Sequence[Message]) -> list[Piece]:
        """All of a dialogue; pieces are predicted where they belong to an answer.

        An answer is what the template writes for a message of the assistant behind the prompt for it. Raises InputError
        if messages are none that it can write.
        """
        self.check(messages)
        text, cuts = self._rendered(messages), [0]
        for i, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            prompt = self._rendered(messages[:i], True)
            through = self._rendered(messages[: i + 1])
            if not (through.startswith(prompt) and text.startswith(through)):
                raise InputError(
                    f"the chat template writes message {i + 1} in another way once it has been answered, so that it "
                    "cannot be told what is an answer; give another template as data.corpus.template"
                )
            cuts += [len(prompt), len(through)]
        cuts.append(len(text))
        pieces = [
            piece
            for i, (first, last) in enumerate(itertools.pairwise(cuts))
            for piece in self._pieces(text, first, last, i % 2 == 1)
        ]
        return [*pieces[:-1], pieces[-1]._replace(ends=True)] if pieces else []

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """What stands before the next answer."""
        self.check(messages)
        text = self._rendered(messages, True)
        return self._pieces(text, 0, len(text), False)

    def check(self, messages: Sequence[Message]) -> None:
        """Raises InputError for what is no message, or has in it the text of a special token, or of what ends a turn,
        which it would become."""
        for i, message in enumerate(messages, 1):
            for name in ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(name), str):
                    raise InputError(f"message {i} must have a {name!r} that is a text")
            if found := next(filter(None, map(self._reserved.search, _texts(message))), None):
                raise InputError(f"message {i} holds {found[0]!r}, which would be a token of its own; take it out")

    @functools.cached_property
    def ends(self) -> Ends:
        """What the template writes behind an answer: its first special or added token or, without one, all of it."""
        asked: list[Message] = [{"role": "user", "content": "Question"}]
        prompt = self._rendered(asked, True)
        text = self._rendered([*asked, {"role": ANSWERS, "content": PROBE}]).removeprefix(prompt)
        behind = text.rpartition(PROBE)[2]
        known = dict(self.tokens + self.added)
        if found := any_of(known).search(behind):
            return Ends((known[found[0]],), ())
        return Ends((), (behind,) if behind else ())

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(dict(self.tokens))

    @functools.cached_property
    def _reserved(self) -> re.Pattern[str]:
        """What no message may hold."""
        ends = [name for name, i in self.added if i in self.ends.ids]
        return any_of([*dict(self.tokens), *ends])

    def _pieces(self, text: str, first: int, last: int, answer: bool) -> list[Piece]:
        """Of a stretch of the text: special tokens and what stands between them."""
        names = {name for name, _ in self.tokens}
        parts = re.split(f"({self._special.pattern})", text[first:last])
        starts = itertools.accumulate(map(len, parts), initial=first)
        return [
            Piece(part, False, answer=answer, special=part in names, whole=text, at=at)
            for part, at in zip(parts, starts, strict=False)
            if part
        ]

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        told = [{name: value for name, value in m.items() if value is not None} for m in messages]
        more = {"add_generation_prompt": add_generation_prompt, "bos_token": self.start, "eos_token": self.end}
        more |= {"tools": None, "documents": None}  # which some templates ask for
        return _RENDERER.render({"template": self.source, "messages": told, **more})


def _texts(value: Any) -> Iterator[str]:
    """All texts within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(each)


PROBE = "Answer"  # stands in for one


class _Renderer:
    """The process of `rendering`, started with the first text, and anew where a template had to be stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def render(self, asked: Mapping[str, Any]) -> str:
        with self._lock:
            answer = self._answer(json.dumps(asked).encode() + b"\n")
        if "error" in answer:
            raise InputError(f"the chat template cannot be rendered ({answer['error'][:300]}); give another one")
        return answer["text"]

    def _answer(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            command, pipe = [sys.executable, "-P", RENDERING], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # as Ctrl-C: the answer to come is that to no later question
            self.close()
            raise
        finally:
            in_time = late.is_alive()
            late.cancel()
        if not answer.endswith(b"\n"):
            self.close()
            return {
                "error": "its process ended" if in_time else f"it takes more than {counted(int(SECONDS), 'second')}"
            }
        return json.loads(answer)


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
