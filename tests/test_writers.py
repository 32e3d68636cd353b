"""Writers, read back with parsers of the files' formats; neither TensorBoard nor a server of W&B is at hand."""

import collections
import json
import math
import os
import struct
import sys
import time
import types

import pytest

from jaxformer.spec import InputError, checked, from_json, to_json
from jaxformer.writers import LossCurve, TensorBoard, WandB, Writer

CONFIG = {"directory": "runs/a", "model": {"n_layers": 3, "window": None}, "text": "`#` − ×"}
ROWS = [
    {"step": 2, "split": "train", "loss": 3.25, "grad_norm": None, "tokens_per_second": 50021},
    {"step": 3, "split": "train", "loss": math.inf, "grad_norms": {"decoder/layers/q": [0.5, None, 0.125]}},
    {"step": 3, "split": "valid", "loss": 3.5},
]
SCALARS = [
    {"train/loss": 3.25, "train/grad_norm": math.nan, "train/tokens_per_second": 50021},
    {"train/loss": math.inf}
    | {f"train/grad_norms/decoder/layers/q/{i}": x for i, x in enumerate([0.5, math.nan, 0.125])},
    {"valid/loss": 3.5},
]


def same(a, b):
    """Equal, and nan equals nan."""
    return repr(sorted((k, float(v)) for k, v in a.items())) == repr(sorted((k, float(v)) for k, v in b.items()))


def row(step, loss):
    return {"step": step, "split": "train", "loss": loss}


def write(writer, directory, step, rows):
    sink = writer.open(directory, CONFIG, step)
    for one in rows:
        sink.write(one)
    sink.close()


# --- the curve


@pytest.fixture
def shown(monkeypatch):
    """What a notebook shows of figures, as (how, labels and numbers of its lines)."""
    pytest.importorskip("matplotlib", reason="needs Matplotlib: jaxformer[pictures]")
    found = []

    def note(how, figure):
        found.append((how, {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}))

    def display(figure, display_id=None):
        note("new", figure)
        return types.SimpleNamespace(update=lambda figure: note("update", figure)) if display_id else None

    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0)  # which Matplotlib asks for once pyplot was imported
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return found


def test_a_curve_grows_in_place_in_a_notebook(shown, tmp_path, monkeypatch):
    """Anew after a while and at each evaluation; of a run that is resumed, with what was before."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1, 4.0)) + "\n")
    clock = iter([100.0, 100.5, 103.0, 103.1, 103.2, 103.3, 103.4])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    sink = LossCurve().open(tmp_path, CONFIG, 1)
    sink.write(row(2, 3.0))  # half a second later: waits
    sink.write(row(3, 2.5))
    sink.write({"step": 3, "split": "valid", "loss": 2.75})
    sink.write(row(4, 2.25))
    sink.close()
    training = [[1, 4.0], [2, 3.0], [3, 2.5], [4, 2.25]]
    validation = {"validation": [[3, 2.75]]}
    assert shown == [
        ("new", {"training": training[:1]}),
        ("update", {"training": training[:3]}),
        ("update", {"training": training[:3]} | validation),
        ("update", {"training": training} | validation),
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_is_a_file_in_a_script(tmp_path):
    pytest.importorskip("matplotlib", reason="needs Matplotlib: jaxformer[pictures]")
    sink = LossCurve().open(tmp_path / "a", CONFIG, 0)
    sink.write(row(1, 3.0))
    assert not (tmp_path / "a").exists()
    sink.write({"step": 1, "split": "valid", "loss": 2.75})
    first = (tmp_path / "a" / "loss.png").read_bytes()
    sink.write(row(2, 2.0))
    sink.close()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["loss.png"]
    assert first.startswith(b"\x89PNG") and (tmp_path / "a" / "loss.png").read_bytes() != first


# --- TensorBoard


@pytest.fixture
def event_pb2():
    return pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboardX: jaxformer[tensorboard]")


def events(event_pb2, directory):
    """Events of all files, in the order in which TensorBoard reads them: by the files' names."""
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a TFRecord: length, its checksum, the bytes, their checksum
            (size,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
        assert at == len(data)


def test_tensorboard_holds_every_number_and_the_config(event_pb2, tmp_path, caplog):
    write(TensorBoard(), tmp_path, 0, ROWS)
    found = [e for e in events(event_pb2, tmp_path) if e.HasField("summary")]
    text, *rows = found
    (value,) = text.summary.value
    assert value.tag.startswith("config") and value.metadata.plugin_data.plugin_name == "text"
    assert json.loads(value.tensor.string_val[0]) == CONFIG
    assert all(line.startswith(b"    ") for line in value.tensor.string_val[0].splitlines())  # code in Markdown
    assert [e.step for e in rows] == [one["step"] for one in ROWS]
    for event, scalars in zip(rows, SCALARS, strict=True):
        assert same({v.tag: v.simple_value for v in event.summary.value}, scalars)
    assert not caplog.records


def test_tensorboard_shows_each_step_of_a_resumed_run_once(event_pb2, tmp_path):
    write(TensorBoard(), tmp_path, 0, [row(s, 10 + s) for s in (1, 2, 3, 4, 5)])
    write(TensorBoard(), tmp_path, 3, [row(s, 20 + s) for s in (4, 5, 6)])  # in the same second
    shown, starts = collections.defaultdict(list), []
    for event in events(event_pb2, tmp_path):
        if event.session_log.status == event_pb2.SessionLog.START:
            starts.append(event.step)
            for tag in shown:
                shown[tag] = [(s, x) for s, x in shown[tag] if s < event.step]
        for value in event.summary.value:
            shown[value.tag].append((event.step, value.simple_value))
    assert starts == [1, 4]
    assert shown["train/loss"] == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26)]


