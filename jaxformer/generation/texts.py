"""What a sampler draws, as text: piece by piece, in whole characters, up to a stop text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxformer.data.tokenizers import Tokenizer
from jaxformer.generation.decode import Request, Sampler


class Generated(NamedTuple):
    """A text that a model has written, and how."""

    prompt: str
    text: str  # what follows the prompt; of an encoder–decoder the answer to it
    ids: list[int]  # of all tokens drawn: the end token, or those that hold the stop text, among them
    log_probabilities: list[float] | None  # natural, of the model itself before logits processors; None: not known
    finish_reason: str  # "end": the end token was drawn, "stop": a stop text, "length": as many tokens as asked for
    seed: int
    sample: int  # its number, from 0


class Writing:
    """One text as it is written. `text` only ever grows: by whole characters, and by nothing that may belong to a stop
    text. `finish_reason` is None until it has ended."""

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = (), ends: Sequence[int] = ()
    ) -> None:
        """`before` are the ids that it continues; `ends` those that end it besides the tokenizer's end."""
        self.text = ""
        self.ids: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish_reason: str | None = None
        self._tokenizer, self._stop, self._ends = tokenizer, stop, {tokenizer.end, *ends}
        self._shown, self._new = list(before), list[int]()  # the last ids whose text is out, and those behind them
        self._held = ""  # text that may belong to a stop text

    def add(self, token: int, log_probability: float | None = None) -> None:
        """One token more. What it says is decoded beside the tokens just before: spaces depend on them."""
        self.ids.append(token)
        if log_probability is not None:
            self.log_probabilities.append(log_probability)
        if token in self._ends:
            return self.finish("end")
        self._new.append(token)
        text = self._text_of_new()
        if text and not text.endswith("\ufffd"):  # bytes that are no UTF-8, or not yet
            self._shown, self._new = self._new, []
            self._show(text)

    def finish(self, reason: str) -> None:
        """Whatever was held back is text, too."""
        self._show(self._text_of_new())
        if self.finish_reason is None:
            self.text, self.finish_reason = self.text + self._held, reason

    def generated(self, prompt: str, seed: int, sample: int) -> Generated:
        known = self.log_probabilities if len(self.log_probabilities) == len(self.ids) else None
        return Generated(prompt, self.text, self.ids, known, self.finish_reason or "length", seed, sample)

    def _text_of_new(self) -> str:
        known, text = (self._tokenizer.decode(ids) for ids in (self._shown, self._shown + self._new))
        if text.startswith(known):
            return text.removeprefix(known)
        return self._tokenizer.decode(self._new)  # bytes that are no UTF-8 may have changed what stood before them

    def _show(self, text: str) -> None:
        text = self._held + text
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.text, self.finish_reason = self.text + text[: min(found)], "stop"
            return
        ends = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(ends, default=0)
        self.text, self._held = self.text + text[:cut], text[cut:]


def write(sampler: Sampler, request: Request, writings: Sequence[Writing]) -> Iterator[None]:
    """Draws a request until its first texts, which are written here, have ended; comes back between stretches."""
    for drawn in sampler(request):
        ids, known = drawn.ids.tolist(), drawn.log_probabilities
        chances = [[None] * len(row) for row in ids] if known is None else known.tolist()
        for i, writing in enumerate(writings):
            for token, chance in zip(ids[i], chances[i], strict=True):
                if writing.finish_reason is None:
                    writing.add(token, chance)
        if all(writing.finish_reason for writing in writings):
            return
        yield
    for writing in writings:
        if writing.finish_reason is None:
            writing.finish("length")
