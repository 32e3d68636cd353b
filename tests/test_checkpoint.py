"""Checkpoints: what comes back is what was saved, or it is refused."""

import errno
import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxformer.run import checkpoint
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter, restore_together
from jaxformer.run.manifest import Manifest, read_manifest, sha256
from jaxformer.spec import InputError

# Of several reads that fail at once Orbax awaits one; the others are told of when they are collected, whenever that is.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected():
    """Now, then, and not in the midst of another file's test."""
    yield
    gc.collect()


def state(seed):
    rng = np.random.default_rng(seed)
    return {"a": {"w": jnp.asarray(rng.normal(size=(101, 103)), jnp.float32)}, "step": jnp.int32(seed)}


ABSTRACT = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    state(0),
)


def fill(directory, losses, keep=2):
    checkpoints = CheckpointWriter(directory, keep)
    for step, loss in losses.items():
        checkpoints.save(state(step), step)
        if loss is not None:
            checkpoints.add_rank(step, loss)
    checkpoints.close()


def newest(directory, abstract=ABSTRACT):
    return Checkpoints(directory).chosen(abstract, None, lambda state: True)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 5.0}, [2, 5, 6]),
        ({1: 3.0, 2: 2.0, 3: 1.0}, [2, 3]),
        ({1: None, 2: None, 3: None, 4: None}, [3, 4]),
        ({1: None, 2: 1.0, 3: 2.0, 4: None, 5: 3.0, 6: None}, [2, 5, 6]),
        ({1: 2.0, 2: 1.5, 3: float("nan"), 4: float("inf"), 5: float("nan")}, [2, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, losses, kept):
    fill(tmp_path / "c", losses)
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.steps() == kept
    evaluated = {step: loss for step, loss in losses.items() if loss is not None and np.isfinite(loss)}
    best = min(evaluated, key=evaluated.get) if evaluated else None
    assert checkpoints.best() == (None if best is None else (best, losses[best]))
    for step in kept:
        assert sha256(checkpoints.restore(ABSTRACT, step)) == sha256(state(step))


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
def test_every_flipped_file_is_found_and_the_last_good_step_taken(tmp_path):
    """Each file of a checkpoint in turn: the restored state is the newest one, whole, or the one before."""
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    fallen = 0
    for path in sorted(p for p in (tmp_path / "c" / "2").rglob("*") if p.is_file() and p.stat().st_size):
        data = path.read_bytes()
        flip(path)
        found = newest(tmp_path / "c")
        fallen += int(found["step"]) == 1
        assert sha256(found) == sha256(state(int(found["step"])))
        path.write_bytes(data)
    assert fallen >= 2  # of the arrays and the digest at least


def test_every_emptied_checkpoint_falls_back(tmp_path):
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    for path in (tmp_path / "c" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path / "c")
    assert int(checkpoints.chosen(ABSTRACT, None, lambda state: True)["step"]) == 1 and checkpoints.best() == (1, 1.0)


def test_another_shape_is_no_damage(tmp_path):
    fill(tmp_path / "c", {1: 1.0})
    other = ABSTRACT | {"step": jax.ShapeDtypeStruct((3,), "int32", sharding=ABSTRACT["step"].sharding)}
    with pytest.raises(InputError, match="was saved with other shapes than those of this config and tokenizer"):
        newest(tmp_path / "c", other)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is no folder of checkpoints"):
        Checkpoints(tmp_path / "file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_named_set_aside_and_written_anew(tmp_path, caplog):
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    flip(largest(tmp_path / "c" / "2"))
    with pytest.raises(InputError, match=r"c.2 (is damaged|cannot be restored)"):
        Checkpoints(tmp_path / "c").restore(ABSTRACT, 2)
    checkpoints = CheckpointWriter(tmp_path / "c", 2)
    (found,) = restore_together([checkpoints], ABSTRACT)
    assert int(found["step"]) == 1 and "take another checkpoint" in caplog.text
    assert (tmp_path / "c" / "2.damaged").is_dir() and checkpoints.steps() == [1]
    checkpoints.save(state(2), 2)
    checkpoints.close()
    assert int(newest(tmp_path / "c")["step"]) == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "many"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory")]
)
@pytest.mark.parametrize("times", [1, 9])
def test_want_of_memory_is_no_damage(tmp_path, monkeypatch, error, times):
    """Of whatever kind, once or always: nothing is renamed, and nothing older is taken for the newest."""
    fill(tmp_path, {1: 1.0, 2: 2.0})
    restore, left = ocp.Checkpointer.restore, [error] * times

    def short(self, *more, **named):
        if left:
            raise left.pop()
        return restore(self, *more, **named)

    monkeypatch.setattr(ocp.Checkpointer, "restore", short)
    checkpoints = CheckpointWriter(tmp_path)
    with pytest.raises(type(error)):
        restore_together([checkpoints], ABSTRACT)
    assert checkpoints.steps() == [1, 2] and not list(tmp_path.glob("*.damaged"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_but_damage_is_said(tmp_path):
    assert restore_together([CheckpointWriter(tmp_path / "none", 1)], ABSTRACT) is None
    with pytest.raises(InputError, match="holds no checkpoint yet; train it until it saves one"):
        newest(tmp_path / "none")
    fill(tmp_path / "c", {1: 1.0})
    largest(tmp_path / "c" / "1").unlink()
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        restore_together([CheckpointWriter(tmp_path / "c", 1)], ABSTRACT)
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        newest(tmp_path / "c")
    assert (tmp_path / "c" / "1").exists()  # nothing is removed where nothing better is at hand


def test_an_array_that_is_called_otherwise_is_damage(tmp_path, caplog):
    """As one flipped bit in Orbax's list of names makes it: Orbax gives back what it was asked for."""
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    names = tmp_path / "c" / "2" / "state" / "_METADATA"
    names.write_text(names.read_text().replace('"step"', '"s|ep"'))
    assert sha256(newest(tmp_path / "c")) == sha256(state(1))
    assert "is damaged: the SHA-256 of step is not that of what was saved" in caplog.text


def test_an_unfinished_save_is_skipped(tmp_path):
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    (tmp_path / "c" / "2").rename(tmp_path / "c" / "2.orbax-checkpoint-tmp")
    assert int(newest(tmp_path / "c")["step"]) == 1


def test_what_kills_left_is_deleted_when_the_run_goes_on(tmp_path):
    """Of steps that were being saved, or deleted; what was set aside stays, and manifests may have been lost."""
    folder = tmp_path / "run" / "c"
    folder.parent.mkdir()
    fill(folder, {1: None, 2: None, 3: None}, keep=3)
    (folder / "3").rename(folder / "3.damaged")
    for name in ("4.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-17", "6"):
        shutil.copytree(folder / "3.damaged", folder / name)
    (folder / "6" / "manifest.json").unlink()
    (folder.parent / "base.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(folder).steps() == [1, 2] and len([*folder.iterdir()]) == 6  # who reads deletes nothing
    CheckpointWriter(folder, 2).close()
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3.damaged"}
    assert [path.name for path in folder.parent.iterdir()] == ["c"]
    for step in ("1", "2"):
        (folder / step / "manifest.json").unlink()
    CheckpointWriter(folder, 2).close()
    assert {path.name for path in folder.iterdir()} == {"1", "2", "3.damaged"}


def test_a_checkpoint_outlasts_a_power_cut_before_older_ones_go(tmp_path, monkeypatch):
    """The rows up to its step, all of it, and then its manifest."""
    rows, folder, synced = tmp_path / "metrics.jsonl", tmp_path / "c", []
    rows.write_text("{}\n")
    fill(folder, {1: None}, keep=1)

    def sync(path):
        synced.append((path, (folder / "2" / "manifest.json").exists()))
        assert (folder / "1" / "manifest.json").exists()

    monkeypatch.setattr(checkpoint, "sync", sync)
    fill(folder, {2: None}, keep=1)
    files = {*(folder / "2").rglob("*")} - {folder / "2" / "manifest.json"}  # which syncs itself
    assert {path for path, whole in synced if not whole} == {rows, tmp_path, folder, folder / "2", *files}
    assert synced[-1] == (folder / "2", True) and Checkpoints(folder).steps() == [2]


def test_saving_does_not_race_with_the_donated_state(tmp_path):
    """The state is saved in the background while the next call overwrites it in place."""
    call = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    checkpoints, digests = CheckpointWriter(tmp_path / "c", 30), {}
    now = jax.tree.map(lambda a: jnp.broadcast_to(a, (50, *a.shape)) + 0, state(0))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), now)
    for step in range(20):
        checkpoints.save(now, step)
        digests[step] = sha256(now)
        now = call(now)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "c")
    for step, digest in digests.items():
        assert sha256(checkpoints.restore(abstract, step)) == digest
        assert read_manifest(tmp_path / "c" / str(step)).rank is None


@pytest.mark.parametrize("members", [1, 3])
def test_what_is_saved_is_a_copy(tmp_path, members):
    """The buffers are donated and overwritten in place as soon as `save` returns, before they are hashed or written.
    NumPy's view of an array would keep it from being donated, so that there is none."""
    call = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    writers = [CheckpointWriter(tmp_path / str(i), 30) for i in range(members)]
    began = [np.random.default_rng(i).normal(size=(307, 1009)).astype(np.float32) for i in range(members)]
    now = [{f"w{j}": jnp.asarray(a) + j for j in range(5)} for a in began]
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), now[0])
    for step in range(5):
        for i, writer in enumerate(writers):
            old = jax.tree.leaves(now[i])
            writer.save(now[i], step)
            now[i] = call(now[i])
            assert all(a.is_deleted() for a in old)
    for i, writer in enumerate(writers):
        writer.close()
        states = {f"w{j}": began[i] + np.float32(j) for j in range(5)}
        for step in range(5):
            assert sha256(Checkpoints(writer.directory).restore(abstract, step)) == sha256(states)
            states = {name: a + np.float32(1) for name, a in states.items()}


