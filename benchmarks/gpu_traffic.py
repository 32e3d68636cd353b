"""What a training step of GPT-2 124M reads and writes on an H200, operation by operation, of a program that is compiled
for one where there is none.

    pip install -e ".[cuda12]"
    JAX_PLATFORMS=cpu python benchmarks/gpu_traffic.py [FIELD=VALUE...] [--rows=40]

16 rows of 1,024 tokens in bfloat16, as `compare.py gpu step`. Nothing runs: bytes are those of operands and results, of
slices what is cut or written, times the turns of the loops around them; seconds are what they take at the bandwidth
that was measured on one (BENCHMARKS.md). Products are those of cuBLAS; what they take is not known here. Tried with jax
0.11.2 and 0.12.0.1 (`cuda12`, Python 3.12).
"""

import argparse
import os
import re
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

BANDWIDTH = 4.1e12  # bytes a second
SIZES = {"pred": 1} | {f"{kind}{8 * n}": n for kind in ("s", "u", "f", "bf") for n in (2, 4, 8)}  # s8: room to work in
FREE = "parameter", "tuple", "get-tuple-element", "bitcast", "constant"
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 13 } runtime_version { major: 12 minor: 9 }
"""


class Moved(NamedTuple):
    bytes: int  # in all turns
    turns: int  # of the loops around it; of one whose number of turns is not known, 1
    name: str
    shape: str  # of the result
    of: str  # what a product or a call of cuDNN is
    source: str  # where in the model it comes from


class Operation(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: list[str]
    line: str


def traffic(program: str) -> list[Moved]:
    """What each operation of an optimised program moves, the most first."""
    computations, found = _computations(program), list[Moved]()

    def walk(name: str, turns: int) -> None:
        for each in computations[name]:
            called = re.findall(r"(?:body|to_apply|calls|_computation)=%?([\w.\-]+)", each.line)
            if branches := re.search(r"branch_computations=\{(.*?)\}", each.line):
                called += re.findall(r"[\w.\-]+", branches[1])
            if each.kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', each.line)
                walk(called[0], turns * int(known[1]) if known else turns)
            elif each.kind in ("call", "conditional"):
                for inner in called:
                    walk(inner, turns)
            elif each.kind not in FREE and not each.kind.endswith("-done"):
                moved = turns * _moved(each, called, computations, name)
                lines = "\n".join([each.line, *(one.line for inner in called for one in computations[inner])])
                shape, of = _first(r"(\w+\[[\d,]*\])", each.shape), _first(r'custom_call_target="([^"]*)"', lines)
                found.append(Moved(moved, turns, each.name, shape, of, _first(r'op_name="([^"]*)"', each.line)))

    walk(next(name for name in computations if re.search(rf"^ENTRY %?{re.escape(name)} ", program, re.M)), 1)
    return sorted(found, reverse=True)


def _computations(program: str) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    within: list[Operation] = []
    for line in program.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            within = found[begins[1]] = []
        elif told := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            name, shape, kind, rest = told.groups()
            within.append(Operation(name, shape, kind, re.findall(r"%([\w.\-]+)", rest.split("), ")[0]), line))
    return found


def _first(pattern: str, text: str) -> str:
    """What the pattern's group matches; "" if it does not."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _bytes(shape: str) -> int:
    each = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(SIZES.get(dtype, 0) * int(np.prod([int(n) for n in sizes.split(",") if n])) for dtype, sizes in each)


