"""Does `jaxformer check` find what it should? Known mistakes, put into a copy of the package one at a time.

    python scripts/mutations.py                 # all of them, as a table in Markdown; CI runs three
    python scripts/mutations.py mask_off_by_one cache_slot_late

Exit status 1 if a mistake is not found. Each is found by the first check that fails, which the table names.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "jaxformer"
TINY = "jaxformer.model.layers:LayerNorm"  # in the smallest model, a plain one
CHILD = """
import sys
from jaxformer.lab.check import check
found = check(sys.argv[1], dict(a.split("=", 1) for a in sys.argv[2:]), until_failure=True)
failed = [each for each in found.findings if each.status == "failed"]
print("|".join((failed[0].check, failed[0].detail)) if failed else "", flush=True)
"""


class Mutation(NamedTuple):
    """A mistake: in a file, this text for that one; and the config that shows it."""

    mistake: str
    file: str
    right: str
    wrong: str
    config: tuple[str, ...] = (TINY,)


WINDOW = TINY, "model.mask=Window", "model.mask.size=5"
MUTATIONS = {
    "mask_off_by_one": Mutation(
        "causal mask lets the next token in", "model/masks.py", "key.position <= query.position\n", "key.position <= query.position + 1\n"
    ),
    "documents_see_each_other": Mutation(
        "the mask forgets segments", "model/masks.py", "(query.segment == key.segment) &", "(key.segment > 0) &"
    ),
    "masked_to_zero": Mutation(
        "masked scores are 0, not −inf", "model/kernels.py", "look.view.mask(), scores, -jnp.inf)", "look.view.mask(), scores, 0.0)"
    ),
    "window_too_wide": Mutation(
        "a window sees a token more than the cache keeps",
        *("model/masks.py", "key.position > query.position - self.size", "key.position >= query.position - self.size"),
        WINDOW,
    ),
    "scale_twice": Mutation(
        "scores are divided by √K twice", "model/kernels.py", "q.shape[-1] ** -0.5 if", "q.shape[-1] ** -1.0 if"
    ),
    "softmax_plus_one": Mutation(
        "softmax's sum has 1 too much", "model/kernels.py", "powers.sum(-1, keepdims=True)", "powers.sum(-1, keepdims=True) + 1"
    ),
    "not_normalised": Mutation(
        "values are not divided by the sum of weights", "model/kernels.py", "-1) / total).astype", "-1)).astype"
    ),
    "heads_regrouped": Mutation(
        "query heads go to the wrong key head",
        "model/kernels.py",
        "return x.reshape(x.shape[0], groups, -1, x.shape[-1])",
        "x = x.reshape(x.shape[0], -1, groups, *x.shape[2:]); return x.swapaxes(1, 2).reshape(len(x), groups, -1, x.shape[-1])",
        (TINY, "model.n_heads=4", "model.n_kv_heads=2"),
    ),
    "cache_slot_late": Mutation(
        "the cache is written a slot late", "model/cache.py", "jnp.where(kept, position % size, beyond)", "jnp.where(kept, position % size + 1, beyond)"
    ),
    "cache_stale": Mutation("the cache that was read is returned unwritten", "model/cache.py", "return seen, written", "return seen, cache"),
    "positions_run_on": Mutation(
        "positions do not begin anew with a document", "model/masks.py", "return Places(index - start, segment", "return Places(index + 0 * start, segment"
    ),
    "places_ignored": Mutation(
        "learned positions are those of the array, not of the tokens",
        *("model/positions.py", 'lookup(params["table"], at.position)', 'lookup(params["table"], jnp.arange(x.shape[1])[None])'),
    ),
    "rotary_ignores_places": Mutation(
        "rotary angles are those of the array, not of the tokens",
        "model/positions.py",
        "position = at.position[:, None, :, None] / self.scaling",
        "position = jnp.arange(qk.shape[2])[None, None, :, None] / self.scaling",
        (TINY, "model.position=Rotary"),
    ),
    "padding_in_the_mean": Mutation(
        "mean pooling counts padding", "model/heads.py", "weights = real.astype(jnp.float32)\n        weights = weights /", "weights = jnp.ones_like(real, jnp.float32)\n        weights = weights /", ("help_topics",)
    ),
    "state_across_documents": Mutation(
        "a recurrent state lives on in the next document",
        *("model/baselines.py", "of_each(at.position == 0)", "of_each(at.position < 0)"),
        (TINY, "model=GRU", "model.d_model=32", "model.context_length=24"),
    ),
    "decoded_a_place_late": Mutation(
        "a written token stands a place too far", "generation/decode.py", "at = Places((lengths + i)[:, None]", "at = Places((lengths + i + 1)[:, None]"
    ),
    "one_key_for_all_tokens": Mutation(
        "all tokens of a text are drawn with one key", "generation/decode.py", "jax.random.fold_in(key, number)", "jax.random.fold_in(key, number * 0)"
    ),
    "prefill_reads_padding": Mutation(
        "the first token follows the padding", "generation/decode.py", "segment.sum(1)[:, None, None] - 1, axis=1", "segment.sum(1)[:, None, None], axis=1"
    ),
    "targets_not_shifted": Mutation(
        "the target is the token itself", "learning/objectives.py", "return Example(tokens[:, :-1], at, tokens[:, 1:]", "return Example(tokens[:, :-1], at, tokens[:, :-1]"
    ),
    "dropout_in_evaluation": Mutation(
        "evaluation has dropout", "learning/objectives.py", "self._summed(model, params, example, None)", "self._summed(model, params, example, jax.random.key(0))"
    ),
    "loss_without_normaliser": Mutation(
        "the loss lacks log of the sum of exp", "model/heads.py", "    return total - chosen\n", "    return 4.6 - chosen\n"
    ),
    "slices_weigh_alike": Mutation(
        "accumulated gradients are means of slices", "run/step.py", "return sums.minimised * scale, sums", "return 33 * sums.minimised * scale / jnp.maximum(sums.weight, 1), sums"
    ),
    "stale_key": Mutation(
        "every step has the same dropout", "keys.py", "jax.random.fold_in(jax.random.key(seed), step)", "jax.random.fold_in(jax.random.key(seed), 0 * step)"
    ),
    "first_batch_always": Mutation(
        "a call trains on its first batch only", "run/step.py", "metrics, row), at(i + 1)", "metrics, row), at(0)"
    ),
    "step_stands_still": Mutation("the step does not advance", "run/step.py", "TrainState(state.step + 1,", "TrainState(state.step + 0,"),
    "gradient_uphill": Mutation(
        "the update goes uphill", "run/step.py", "optax.apply_updates(moved, updates)", "optax.apply_updates(moved, jax.tree.map(jnp.negative, updates))"
    ),
    "attention_unused": Mutation(
        "what a branch gives is not added", "model/residuals.py", "return stream + h if getattr", "return stream if getattr"
    ),
    "gain_not_trained": Mutation(
        "no gradient reaches the gains of norms", "model/layers.py", 'RMSNorm(self.eps, self.one_plus)(params, h -', 'RMSNorm(self.eps, self.one_plus)(jax.lax.stop_gradient(params), h -'
    ),
    "norms_decay": Mutation(
        "weight decay acts on norms and biases", "learning/optimizers.py", "map_declared(lambda box: box.decay, declared)", "map_declared(lambda box: True, declared)"
    ),
    "no_decay": Mutation(
        "weight decay is forgotten", "learning/optimizers.py", "self.eps, weight_decay=self.weight_decay", "self.eps, weight_decay=0.0"
    ),
    "float32_product": Mutation(
        "scores are a float32 product in bfloat16 training",
        *("model/kernels.py", "_grouped(q * scale,", "_grouped((q * scale).astype(jnp.float32),"),
        (TINY, "train.compute_dtype=bfloat16"),
    ),
    "a_stride_too_long": Mutation(
        "evaluation leaves a token out between windows", "data/batches.py", "self._windows(source, size, rows * size.window, padded=True)", "self._windows(source, size, rows * (size.window + 1), padded=True)"
    ),
    "windows_by_chance": Mutation(
        "batches are drawn by a global generator", "data/batches.py", "first = mix(mix(key) + numbers) %", "first = np.random.randint(0, 2**62, len(numbers)).astype(np.uint64) %"
    ),
    "state_not_saved": Mutation(
        "the optimizer's state is saved as zeros", "run/checkpoint.py", "manifest = Manifest.of(state)", "state = state.replace(opt_state=jax.tree.map(lambda a: a * 0, state.opt_state))\n            manifest = Manifest.of(state)"
    ),
}  # fmt: skip


def found(name: str) -> tuple[str, str]:
    """The check that fails of the mutated package, and what it says; "" if none does."""
    own = MUTATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "jaxformer"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(PACKAGE.parent / "configs", Path(folder) / "configs")
        path = copy / own.file
        text = path.read_text(encoding="utf-8")
        if own.right not in text:
            raise SystemExit(f"{name}: {own.file} has no {own.right!r} any more; mend scripts/mutations.py")
        path.write_text(text.replace(own.right, own.wrong, 1), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": folder, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-c", CHILD, *own.config]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{name}: the check did not run: {ended.stderr[-2000:]}")
    check, _, detail = ended.stdout.strip().splitlines()[-1].partition("|") if ended.stdout.strip() else ("", "", "")
    return check, detail


def main() -> int:
    """Prints the table."""
    names, missed = sys.argv[1:] or list(MUTATIONS), 0
    if wrong := [name for name in names if name not in MUTATIONS]:
        print(f"{wrong[0]!r} is no mutation; there are {', '.join(MUTATIONS)}", file=sys.stderr)
        return 2
    print("| mistake | file | found by | it says |\n| --- | --- | --- | --- |", flush=True)
    for name in names:
        check, detail = found(name)
        missed += not check
        cells = MUTATIONS[name].mistake, MUTATIONS[name].file, check or "**nothing**", detail.replace("|", "\\|")
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(names) - missed} of {len(names)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
