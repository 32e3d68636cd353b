"""What a process with eight devices of the CPU finds out for test_mesh.py: python meshed.py NAME prints it as JSON."""

import collections
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxformer.declarations import by_path
from jaxformer.learning.adafactor import Adafactor
from jaxformer.learning.adapters import LoRA
from jaxformer.learning.groups import Groups
from jaxformer.learning.guards import Guard
from jaxformer.learning.objectives import Contrastive, Masked, SequenceToSequence
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.learning.schedule_free import ScheduleFree
from jaxformer.learning.schedules import Constant
from jaxformer.mesh import Mesh, axis_sizes, placed, shardings
from jaxformer.model.baselines import LSTM, TokenEmbedding
from jaxformer.model.heads import EmbeddingHead, LanguageHead
from jaxformer.model.implementations import Blocked
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import RMSNorm
from jaxformer.model.mixers import ValueEmbeddings
from jaxformer.model.models import Decoder, Encoder, EncoderDecoder
from jaxformer.model.positions import Rotary
from jaxformer.platform import simulate_devices
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps

B, T, V, STEPS = 16, 16, 40, 50
SIZES = {"vocab_size": V, "d_model": 32, "n_heads": 8, "n_layers": 3, "d_ff": 48, "context_length": T, "unroll": 1}
ALONE = Mesh()
MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "tensor": Mesh(tensor=8),
    "two": Mesh(fsdp=2, tensor=4),
    "three": Mesh(data=2, fsdp=2, tensor=2),
    "few": Mesh(data=2),
    "four": Mesh(data=-1, fsdp=2, tensor=2),
    "forced": Mesh(forced=True),
}
TEXTS = {"source", "source_segments", "tokens", "segments"}


def decoder(**fields):
    return Recipe(Decoder(**SIZES | fields))


def hyper(optimizer=None):
    return Hyper(np.uint32(0), np.int32(STEPS), optimizer or AdamW(Constant(3e-3)))


def batches(recipe, count, rows=B, seed=0):
    """Of rows of unequal length."""
    rng, two = np.random.default_rng(seed), set(recipe.objective.needs) >= TEXTS
    width = T + recipe.objective.lookahead
    real = np.arange(width) < rng.integers(2, width + 1, (count, rows, 1))
    found = {"tokens": rng.integers(0, V - 4, (count, rows, width), dtype=np.int32), "segments": real.astype(np.int32)}
    if two:  # what answers is the text backwards
        source = {"source": found["tokens"], "source_segments": found["segments"]}
        found |= {name: array[..., :T][..., ::-1] for name, array in source.items()}
    return found


def run(recipe, mesh, steps, hyper, per_call):
    """The losses of so many steps, and the program."""
    buffer, losses = batches(recipe, per_call), []
    with mesh.entered():
        state = init_state(recipe, hyper)
        placed_buffer = placed(buffer, 1)
        compiled = train_steps.lower(recipe, state, placed_buffer, np.int32(1), hyper).compile()
        for _ in range(0, steps, per_call):
            state, rows = compiled(state, placed_buffer, np.int32(per_call), hyper)
            losses += np.asarray(rows["loss"]).tolist()
        layout = shardings(state, recipe.model.declared())
        same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b, a.ndim), state, layout)
        assert all(jax.tree.leaves(same)), "a step returns the state in another layout"
    return losses, compiled


def quick():
    """Losses; what the program of an FSDP step does; a checkpoint on other devices."""
    recipe, losses = decoder(), {}
    losses["alone"], _ = run(recipe, ALONE, 2, hyper(), 2)
    losses["fsdp"], compiled = run(recipe, MESHES["fsdp"], 2, hyper(), 2)
    return {"losses": losses, "program": program(recipe, compiled), "checkpoint": checkpoint(recipe)}