def _moved(each: Operation, called: list[str], computations: dict[str, list[Operation]], where: str) -> int:
    shapes = {one.name: one.shape for one in computations[where]}
    if each.kind == "dynamic-slice":
        return 2 * _bytes(each.shape)
    if each.kind == "dynamic-update-slice":
        return 2 * _bytes(shapes.get(each.operands[1], ""))
    if not called or not each.kind.startswith("fusion"):
        return _bytes(each.shape) + sum(_bytes(shapes.get(name, "")) for name in each.operands)
    inside = computations[called[0]]
    own = {one.name: one for one in inside}
    updates = [one for one in inside if one.kind == "dynamic-update-slice"]
    total = sum(_bytes(one.shape) for one in _results(inside))

    def readers(one: Operation) -> list[tuple[Operation, str]]:
        """What reads it, but for bitcasts, and as what: "" says where."""
        users = [user for user in inside if one.name in user.operands]
        behind = [found for user in users if user.kind == "bitcast" for found in readers(user)]
        others = [user for user in users if user.kind != "bitcast"]
        return behind + [(user, user.kind if user.operands[0] == one.name else "") for user in others]

    for one in inside:
        if one.kind == "parameter":
            users, kinds = [user for user, _ in readers(one)], {kind for _, kind in readers(one)}
            if kinds and kinds <= {"dynamic-slice", "slice", "gather"}:
                total += sum(_bytes(user.shape) for user in users)
            elif kinds != {"dynamic-update-slice"}:
                total += _bytes(one.shape)
    return total + sum(_bytes(own[one.operands[1]].shape) - _bytes(one.shape) for one in updates)


def _results(inside: list[Operation]) -> list[Operation]:
    root = next(one for one in inside if one.line.lstrip().startswith("ROOT"))
    return [one for one in inside if one.name in root.operands] if root.kind == "tuple" else [root]


def compiled(overrides: dict[str, str]) -> Any:
    """The step for an H200, five in a call."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false"  # needs a device
    from jax._src import xla_bridge  # before a GPU is found JAX does not know what to call its platform
    from jax.experimental import topologies

    known = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform in ("cuda", "gpu") else known(platform)
    chip = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    from peers import ours
    from peers.sizes import SIZES as OF_MODELS

    from jaxformer import platform
    from jaxformer.model import implementations
    from jaxformer.run.plan import hyper_of
    from jaxformer.run.step import init_state, train_steps

    platform.set_flags()
    ours.prepare = lambda: None  # nothing runs, so the sums of this build do not matter
    jax.default_backend = lambda: "gpu"
    implementations._no_cudnn, implementations._capability = lambda: None, lambda: (9, 0)
    size = OF_MODELS["124M, 1024"]
    config, recipe = ours.planned(size, {"train.compute_dtype": "bfloat16", **overrides})
    hyper = hyper_of(config)
    here = jax.sharding.SingleDeviceSharding(chip.devices[0])
    on = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)
    state = on(jax.eval_shape(lambda: init_state(recipe, hyper)))
    batches = on({"tokens": jax.ShapeDtypeStruct((5, size.batch, size.tokens + 1), np.uint16)})
    return train_steps.lower(recipe, state, batches, np.int32(5), hyper).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the config, such as model.unroll=1")
    parser.add_argument("--rows", type=int, default=40, help="how many operations are listed")
    given = parser.parse_args()
    if wrong := [each for each in given.overrides if "=" not in each]:
        parser.error(f"{wrong[0]} must be FIELD=VALUE, such as model.unroll=1")
    step = compiled(dict(each.split("=", 1) for each in given.overrides))
    found = traffic(step.as_text())
    products = [each for each in found if each.of]
    for told, some in {"products and attention": products, "the rest": [each for each in found if not each.of]}.items():
        total = sum(each.bytes for each in some)
        print(f"{told}: {total / 1e9:.1f} GB, {total / BANDWIDTH * 1e3:.1f} ms at {BANDWIDTH / 1e9:,.0f} GB/s")
    calls = sum(each.turns for each in found if "fmha" in each.of)
    temporary = step.memory_analysis().temp_size_in_bytes
    print(f"{calls} calls of cuDNN's attention; {temporary / 1e9:.2f} GB of temporary memory")
    for each in found[: given.rows]:
        what = each.of or each.source.rpartition("train_step)/")[2][-70:]
        print(f"{each.bytes / 1e9:7.3f} GB × {each.turns:3} {each.name[:34]:34} {each.shape[:26]:26} {what}")


if __name__ == "__main__":
    sys.exit(main())
