"""Compiles the Triton kernels ahead of time, for GPUs that need not be here, and checks the code.

    python tools/compile_kernels.py [--quick] [--target sm_90]

Prints a table of registers, spills, shared memory and loads and stores by bytes. Exits 1 where a variant does
not compile, where the merge kernel spills registers with up to 8 experts, or where contiguous elements are
read or written by less than 16 bytes at a time.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")

import click
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ota_kernels.backends.triton import survey_kernels
from ota_kernels.backends.triton.merge import Variant, constants, warps
from ota_kernels.backends.triton.merge_kernel import UNROLLED, _merge_kernel
from ota_kernels.backends.triton.tiles import WARPS, block_size

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Triton that brings what a target takes: an assembler that knows it, AMD's linker.
LEAST_TRITON = {"sm_100": (3, 3), "gfx942": (3, 6)}
POINTERS = {tl.bfloat16: "*bf16", tl.float16: "*fp16", tl.float32: "*fp32", tl.float64: "*fp64"}
_BYTES_OF_LOAD = 16
_ELEMENTS_OF_THREAD = 8
_FEW_EXPERTS = 8  # up to which a spill is an error

# OTA with absolute thresholds: bfloat16 models, float32 curvature.
PLAIN = Variant(
    n_experts=5, weights=tl.bfloat16, curvature="full", curvatures=tl.float32, acc=tl.float32, power="half",
    has_base=True, masked=True, brackets=False, census=False, mask_weights=True, fixed_denominator=False,
    elect_signs=False, fallback_to_base=True, repair=False, aligned=True, aligned_rows=False,
)  # fmt: skip
LINEAR = {"power": "none", "fixed_denominator": True}
CHANGES = {
    "ota": {},
    "ota, brackets": {"brackets": True},
    "ota, rank-1": {"curvature": "rank1", "aligned_rows": True},
    "ties": {**LINEAR, "elect_signs": True},
    "ota, T=8": {"n_experts": 8},
    "ota, T=17": {"n_experts": 17},
    "ota, to float32": {"acc": tl.float64},
    "ota, T=1": {"n_experts": 1},
    "ota, T=2": {"n_experts": 2},
    "ota, T=16": {"n_experts": 16},
    "ota, T=64": {"n_experts": 64},
    "ota, tail": {"tail": True},
    "ota, unaligned": {"aligned": False},
    "ota, census": {"brackets": True, "census": True},
    "ota, rank-1, odd rows": {"curvature": "rank1"},
    "ota, rank-1, brackets": {"curvature": "rank1", "aligned_rows": True, "brackets": True},
    "ota, log8": {"curvature": "log8"},
    "ota, bfloat16 curvature": {"curvatures": tl.bfloat16},
    "ota, float16 curvature": {"curvatures": tl.float16},
    "ota, curvature 1": {"curvature": "uniform"},
    "ota, float16": {"weights": tl.float16},
    "ota, float32": {"weights": tl.float32, "acc": tl.float64},
    "ota, float64": {"weights": tl.float64, "acc": tl.float64},
    "ota, unmasked": {"masked": False},
    "ota, power 1": {"power": "one"},
    "ota, power p": {"power": "general"},
    "ota, mask_weights: false": {"mask_weights": False},
    "ota, no base": {"has_base": False, "fallback_to_base": False},
    "ota, fallback to the mean": {"fallback_to_base": False},
    "ota, on_nonfinite: base": {"repair": True},
    "linear, masked": LINEAR,
    "linear, no base": {**LINEAR, "masked": False, "has_base": False, "fallback_to_base": False,
                        "curvature": "uniform"},
    "ties, on_nonfinite: base": {**LINEAR, "elect_signs": True, "repair": True},
}  # fmt: skip
QUICK = {
    "ota": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "ota, brackets": ("sm_90",),
    "ota, rank-1": ("sm_90",),
}


@dataclass(frozen=True)
class Kernel:
    """What to compile: a kernel's pointer and number parameters with their types, its constants, and how many
    16-byte loads and stores of elements each thread needs at least (None: they are not contiguous)."""

    label: str
    function: object
    types: dict[str, str]
    constants: dict
    loads: int | None = None
    stores: int | None = None
    may_spill: bool = True
    warps: int = WARPS


@dataclass(frozen=True)
class Code:
    """What the compiler made: registers of a thread, bytes in its spilling instructions, bytes of shared
    memory, and how many loads and stores there are by bytes."""

    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]


def merge_kernel(label: str, variant: Variant, threads_of_warp: int) -> Kernel:
    """A variant of the merge kernel; outputs in the type of the weights, or as wide as the sums ask for."""
    if variant.acc == tl.float32:
        out = variant.weights
    else:
        out = tl.float64 if variant.weights == tl.float64 else tl.float32
    types = {
        "base_pointer": POINTERS[variant.weights], "out_pointer": POINTERS[out], "table": "*i64",
        "numbers": "*fp64", "counts": "*i32", "appended": "*i32", "censuses": "*i64", "n": "i32",
        "first_block": "i32", "n_blocks": "i32", "first_element": "i32", "n_columns": "i32",
    }  # fmt: skip
    wide = variant.aligned and not variant.tail
    elements = _ELEMENTS_OF_THREAD * WARPS // warps(variant)
    weights = _wide_accesses(elements, variant.weights)
    of_expert = weights
    if variant.curvature == "full":
        of_expert += _wide_accesses(elements, variant.curvatures)
    elif variant.aligned_rows:
        of_expert += _wide_accesses(elements, tl.float32)
    experts = variant.n_experts if variant.n_experts <= UNROLLED else 1
    return Kernel(
        label,
        _merge_kernel,
        types,
        constants(variant, block_size(threads_of_warp)),
        experts * of_expert + weights * variant.has_base if wide else None,
        _wide_accesses(elements, out) if wide else None,
        may_spill=variant.n_experts > _FEW_EXPERTS,
        warps=warps(variant),
    )


def _wide_accesses(elements: int, dtype: tl.dtype) -> int:
    """16-byte loads in which a thread reads its elements; 0 where they have less."""
    return elements * dtype.primitive_bitwidth // 8 // _BYTES_OF_LOAD


def survey(threads_of_warp: int) -> Iterator[Kernel]:
    """The survey kernels for bfloat16 models with float32 curvature."""
    size = block_size(threads_of_warp)
    place = {"n": "i32", "first_block": "i32", "first_element": "i32", "n_columns": "i32"}
    expert = {"weights": tl.bfloat16, "curvature": "full", "curvatures": tl.float32, "has_base": True}
    common = {"aligned": True, "tail": False, "block_size": size}
    for of_edits in (False, True):
        name = "edits" if of_edits else "scores"
        types = {"base_pointer": "*bf16", "out_pointer": "*fp32", "suspects": "*i32", "table": "*i64",
                 "score_scale": "fp32", "threshold": "fp32", **place}  # fmt: skip
        constants = {"of_edits": of_edits, **expert, **common}
        yield Kernel(name, survey_kernels._scores_kernel, types, constants, 4, 2)
    for first in (True, False):
        types = {"base_pointer": "*bf16", "counts": "*i64", "lows": "*i64", "suspects": "*i32",
                 "table": "*i64", "score_scale": "fp32", "threshold": "fp32", "prefix": "i32",
                 **place}  # fmt: skip
        constants = {"of_edits": False, "first_digit": first, **expert, **common}
        name = f"histogram, {'high' if first else 'low'} bits"
        yield Kernel(name, survey_kernels._histogram_kernel, types, constants, 4)
    types = {"sums": "*fp64", "table": "*i64", "p": "*fp64", "n": "i32", "first_block": "i32"}
    constants = {"power": "half", "curvatures": tl.float32, **common}
    yield Kernel("power sum", survey_kernels._power_sum_kernel, types, constants, 2)
    types = {
        "values": "*fp32",
        "row_sums": "*fp64",
        "column_sums": "*fp64",
        "n_rows": "i32",
        "n_columns": "i32",
    }
    block = {"rows_of_block": survey_kernels._ROWS, "columns_of_block": survey_kernels._COLUMNS}
    constants = {"aligned": True, **block}
    elements = math.prod(block.values()) // (threads_of_warp * survey_kernels._MATRIX_WARPS)
    yield Kernel("row and column sums", survey_kernels._row_column_kernel, types, constants,
                 _wide_accesses(elements, tl.float32), warps=survey_kernels._MATRIX_WARPS)  # fmt: skip
    types = {"sums": "*fp64", "table": "*i64", "n": "i32", "first_block": "i32", "n_blocks": "i32"}
    yield Kernel("Gram matrix", survey_kernels._gram_kernel, types,
                 {"n_inputs": 5, "weights": tl.bfloat16, **common}, 2)  # fmt: skip


def compile_kernel(kernel: Kernel, target: GPUTarget) -> Code:
    """Compile as the launcher would: pointers are multiples of 16 bytes, numbers are not specialised."""
    names = kernel.function.arg_names
    aligned = [names.index(name) for name, t in kernel.types.items() if t.startswith("*")]
    try:
        from triton.backends.compiler import AttrsDescriptor  # triton 3.2: constants are not in the signature
    except ImportError:
        signature = {name: kernel.types.get(name, "constexpr") for name in names}
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    else:
        signature = kernel.types
        attributes = AttrsDescriptor.from_dict(
            {"cls": "AttrsDescriptor", "arg_properties": {"tt.divisibility": aligned, "tt.equal_to": []}}
        )
    source = ASTSource(kernel.function, signature, kernel.constants, attributes)
    options = {"num_warps": kernel.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)


def _read_nvidia(compiled) -> Code:
    ptx = compiled.asm["ptx"]
    usage, assembly = (_cuobjdump(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass"))
    spills = re.findall(r"\b(?:STL|LDL)(?:\.(64|128))?\b", assembly)
    return Code(
        int(re.search(r"REG:(\d+)", usage)[1]),
        sum(int(bits or 32) // 8 for bits in spills),
        compiled.metadata.shared,
        _widths(re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)),
        _widths(re.findall(r"st\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)),
    )


def _widths(found: list[tuple[str, str]]) -> dict[int, int]:
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in found]
    return {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool in Triton's wheel says of machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as room:
        code = Path(room, "cubin")
        code.write_bytes(cubin)
        return subprocess.run([tool, option, code], capture_output=True, text=True, check=True).stdout


def _read_amd(compiled) -> Code:
    text = compiled.asm["amdgcn"]
    bytes_of = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}

    def widths(access: str) -> dict[int, int]:
        found = re.findall(rf"(?:global|buffer)_{access}_(dwordx\d|dword|u?short|ubyte)", text)
        return _widths([("", str(8 * bytes_of[x])) for x in found])

    return Code(
        int(re.search(r"\.vgpr_count: *(\d+)", text)[1]),
        4 * int(re.search(r"\.vgpr_spill_count: *(\d+)", text)[1]),
        compiled.metadata.shared,
        widths("load"),
        widths("store"),
    )


def faults(kernel: Kernel, code: Code) -> list[str]:
    """What is wrong with the code, one line each."""
    found = []
    if code.spilled and not kernel.may_spill:
        found.append(f"spills {code.spilled} bytes")
    for name, wanted, widths in (("loads", kernel.loads, code.loads), ("stores", kernel.stores, code.stores)):
        if wanted is not None and widths.get(_BYTES_OF_LOAD, 0) < wanted:
            found.append(f"{widths.get(_BYTES_OF_LOAD, 0)} of {wanted} {name} have 16 bytes")
    return found


def kernels(target: str, quick: bool) -> Iterator[Kernel]:
    """What to compile for a target."""
    threads = TARGETS[target].warp_size
    for label, changes in CHANGES.items():
        if not quick or target in QUICK.get(label, ()):
            yield merge_kernel(label, replace(PLAIN, **changes), threads)
    if not quick:
        yield from survey(threads)


@click.command(help=__doc__.split("\n")[0])
@click.option("--quick", is_flag=True, help="The few variants that the tests compile.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Default: all.")
def main(quick: bool, targets: tuple[str, ...]) -> None:
    table = Table("kernel", "target", "registers", "spilled", "shared", "loads", "stores", "")
    failed = 0
    for target in targets or TARGETS:
        least = LEAST_TRITON.get(target, (0, 0))
        if tuple(map(int, triton.__version__.split(".")[:2])) < least:
            table.add_row("skipped", target, *[""] * 5, f"needs triton {least[0]}.{least[1]}")
            continue
        for kernel in kernels(target, quick):
            try:
                code = compile_kernel(kernel, TARGETS[target])
            except Exception as error:  # whatever a compiler raises is a row of the table
                table.add_row(kernel.label, target, *[""] * 5, f"{type(error).__name__}: {error}"[:200])
                failed += 1
                continue
            wrong = faults(kernel, code)
            failed += bool(wrong)
            loads, stores = (
                " ".join(f"{n}x{size}" for size, n in w.items()) for w in (code.loads, code.stores)
            )
            numbers = map(str, (code.registers, code.spilled, code.shared))
            table.add_row(kernel.label, target, *numbers, loads, stores, "; ".join(wrong))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