def program(recipe, compiled):
    """The collectives of a step by kind, with the shapes of their results; and bytes of one device."""
    state = jax.eval_shape(lambda: init_state(recipe, hyper()))
    pattern = r"= (\(?\w+\[.*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    ops = collections.defaultdict(list)
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        ops[kind] += [[int(n) for n in text.split(",") if n] for text in re.findall(r"\w\d+\[([\d,]*)\]", shapes)]
    params = {path: list(a.shape) for path, a in by_path(state.params).items()}
    own = compiled.memory_analysis().argument_size_in_bytes
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((state, batches(recipe, 2))))
    return {"ops": ops, "params": params, "bytes": own, "fair": whole / 8}


def checkpoint(recipe):
    """Digests of a state that is saved on 8 devices, and restored on 4, on 1 and on 8; and its manifests."""
    how, found, declared = hyper(), {}, recipe.model.declared()
    shapes = jax.eval_shape(lambda: init_state(recipe, how))

    def abstract():
        box = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        return jax.tree.map(box, shapes, shardings(shapes, declared))

    def save(path, state):
        writer = CheckpointWriter(path)
        writer.save(state, 1)
        writer.close()
        found[path.name] = json.loads((path / "1" / "manifest.json").read_text())["sha256"]

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "on8"
        with MESHES["fsdp"].entered():
            save(saved, init_state(recipe, how))
        for name, mesh in (("on4", Mesh(fsdp=2, tensor=2)), ("on1", ALONE), ("on8again", MESHES["three"])):
            with mesh.entered():
                state = Checkpoints(saved).restore(abstract(), 1)
                assert len(state.params["embedding"]["table"].sharding.device_set) == (
                    np.prod([*axis_sizes().values()]) or 1
                )
                save(Path(folder) / name, state)
    return found


CASES = {
    "decoder": (decoder(), None),
    "grouped heads, blocked": (
        decoder(n_kv_heads=4, position=Rotary(), kernel=Softmax(implementation=Blocked(4))),
        None,
    ),
    "encoder": (Recipe(Encoder(**SIZES), Masked(share=0.5, mask=V - 1, special=(V - 1,), vocab_size=V)), None),
    "encoder-decoder": (Recipe(EncoderDecoder(**SIZES), SequenceToSequence()), None),
    "contrastive": (Recipe(Encoder(**SIZES, head=EmbeddingHead(width=8)), Contrastive()), None),
    "groups and muon": (decoder(norm=RMSNorm()), Groups()),
    "adafactor": (decoder(), Adafactor(Constant(0.01))),
    "schedule-free": (decoder(), ScheduleFree()),
    "lora": (dataclasses.replace(decoder(), adapter=LoRA(2)), AdamW(Constant(3e-2))),
    "value embeddings": (decoder(mixer=ValueEmbeddings()), None),
    "accumulation": (dataclasses.replace(decoder(), slices=2), None),
    "remat": (decoder(remat="dots_saveable"), None),
    "bfloat16": (dataclasses.replace(decoder(), compute_dtype="bfloat16"), None),
    "products of halves": (dataclasses.replace(decoder(), product_dtype="bfloat16"), None),
    "spikes": (dataclasses.replace(decoder(), guard=Guard(spike=6.0), grad_norms=True), None),
    "dropout, a head of its own": (decoder(dropout=0.1, head=LanguageHead(tied=False, bias=True)), None),
    "lstm": (Recipe(LSTM(32, T, V, n_layers=2)), None),
    "table": (Recipe(TokenEmbedding(32, T, V)), SGD(Constant(0.1))),
}


def whole(*names, steps=STEPS):
    """Losses of the cases on each mesh."""
    found = {}
    for name, (recipe, optimizer) in CASES.items():
        if names and name not in names:
            continue
        found[name] = {"alone": run(recipe, ALONE, steps, hyper(optimizer), 10)[0]}
        for label, mesh in MESHES.items():
            if recipe.model.dims.get("G", 8) % mesh.tensor or (
                name != "decoder" and label in ("few", "four", "forced")
            ):
                continue
            found[name][label] = run(recipe, mesh, steps, hyper(optimizer), 10)[0]
    return found


if __name__ == "__main__":
    simulate_devices(8)
    print(json.dumps({"quick": quick, "whole": whole}[sys.argv[1]](*sys.argv[2:])))
