"""Dialogues: templates of strangers, what of a text is an answer, and that nothing else is learned."""

import dataclasses
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library
from test_tokenizers import metaspace
from tiny import decoder, loud

import jaxformer
from jaxformer import Config, Data, Train
from jaxformer.data import templates
from jaxformer.data.batches import Batches, Examples, PackedDocuments, RandomWindows, RowSize, ShuffledWindows
from jaxformer.data.corpora import Mixture, PythonTopics, TextFiles
from jaxformer.data.datasets import encode, ids_of, prepare
from jaxformer.data.dialogues import Dialogues, Instructions, PythonQuestions
from jaxformer.data.templates import ANSWERS, Ends, Template
from jaxformer.data.tokenizers import BPE, Bytes, Characters, Subwords
from jaxformer.learning.objectives import Masked, NextToken, PrefixLM
from jaxformer.run.chat import Chat
from jaxformer.run.opened import Run
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError, checked

CHATML = (
    "{%- for message in messages %}"
    "<|endoftext|>{{ message['role'] }}\n{{ message['content'] | trim }}<|endoftext|>\n"
    "{%- endfor %}{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why you?"},
    {"role": "assistant", "content": "Because I was asked."},
]
TOKENIZERS = {"bytes": Bytes(end_token=True), "endless": Bytes(), "bpe": BPE(270).fit(["abc abd"])}


def told(messages):
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    words = [f"{'ab' * (i % 5)}{i}" for i in range(23)]
    path.write_text(
        told(TALK) + "\n" + "".join(told([TALK[0] | {"content": w}, TALK[1] | {"content": w[::-1]}]) for w in words)
    )
    return str(path)


@pytest.mark.parametrize("source", [None, CHATML], ids=["plain", "chatml"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_answers_are_marked_with_what_ends_them(source, tokenizer):
    template = Template.of(tokenizer, source)
    pieces = template.dialogue(TALK)
    whole = "".join(piece.text for piece in pieces)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    answers = [
        "".join(piece.text for piece in run)
        for answer, run in itertools.groupby(pieces, lambda piece: piece.answer)
        if answer
    ]
    assert [text.split("<|")[0].strip() for text in answers] == ["I.", "Because I was asked."]
    for text in answers:
        assert whole.count(text) == 1
    if tokenizer.end is not None:
        assert all("<|endoftext|>" in text for text in answers) and template.ends == Ends((tokenizer.end,), ())
    ids = np.concatenate([ids_of(piece, tokenizer) for piece in pieces])
    assert (ids == tokenizer.end).sum() == whole.count("<|endoftext|>") * (tokenizer.end is not None)
    prompt = "".join(piece.text for piece in template.prompt(TALK[:3]))
    assert whole.startswith(prompt) and whole[len(prompt) :] == answers[1]


def test_as_transformers_writes_it():
    """What `apply_chat_template` gives for these messages, by hand."""
    pieces = Template.of(TOKENIZERS["bpe"], CHATML).dialogue(TALK[:2])
    e = "<|endoftext|>"
    assert "".join(p.text for p in pieces) == f"{e}user\nWho?{e}\n{e}assistant\nI.{e}\n".replace(
        f"{e}\n{e}", f"{e}{e}"
    ).rstrip("\n")


INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPACES = {
    "always": {},
    "first": {"pre_tokenizer": library.pre_tokenizers.Metaspace(prepend_scheme="first")},
    "prepend": {
        "pre_tokenizer": None,
        "normalizer": library.normalizers.Sequence(
            [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
        ),
    },
}


@pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES)
def test_ids_of_a_dialogue_are_those_of_its_text(spaces, tmp_path):
    """Of tokenizers that put a space before a text, it is put before no answer, nor before what follows one."""
    own = metaspace()
    for name, value in spaces.items():
        setattr(own, name, value)
    tokenizer = Subwords(own.to_str(), own.get_vocab_size(), "<s>", "</s>")
    template = Template.of(tokenizer, INSTRUCT)
    talk = [*TALK[:2], {"role": "user", "content": "hi"}, {"role": ANSWERS, "content": "hi hi"}]
    (tmp_path / "talks.jsonl").write_text(told(talk))
    source = encode(Dialogues(str(tmp_path / "talks.jsonl"), template=INSTRUCT), tokenizer)
    text = "<s>[INST] Who? [/INST] I.</s><s>[INST] hi [/INST] hi hi</s>"
    assert source.tokens.tolist() == own.encode(text, add_special_tokens=False).ids
    learned = [int(i) for i, answer in zip(source.tokens, source.answers, strict=True) if answer]
    assert [own.id_to_token(i) for i in learned[-5:]] == ["▁h", "i", "▁h", "i", "</s>"]
    assert learned[:-5] == [259, 3 + ord("I"), 3 + ord("."), 1]
    prompt = [int(i) for piece in template.prompt(talk[:3]) for i in ids_of(piece, tokenizer)]
    assert prompt == own.encode(text[: text.rindex(" hi hi")], add_special_tokens=False).ids
    assert source.tokens.tolist()[: len(prompt)] == prompt


def test_what_becomes_a_special_token_in_another_form_is_refused():
    own = metaspace()
    own.normalizer = library.normalizers.Lowercase()
    own.add_special_tokens([library.AddedToken("<end>", normalized=True)])
    tokenizer = Subwords(own.to_str(), own.get_vocab_size(), "<s>", "<end>")
    for content, right in (("hi", True), ("<END>", False)):
        pieces = Template.of(tokenizer, INSTRUCT).dialogue([TALK[0], {"role": ANSWERS, "content": content}])
        if right:
            assert ids_of(pieces[-1], tokenizer).tolist() == [263]
        else:
            with pytest.raises(InputError, match="holds '<end>', which the tokenizer takes for its special token"):
                ids_of(pieces[-1], tokenizer)


def test_what_ends_a_turn_is_kept_out_of_messages_special_or_not():
    own = metaspace()
    own.add_tokens(["<|im_end|>", "<think>"])
    tokenizer = Subwords(own.to_str(), own.get_vocab_size(), "<s>", "</s>")
    template = Template.of(tokenizer, "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}")
    assert template.ends == Ends((263,), ())
    template.check([*TALK[:1], {"role": ANSWERS, "content": "<think> I."}])
    for wrong in ({"content": "a<|im_end|>"}, {"calls": [{"name": ["<s>"]}]}, {"calls": {"</s>": 1}}):
        with pytest.raises(InputError, match=r"message 2 holds '<.*>', which would be a token"):
            template.check([TALK[0], TALK[1] | wrong])


def test_fields_that_are_null_are_not_there():
    """And what a template asks about tools and documents is answered, as in transformers."""
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.calls is defined %}{{ m.calls | length }}{% endif %}{% endfor %}"
        "{% if tools is not none or documents is not none %}!{% endif %}"
    )
    (piece,) = Template.of(Bytes(), source).prompt([TALK[0] | {"calls": None}, TALK[1] | {"calls": [1, 2]}])
    assert piece.text == "Who?I.2"


