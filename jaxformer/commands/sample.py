"""jaxformer sample."""

import sys
from typing import TYPE_CHECKING, Any

from jaxformer.commands.arguments import print_row, step_of

if TYPE_CHECKING:
    from jaxformer.run.opened import Run


def sample(
    run: str,
    prompt: str | None = None,
    tokens: int = 200,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    step: str | None = None,
    prompt_file: str | None = None,
    stream: bool = False,
    json: bool = False,
    chat: bool = False,
    system: str | None = None,
) -> None:
    """Prints texts that a trained run writes.

    Args:
        run: The run's directory.
        prompt: How each text begins; by default it is what follows the tokenizer's start token.
        tokens: How many tokens each text continues, unless the tokenizer's end token comes before.
        samples: How many texts; a line of dashes stands between them.
        temperature: Less than 1 sharpens the distribution; 0 always takes the likeliest token.
        top_k: Draw among the k likeliest tokens.
        top_p: Draw among the likeliest tokens that reach this probability together.
        min_p: Draw among the tokens whose probability is at least this fraction of the likeliest one's.
        repetition_penalty: More than 1 makes tokens already in the prompt or the text less likely; 1.2 is usual.
        stop: The text ends before this text; may be given several times.
        seed: Other seeds give other texts.
        step: A checkpoint's step, or "best"; by default the newest.
        prompt_file: A UTF-8 file that holds the prompt.
        stream: Print the text as it is written; of one sample.
        json: Print a JSON object for each text: prompt, text, ids, log_probabilities, finish_reason, seed, sample.
        chat: Answer each line of the input, as a dialogue of the run's chat template; an empty line or the end ends it.
        system: What a dialogue begins with.
    """
    from jaxformer.run.opened import open_run, read_prompt
    from jaxformer.spec import InputError

    if prompt_file is not None:
        if prompt is not None:
            raise InputError(f"prompt_file={prompt_file!r} must not be given beside prompt; leave one of them out")
        prompt = read_prompt(prompt_file)
    if stream and (json or samples > 1):
        other = "json" if json else f"samples={samples}"
        raise InputError(f"stream must not be given beside {other}: it prints one text alone; leave one of them out")
    if chat and (prompt is not None or json or stream or samples > 1):
        raise InputError("chat must not be given beside prompt, prompt_file, json, stream or samples; leave them out")
    if system is not None and not chat:
        raise InputError(f"system={system!r} begins a dialogue; give chat, too")
    opened = open_run(run, step_of(step))
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    how |= {"repetition_penalty": repetition_penalty, "stop": stop}
    if chat:
        _talk(opened, system, tokens, seed, how)
    elif stream:
        for piece in opened.stream(prompt, tokens, seed, **how):
            print(piece, end="", flush=True)
        print()
    elif json:
        for generated in opened.generate(prompt, tokens, samples, seed, **how):
            print_row(generated._asdict(), as_json=True)
    else:
        print("\n---------------\n".join(opened.samples(prompt, tokens, samples, seed, **how)))


def _talk(opened: "Run", system: str | None, tokens: int, seed: int, how: dict[str, Any]) -> None:
    """Questions from the terminal or a pipe, line by line."""
    from jaxformer.run.chat import Chat
    from jaxformer.spec import InputError

    asks = sys.stdin.isatty()
    dialogue = Chat(opened, system, tokens, seed, **how)
    while question := _line("> " if asks else None):
        try:
            for piece in dialogue.ask(question):
                print(piece, end="", flush=True)
        except InputError as error:
            if not asks:
                raise
            print(error, end="")  # such as of a character that is not known: another question may do
        print(flush=True)


def _line(prompt: str | None) -> str:
    """The next one, asked for by a prompt or, without one, read from a pipe; "" at the end."""
    from jaxformer.spec import InputError

    try:
        return (sys.stdin.readline() if prompt is None else input(prompt)).strip()
    except EOFError:
        print()
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"a question is not UTF-8 ({error.reason}); convert what is read") from None