# --- Weights & Biases


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    for name in ("CACHE", "CONFIG", "DATA"):  # its logs go there, not to the user's home
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # undone after the test, as WandB's own setting is not
    hooks = sys.exit, sys.excepthook
    module = pytest.importorskip("wandb", reason="needs wandb: jaxformer[wandb]")
    yield module
    module.teardown()  # ends its service process
    sys.exit, sys.excepthook = hooks  # it leaves its own behind


def records(directory):
    """The records of each of the run's offline files, oldest first. W&B's process may still write when `finish` has
    returned: the last record of a finished run is its exit."""
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for _ in range(300):
            found = records_in(path.read_bytes())
            if found and found[-1].HasField("exit"):
                break
            time.sleep(0.1)
        yield found


def records_in(data):
    from wandb.proto.wandb_internal_pb2 import Record

    at, found, record = 7, [], b""
    while at < len(data):  # LevelDB's log: in blocks of 32 KiB, (checksum, length, kind, bytes)
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        if at + 7 > len(data):
            break
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):
            break
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            found, record = [*found, Record.FromString(record)], b""
    return found


def history(found):
    rows = [r.history.item for r in found if r.HasField("history")]
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in rows]
    return [{name: x for name, x in one.items() if not name.startswith("_")} for one in rows]


def test_wandb_offline_holds_every_number_and_the_config(wandb, tmp_path, capfd):
    directory = tmp_path / "ablation"  # `open` makes it
    write(WandB("lab", mode="offline"), directory, 0, ROWS)
    assert capfd.readouterr() == ("", "")
    (found,) = records(directory)
    for got, one, scalars in zip(history(found), ROWS, SCALARS, strict=True):
        assert same(got, {"step": one["step"], **scalars})
    (run,) = (r.run for r in found if r.HasField("run"))
    config = {u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"}
    assert (run.project, run.display_name, run.resume, config) == ("lab", "ablation", True, CONFIG)
    axes = {(r.metric.name, r.metric.glob_name, r.metric.step_metric) for r in found if r.HasField("metric")}
    assert axes == {("step", "", ""), ("", "*", "step")}
    assert found[-1].HasField("exit") and wandb.run is None


def test_wandb_goes_on_under_its_id_and_keeps_rows_of_a_run_that_went_back(wandb, tmp_path):
    directory, writer = tmp_path / "a", WandB(name="b", mode="offline")
    write(writer, directory, 0, [row(s, 10 + s) for s in (1, 2, 3)])
    name = (directory / "wandb.id").read_text()
    write(writer, directory, 1, [row(s, 20 + s) for s in (2, 3)])
    write(writer, tmp_path / "other", 0, [])
    first, second = records(directory)
    (other,) = records(tmp_path / "other")
    ids = [r.run.run_id for found in (first, second, other) for r in found if r.HasField("run")]
    assert ids[0] == ids[1] == name.strip() != ids[2]
    assert (directory / "wandb.id").read_text() == name
    assert [one["train/loss"] for one in history(second)] == [22, 23]


def test_wandb_within_one_process_keeps_rows_of_a_run_that_went_back(wandb, tmp_path):
    sink = WandB(mode="offline").open(tmp_path, CONFIG, 0)
    for step in (7, 3, 5):
        sink.write(row(step, step))
    sink.close()
    (found,) = records(tmp_path)
    assert [one["step"] for one in history(found)] == [7, 3, 5]


def test_wandb_draws_an_id_for_one_that_was_lost_half_written(wandb, tmp_path):
    (tmp_path / "wandb.id").write_text("")
    write(WandB(mode="offline"), tmp_path, 0, [])
    assert len((tmp_path / "wandb.id").read_text().strip()) == 32


def test_wandb_leaves_another_open_run_of_the_process_alone(wandb, tmp_path):
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as theirs:
        write(WandB(mode="offline"), tmp_path / "ours", 0, ROWS)
        assert wandb.run is theirs
        theirs.log({"mine": 1})
    (ours,), (found,) = records(tmp_path / "ours"), records(tmp_path)
    assert len(history(ours)) == len(ROWS)
    assert history(found) == [{"mine": 1}]


def test_wandb_reports_its_use_to_nobody_unless_online(wandb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    write(WandB(mode="offline"), tmp_path, 0, [])
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_wandb_disabled_writes_no_run(wandb, tmp_path):
    write(WandB(mode="disabled"), tmp_path, 0, ROWS)
    assert not (tmp_path / "wandb").exists()


# --- before a run


@pytest.mark.parametrize(
    ("writer", "extra"), [(TensorBoard(), "tensorboard"), (WandB(), "wandb"), (LossCurve(), "pictures")]
)
def test_a_missing_package_is_named(writer, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, writer.package, None)  # as if not installed
    with pytest.raises(InputError, match=rf'needs the package {writer.package}; pip install "jaxformer\[{extra}\]"'):
        writer.require()
    monkeypatch.setitem(sys.modules, writer.package, json)  # as if installed
    writer.require()


def test_writers_are_checked_and_stored():
    with pytest.raises(InputError, match=r"^writers\.1\.mode='onlin' must be online, offline or disabled$"):
        checked(WandB(mode="onlin"), "writers.1.")
    for wrong in (WandB(project=""), WandB(name="")):
        with pytest.raises(InputError, match="must not be empty"):
            checked(wrong)
    for writer in (TensorBoard(), WandB("p", "n", "offline"), WandB(), LossCurve()):
        assert from_json(to_json(writer), Writer, "test") == writer