def test_a_save_that_fails_in_the_background_is_told_once(tmp_path, monkeypatch):
    """By the next save, or where it is waited for; then saving goes on."""

    def full(self, directory):
        raise RuntimeError("no space left")

    checkpoints = CheckpointWriter(tmp_path / "c", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", full)
        checkpoints.save(state(1), 1)
        with pytest.raises(OSError, match=r"no checkpoint could be written to .*: no space left"):
            checkpoints.save(state(2), 2)
        assert not checkpoints.has(1) and not checkpoints.has(2)
        checkpoints.save(state(2), 2)
        checkpoints.add_rank(2, 1.0)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.wait()
        checkpoints.wait()
    checkpoints.save(state(3), 3)
    checkpoints.close()
    assert checkpoints.steps() == [3] and sha256(newest(tmp_path / "c")) == sha256(state(3))


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "has no room for"), (errno.EIO, "^.Errno 5. broken$")])
def test_a_full_disk_is_told_and_what_else_fails_by_its_name(tmp_path, monkeypatch, number, said):
    def fail(*_):
        raise OSError(number, "broken")

    monkeypatch.setattr(checkpoint.os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=said):
        CheckpointWriter(tmp_path).save(state(1), 1)


def test_half_precision_is_saved_too(tmp_path):
    half = {"w": jnp.arange(7, dtype=jnp.bfloat16), "v": jnp.ones((3, 5))}
    checkpoints = CheckpointWriter(tmp_path / "c", 1)
    checkpoints.save(half, 1)
    checkpoints.close()
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), half)
    assert sha256(Checkpoints(tmp_path / "c").restore(abstract, 1)) == sha256(half)


