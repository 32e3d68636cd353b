"""README and docs/: every Python block and every command runs, with training shortened to 2 steps of a small model."""

import dataclasses
import glob
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxformer import config as config_lib
from jaxformer.commands import main
from jaxformer.lab import experiments
from jaxformer.spec import Spec, known_specs

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))
# What installs, measures or needs a GPU: its names are checked, it is not run.
UNRUN = ("pip", "python", "python3", "source", "export", "pytest", "git", "cd", "ruff", "pyright", "time")


DEVICES = {"--simulate_devices", "--devices", "--mesh.fsdp"}  # of several, which this process has not


def blocks(page):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text):
    """The words of each command of a block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words and (words[0] in UNRUN or called(words)):
            at = words.index("&&")
            yield words[:at], line
            words = words[at + 1 :]
        if words:
            yield words, line


def called(words):
    """(command of jaxformer, its arguments), or None."""
    if words[0] == "jaxformer":
        return words[1], words[2:]
    if words[:3] == ["python", "-m", "jaxformer"]:
        return words[3], words[4:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        return Path(words[1]).stem.removesuffix("_run"), words[2:]
    return None


def small(config):
    """The config at a size that trains in no time."""
    model, train, data = config.model, config.train, config.data
    context = 128 if data.corpus.marked else 16  # a dialogue has to fit
    limits = {"n_layers": 2, "d_model": 8 * getattr(model, "n_heads", 2), "context_length": context, "d_ff": 32}
    have = {name: getattr(model, name, None) for name in limits}
    model = dataclasses.replace(model, **{n: min(v, limits[n]) for n, v in have.items() if v})
    window = data.window and min(data.window, 16)
    few = {
        "steps": min(train.steps, 2),
        "steps_per_call": 1,
        "eval_every": 2,
        "save_every": 2,
        "log_every": 1,
        "accumulation": 1,
    }
    train = dataclasses.replace(train, **few, sample_tokens=min(train.sample_tokens, 4))
    data = dataclasses.replace(data, batch_size=min(data.batch_size, 4), window=window, valid_tokens=64)
    return dataclasses.replace(config, model=model, train=train, data=data)


@pytest.fixture
def shortened(monkeypatch, tmp_path):
    """A folder with what a checkout has, in which whatever is trained is small."""
    resolve = config_lib.resolve
    monkeypatch.setattr(config_lib, "resolve", lambda *args, **more: small(resolve(*args, **more)))
    for name in ("configs", "experiments", "scripts", "benchmarks", "docs", "README.md"):
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "my.jsonl").write_text('{"text": "What a text of yours may say."}\n' * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def follow(page, folder):
    """Does what a page says, in its order."""
    names = {"__name__": page.stem}
    for language, text in blocks(page):
        if language == "python":
            file = re.match(r"# (\w+\.py)\n", text)
            if file:
                (folder / file[1]).write_text(text)
            else:
                exec(compile(text, str(page), "exec"), names)
        elif language == "bash":
            for words, line in commands(text):
                call = called(words)
                if call is None and words[0] in UNRUN:
                    check_names(words)
                elif call is None:
                    subprocess.run(["bash", "-ec", line], check=True)
                elif call[0] in ("reproduce", "verify_resume") or DEVICES & {
                    w.split("=")[0] for w in words
                }:  # long, or in processes that nothing makes small
                    check_names(words)
                else:
                    arguments = [w for word in call[1] for w in (sorted(glob.glob(word)) or [word])]
                    assert main.run(call[0], arguments) == 0, f"{page.name}: {line}"


def check_names(words):
    """Of a command that is not run: the files, extras and experiments that it names are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        if word.endswith(".py") and "/" in word:
            assert (ROOT / word).is_file(), word
    if words[0] == "pip":
        for found in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(found.split(",")) <= set(extras), found
    call = called(words)
    if call is not None:
        assert call[0] in main.COMMANDS
        named = next(word for word in call[1] if not word.startswith("--"))
        known = {"all", *experiments.names(), *config_lib.presets()}
        assert named in known or (ROOT / named).is_file() or Path(named).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_what_a_page_says_works(page, shortened, capfd):
    follow(page, shortened)


def trained(page):
    """Directory and arguments of each run that a page trains."""
    for language, text in blocks(page):
        if language == "python":
            yield from ((name, text) for name in re.findall(r'directory=f?"(runs/[^"{]+?)/?["{]', text))
        for words, _ in commands(text) if language == "bash" else ():
            call = called(words)
            if call is not None and call[0] == "train":
                yield from (
                    (w.removeprefix("--directory="), frozenset(call[1])) for w in call[1] if "--directory=" in w
                )


def test_no_directory_is_that_of_two_runs():
    """Nor is one inside another's: a reader may follow all pages in one checkout."""
    own = {}
    for page in [ROOT / "README.md", *PAGES]:
        for directory, how in trained(page):
            assert own.setdefault(directory, (how, page))[0] == how or own[directory][1] == page, directory
    inside = {(a, b) for a in own for b in own if a.startswith(f"{b}/") and own[a][1] != own[b][1]}
    assert len(own) > 30 and not inside


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert re.match(r"https?:", target) or (page.parent / target).exists(), target
    folders = "jaxformer|configs|tests|experiments|benchmarks|docs|notebooks"
    for target in re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


def test_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def hooks():
    """(class, bold, what stands in code) of each cell of the table of hooks."""
    base = None
    for line in (ROOT / "docs/extend.md").read_text().partition("## Every hook")[2].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 3 or cells[0] in ("base", "---"):
            continue
        if cells[0]:
            name = cells[0].split("`")[1]
            (base,) = [c for c in known_specs() if c.__name__ == name and c.__module__.startswith("jaxformer.")]
            if " in `" in cells[0]:
                assert base.__module__.replace(".", "/") == "jaxformer/" + cells[0].split("`")[3].removesuffix(".py")
        for bold, code in re.findall(r"(\*\*)?`([^`]+)`", cells[1]):
            yield base, bool(bold), code


def test_the_table_of_hooks_is_that_of_the_code():
    found = {}
    for base, bold, code in hooks():
        call = re.fullmatch(r"(\w+)\((.*)\)", code)
        name = re.match(r"\w+", code)
        if name is None or (code.startswith("=") or not hasattr(base, name[0])):
            assert code.startswith("="), f"{base.__name__} has no {code}"
            continue
        found.setdefault(base, set()).add(name[0])
        assert (name[0] in base.__abstractmethods__) == bold, f"{base.__name__}.{name[0]}"
        if call:
            given = inspect.signature(getattr(base, call[1])).parameters.values()
            names = [str(p).split(":")[0].split("=")[0] for p in given if p.name != "self"]
            assert [p for p in call[2].split(", ") if p] == names, f"{base.__name__}.{code}: {names}"
    for base, names in found.items():
        assert base.__abstractmethods__ <= names, f"{base.__name__}: {base.__abstractmethods__ - names}"
    ours = [c for c in Spec.__subclasses__() if c.__module__.startswith("jaxformer.")]
    roles = {c for c in ours if c.abstract or inspect.isabstract(c)}
    assert roles <= set(found), {c.__name__ for c in roles - set(found)}