WRONG = {
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1 second",
    ),
    "large": ("{{ 'a' * 10**10 }}", "takes more than 1,073,741,824 bytes"),
    "curious": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
    "writing": ("{{ messages.append(1) }}", "is unsafe"),
    "refusing": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "broken": ("{% if %}", "Expected an expression"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_template_is_told_and_bounded(wrong, monkeypatch):
    source, why = WRONG[wrong]
    if wrong == "endless":
        Template.of(Bytes()).prompt(TALK[:1])  # so that the process has begun
        monkeypatch.setattr(templates, "SECONDS", 1.0)
    with pytest.raises(InputError, match=f"the chat template cannot be rendered .*{why}"):
        Template.of(Bytes(), source).prompt(TALK[:1])
    monkeypatch.undo()
    assert Template.of(Bytes()).prompt(TALK[:1])  # another is rendered all the same


class Interrupted:
    """A pipe at which the user presses Ctrl-C."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def readline(self):
        raise KeyboardInterrupt


def test_an_interrupted_template_answers_nothing_later(monkeypatch):
    ask = lambda text: Template.of(Bytes(), "{{ messages[0].content }}").prompt([TALK[0] | {"content": text}])[0].text
    assert ask("one") == "one"
    process = templates._RENDERER._process
    with monkeypatch.context() as patch:
        patch.setattr(process, "stdout", Interrupted(process.stdout))  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(KeyboardInterrupt):
            ask("two")
    assert ask("three") == "three"


def test_no_file_of_the_users_passes_for_a_module_of_the_process(tmp_path, monkeypatch):
    """Opening a run executes nothing that it holds, whatever the working directory."""
    templates._RENDERER.close()
    for name in ("json", "typing", "token", "tokenize", "jinja2"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert Template.of(Bytes()).prompt(TALK[:1])
    assert not (tmp_path / "executed").exists()


def test_marks_of_answers_in_a_template_change_nothing():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}"
    assert "".join(p.text for p in Template.of(Bytes(), source).prompt(TALK[:2])) == "Who?!I.!"


def test_a_template_that_rewrites_what_was_said_is_refused():
    source = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    with pytest.raises(InputError, match="message 2 in another way once it has been answered"):
        Template.of(Bytes(), source).dialogue(TALK)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            told([TALK[0], {"role": "assistant", "content": "a<|endoftext|>b"}]),
            "message 2 holds '<|endoftext|>', which",
        ),
        (told([{"role": "<|endoftext|>", "content": "a"}]), "message 1 holds '<|endoftext|>', which"),
        (told(TALK[:1]), "no message is of the role 'assistant'"),
        (told([]), "no message is of the role 'assistant'"),
        (told("Who?"), "'messages' is str, not a list of messages"),
        (told([TALK[0], {"role": "assistant"}]), "message 2 must have a 'content' that is a text"),
        (told(["a"]), "message 1 must have a 'role' that is a text"),
        ("{}\n", "no object with 'messages'"),
        ("{\n", "Expecting property name"),
    ],
)
def test_a_wrong_dialogue_is_told_with_its_line(tmp_path, line, why):
    (tmp_path / "talks.jsonl").write_text(told(TALK) + line)
    with pytest.raises(InputError, match=r"talks\.jsonl, line 2: ") as error:
        encode(Dialogues(str(tmp_path / "talks.jsonl")), Bytes(end_token=True))
    assert why in str(error.value)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_what_is_prepared_is_what_is_encoded(file, tokenizer, monkeypatch):
    corpus = Dialogues(file, system="Be brief.")
    source = encode(corpus, tokenizer)
    monkeypatch.setattr("jaxformer.data.datasets.SAVE_EVERY", 300)  # as if it had been killed, again and again
    (train,), (valid,) = (lambda found: (found.train, found.valid))(prepare(corpus, tokenizer, corpus))
    for kept in (train, valid):
        for name in ("tokens", "starts", "answers"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(source, name))
    text = tokenizer.decode(source.tokens[: source.starts[1]])
    assert "Be brief." in text and "Because I was asked." in text and len(source.starts) == 24
    learned = tokenizer.decode(source.tokens[: source.starts[1]][source.answers[: source.starts[1]] > 0])
    assert learned.split() == ["I.", "Because", "I", "was", "asked."]


def test_a_table_of_questions_is_dialogues_of_two(tmp_path):
    (tmp_path / "table.csv").write_text('prompt,answer\n"Who, there?",I\nWhy,So\n')
    (tmp_path / "talks.jsonl").write_text(
        told([TALK[0] | {"content": "Who, there?"}, TALK[1] | {"content": "I"}])
        + told([TALK[0] | {"content": "Why"}, TALK[1] | {"content": "So"}])
    )
    one, other = (
        encode(c, Bytes(end_token=True))
        for c in (Instructions(str(tmp_path / "table.csv")), Dialogues(str(tmp_path / "talks.jsonl")))
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.answers, other.answers)


SAMPLINGS = [RandomWindows(), ShuffledWindows(), Examples(), PackedDocuments()]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: type(s).__name__)
def test_weights_go_with_their_tokens(file, sampling):
    """Wherever a token stands in a batch, its weight is that of its place in the source."""
    tokenizer, size = Bytes(end_token=True), RowSize(97)
    source = encode(Dialogues(file), tokenizer)
    pairs = set(zip(source.tokens.tolist(), source.answers.tolist(), strict=True))
    batches = [
        *sampling.full_pass(source, size, 3),
        *(Batches((source,), (1.0,), sampling, size, 3, 0).at(i) for i in range(3)),
    ]
    total = 0
    for batch in batches:
        real = batch.get("segments", np.ones_like(batch["tokens"])) > 0
        assert batch["weights"].shape == batch["tokens"].shape and not batch["weights"][~real].any()
        assert set(zip(batch["tokens"][real].tolist(), batch["weights"][real].tolist(), strict=True)) <= pairs
    for batch in sampling.full_pass(source, size, 3):
        total += int(batch["weights"].sum())
    assert total >= int(source.answers.sum()) and total - source.answers.sum() < 0.02 * total
    text = lambda batch: [
        tokenizer.decode(row[weight > 0]) for row, weight in zip(batch["tokens"], batch["weights"], strict=True)
    ]
    assert any("Because I was asked." in row for batch in sampling.full_pass(source, size, 3) for row in text(batch))
    shapes = sampling.shapes(Dialogues(file), size)
    assert shapes["weights"] == (98,)


def test_of_a_mixture_other_text_is_learned_whole(file, tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 99)
    corpus = Mixture((Dialogues(file), TextFiles(str(tmp_path / "text.txt"))), (0.5, 0.5))
    prepared = prepare(corpus, Bytes(end_token=True))
    batch = Batches(prepared.train, prepared.weights, RandomWindows(), RowSize(19), 4, 0).at(0)
    assert corpus.marked and batch["weights"][1::2].all() and not batch["weights"][::2].all()


def test_a_batch_that_has_no_dialogue_by_chance_has_weights_too(file, tmp_path):
    """The batches of a call are stacked, and all have the same names."""
    (tmp_path / "text.txt").write_text("some text\n" * 99)
    corpus = Mixture((Dialogues(file), TextFiles(str(tmp_path / "text.txt"))), (0.2, 0.8))
    prepared = prepare(corpus, Bytes(end_token=True))
    batches = Batches(prepared.train, prepared.weights, RandomWindows(), RowSize(19), 4, 0)
    found = [batches.at(step) for step in range(5)]
    assert {tuple(batch) for batch in found} == {("weights", "tokens")}
    assert [bool(batch["weights"].all()) for batch in found].count(True) == 1


def test_only_answers_have_a_gradient():
    """Of the logits before a token that is no answer it is exactly zero."""
    model, objective, rng = decoder(n_layers=1), NextToken(), np.random.default_rng(0)
    params = loud(model)
    batch = {name: rng.integers(0, high, (3, 14), np.int32) for name, high in (("tokens", 29), ("weights", 2))}
    batch["segments"] = np.repeat([[1] * 8 + [2] * 4 + [0] * 2], 3, 0).astype(np.int32)
    example = objective.prepare({n: jnp.asarray(a) for n, a in batch.items()}, jax.random.key(0))
    h = jnp.asarray(rng.normal(size=(3, 13, 84)), jnp.float32)

    def loss(h):
        nats = objective.nats(model, params, h, example, None)
        return (nats.plain * example.weights).sum()

    moved = np.abs(jax.grad(loss)(h)).max(-1) > 0
    learned = (
        batch["weights"][:, 1:]
        * (batch["segments"][:, 1:] == batch["segments"][:, :-1])
        * (batch["segments"][:, 1:] > 0)
    )
    np.testing.assert_array_equal(moved, learned > 0)
    assert 0 < learned.sum() < learned.size


def test_two_dialogues_packed_have_the_loss_of_each_apart(file):
    model, objective, tokenizer = (
        decoder(n_layers=2, vocab_size=257, context_length=160),
        NextToken(),
        Bytes(end_token=True),
    )
    params, source = loud(model), encode(Dialogues(file), tokenizer)

    def sums(sampling):
        found = np.zeros(2)
        for batch in sampling.full_pass(source.pick(np.array([0, 5])), RowSize(160), 1):
            example = objective.prepare({n: jnp.asarray(a) for n, a in batch.items()}, jax.random.key(0))
            each = objective.loss(model, params, example, None)
            found += np.array([float(each.nats), float(each.weight)])
        return found

    (packed, n), (apart, same) = sums(PackedDocuments()), sums(Examples())
    assert n == same > 0 and packed / n == pytest.approx(apart / n, abs=1e-6)


def test_an_objective_that_reads_no_weights_is_refused(file):
    config = Config("x", decoder(vocab_size=None), Data(Dialogues(file), tokenizer=Bytes()))
    with pytest.raises(InputError, match="objective=PrefixLM does not read it; take NextToken"):
        jaxformer.config.resolve(config, {"objective": "PrefixLM"})
    judged = {"data.corpus": PythonTopics(), "data.valid": Dialogues(file), "objective": "PrefixLM"}
    with pytest.raises(InputError, match=r"data\.valid=Dialogues says which tokens are answers"):
        jaxformer.config.resolve(config, judged)
    assert not Masked().weighs


def test_questions_of_python_are_known_to_the_quickstart():
    topics = Characters().fit(PythonTopics()).alphabet
    found = [messages for messages, _ in PythonQuestions().dialogues()]
    assert len(found) > 80 and all(len(messages) == 4 for messages in found[:-1])
    assert {c for talk in found for message in talk for c in message["content"]} <= set(topics)


# --- chat


@pytest.fixture(scope="module")
def run(file):
    tokenizer = Bytes(end_token=True)
    model = decoder(n_layers=1, n_heads=2, vocab_size=None, context_length=96)
    config = Config("run", model, Data(Dialogues(file), tokenizer=tokenizer, sampling=PackedDocuments()))
    return Run(config, tokenizer, TrainState(jnp.int32(5), loud(dataclasses.replace(model, vocab_size=257)), ()))


def test_a_chat_goes_on_and_leaves_out_the_oldest(run, caplog):
    caplog.set_level("INFO")
    chat, seen = Chat(run, "Be.", tokens=11, temperature=0.0), []
    own = run.request
    request = lambda starts, *args: seen.append(run.tokenizer.decode(starts[0])) or own(starts, *args)
    object.__setattr__(run, "request", request)
    try:
        answers = ["".join(chat.ask(f"Q{i}{'x' * 30 * (i == 0)}?")) for i in range(4)]  # the first is what is too long
    finally:
        object.__delattr__(run, "request")
    assert [m["content"] for m in chat.messages if m["role"] == ANSWERS][-1] == answers[-1].strip()
    assert all(
        text.startswith("System: Be.\nUser: Q") and text.endswith("?\nAssistant:") and f"Q{i}" in text
        for i, text in enumerate(seen)
    )
    assert "Q0" not in seen[1] and "Q1" in seen[2] and "left out: the context is full" in caplog.text
    assert all(len(run.tokenizer.encode(text)) <= 96 - 11 for text in seen)
    with pytest.raises(InputError, match=r"the question takes .* ask in fewer words"):
        [*chat.ask("too long " * 11)]
    assert "too long" not in str(chat.messages)


def test_an_answer_ends_with_the_turn(run, monkeypatch):
    """The end token of a turn is none of the text, and nothing follows it."""
    from jaxformer.generation.decode import Drawn, LeftToRight

    def say(self, request):
        assert request.end == 256
        row = [*b" Hi.", 256, *b"no"]
        for token in row:
            yield Drawn(np.full((len(request.prompts), 1), token, np.int32))

    monkeypatch.setattr(LeftToRight, "__call__", say)
    chat = Chat(run)
    assert [*filter(None, chat.ask("Who?"))] == ["H", "i", "."] and chat.messages[-1]["content"] == "Hi."


def test_a_chat_of_what_does_not_write_on_is_refused(run):
    model = jaxformer.EncoderDecoder(n_layers=1, n_heads=2, d_model=14, context_length=23)
    other = dataclasses.replace(run, config=Config("other", model, Data(tokenizer=run.tokenizer), train=Train(steps=1)))
    with pytest.raises(InputError, match="its model is no decoder"):
        Chat(other)


def test_a_chat_is_asked_as_a_sample_is(run):
    for how, wrong in (({"seed": -1}, "seed=-1 must be at least 0"), ({"stop": ("",)}, "stop='' must not be empty")):
        with pytest.raises(InputError, match=wrong):
            Chat(run, **how)
    assert Chat(run, stop="User:")._stop == ("User:",)


def test_a_chat_is_written_as_the_dialogues_of_a_mixture(run, file):
    own = Dialogues(file, template=T, system="Be brief.")
    mixture = Mixture((TextFiles(file), own), (0.5, 0.5))
    data = dataclasses.replace(run.config.data, corpus=mixture)
    chat = Chat(dataclasses.replace(run, config=dataclasses.replace(run.config, data=data)))
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert "".join(piece.text for piece in chat._template.prompt(chat.messages)) == "<system>Be brief."


T = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_a_run_that_reads_no_weights_is_not_evaluated_on_dialogues(run, file):
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, objective=PrefixLM()))
    with pytest.raises(InputError, match="objective=PrefixLM does not read it; give plain text"):
        other.evaluate(Dialogues(file))


def test_the_path_of_a_template_is_no_template():
    for corpus in (Dialogues("a.jsonl", template="chat.jinja"), PythonQuestions(template="chat.jinja")):
        with pytest.raises(InputError, match=r"template='chat.jinja' must be a template's text"):
            checked(corpus)


def test_instructions_are_asked_without_their_answers(tmp_path):
    (tmp_path / "q.csv").write_text("prompt\nWho?\nWhy?\n")
    asked = Instructions(str(tmp_path / "q.csv")).asked(False)
    assert [texts[0].text for texts in asked.questions()] == ["Who?", "Why?"]


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "talk.jsonl").write_text(told([{"role": "user", "content": "a \ud83d"}, TALK[1]]))
    with pytest.raises(InputError, match=r"talk.jsonl, line 1: half of a surrogate pair"):
        list(Dialogues(str(tmp_path / "talk.jsonl")).dialogues())


def test_questions_from_a_pipe_are_utf_8(monkeypatch):
    from jaxformer.commands.sample import _line

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9?\n"), "utf-8"))
    assert (_line(None), _line(None)) == ("café?", "")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), "utf-8"))
    with pytest.raises(InputError, match="a question is not UTF-8"):
        _line(None)