def test_a_digest_covers_path_dtype_shape_and_bytes():
    w = np.arange(6, dtype=np.float32)
    trees = [{"w": w}, {"v": w}, {"w": w.reshape(2, 3)}, {"w": w.view(np.int32)}, {"w": w + 1}, {"a": {"w": w}}]
    assert len({sha256(tree) for tree in trees}) == len(trees)
    assert sha256({"b": w, "a": w.reshape(2, 3).T}) == sha256({"a": np.ascontiguousarray(w.reshape(2, 3).T), "b": w})


def test_a_rank_that_was_changed_is_no_rank(tmp_path):
    """A flipped digit would make another checkpoint the best."""
    fill(tmp_path / "c", {1: 1.0, 2: 2.0})
    manifest = tmp_path / "c" / "2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rank": 2.0', '"rank": 0.5'))
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.rank(2) == float("inf") and checkpoints.best() == (1, 1.0)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        checkpoints.restore(ABSTRACT, 2)


def test_a_state_of_before_lacks_an_empty_part_that_came_since(tmp_path):
    """As `TrainState` may gain parts; one that holds arrays is refused, by their names."""
    fill(tmp_path, {3: None})
    assert sha256(newest(tmp_path, ABSTRACT | {"gained": (), "more": {"none": None}})) == sha256(state(3))
    with pytest.raises(InputError, match=r"other shapes .* \(gained as none, not int32\[\]\)"):
        newest(tmp_path, ABSTRACT | {"gained": ABSTRACT["step"]})
