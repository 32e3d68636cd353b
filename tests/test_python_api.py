"""What the commands do, in Python: to the same bits, and with the same names."""

import pytest
from test_end_to_end import CONFIG, command, finish, inspect, rows

import jaxformer
from jaxformer.run.manifest import sha256
from jaxformer.spec import InputError

pytestmark = pytest.mark.exact  # one step a call and seven are other programs


@pytest.mark.slow
def test_a_loop_of_ones_own_is_the_run_of_the_command(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(300)))
    (tmp_path / "config.py").write_text(CONFIG.replace("steps=700", "steps=70"))
    monkeypatch.chdir(tmp_path)
    finish(command(tmp_path, "train", "config.py"))
    state, step, batch_at = jaxformer.build("config.py", {"train.grad_norms": True})
    _, metrics = step(state, batch_at(0))
    assert metrics["grad_norms"]["embedding/table"].shape == ()
    state, step, batch_at = jaxformer.build("config.py")
    for i in range(70):
        state, metrics = step(state, batch_at(i))
    assert sha256(state) == inspect(tmp_path, "run")["state_sha256"]
    assert float(metrics["loss"]) == rows(tmp_path, "run")[-2]["loss"]
    with pytest.raises(InputError, match="must be at least 0 and less than vocab_size"):
        step(state, {"tokens": batch_at(0)["tokens"] + 1000})
    run = jaxformer.train("config.py", {"train.steps": 20, "model.n_layers": 1}, directory="short")
    assert run.config.model.n_layers == 1 and len(run.sample("1 plus ", tokens=9, temperature=0.8, seed=0)) == 16


def test_slips_in_python_are_answered_in_python():
    for call, message in (
        (lambda: jaxformer.train("quickstart", "runs/x"), "overrides='runs/x' must map paths of fields to values"),
        (lambda: jaxformer.train_seeds("quickstart", 3), "seeds=3 must be one or more, each once, such as range"),
        (lambda: jaxformer.Decoder(n_layer=3), "Decoder has no field n_layer; did you mean n_layers?"),
        (
            lambda: jaxformer.train("quickstart", {"train.step": 5}),
            "train.step: Train has no such field; did you mean steps?",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
