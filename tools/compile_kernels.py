"""Compiles the Triton kernels ahead of time, for GPUs that need not be here, and checks the code.

    python tools/compile_kernels.py [--quick] [--target sm_90]

Prints a table: registers, warps of a processor that have room for them, spills, shared memory, loads and
stores by bytes, fences, and machine instructions per element of the path that is executed (the largest loop,
or all up to the end). Exits 1 where a variant does not compile, spills registers with up to 8 experts, has a
fence, rounds to bfloat16 by cutting off, takes more instructions than its budget, or reads or writes
contiguous elements by less than 16 bytes at a time."""

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

from ota_kernels.backends.triton import ranks, survey
from ota_kernels.backends.triton.merge import _merge_kernel
from ota_kernels.backends.triton.tiles import WARPS, block_size
from ota_kernels.backends.triton.variant import UNROLLED, Variant, constants, warps

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
    n_experts=5, weights=tl.bfloat16, bases=tl.bfloat16, outs=tl.bfloat16,
    curvature="full", curvatures=tl.float32, acc=tl.float32,
    edit="difference", score="saliency", select="at least", elect="none", weigh="curvature",
    divide="kept weights", power="scaled", has_base=True, origins=False, scaled=False, trimmed=False,
    floored=False, zero_divisor="fallback", fallback="base", repair=False, brackets=False, census=False,
    indexed=False, gathered=False, quads=False, flat=False, place="none", by_fours=False, aligned=True,
)  # fmt: skip
NO_CURVATURE = {"curvature": "uniform", "power": "one"}
LINEAR = {**NO_CURVATURE, "score": "none", "select": "all", "weigh": "constant", "divide": "number"}
VOTING = {**NO_CURVATURE, "score": "magnitude", "weigh": "constant"}
RANK1 = {"curvature": "rank1", "place": "whole"}
TO_FLOAT32 = {"acc": tl.float64, "power": "half"}
CHANGES = {
    "ota": {},
    "ota, brackets": {"brackets": True},
    "ota, rank-1": RANK1,
    "ota, listed": {"listed": True, "tail": True, "aligned": False},
    "ties": {**VOTING, "elect": "sum"},
    "ota, T=8": {"n_experts": 8},
    "ota, T=17": {"n_experts": 17},
    "ota, to float32": TO_FLOAT32,
    "ota, T=1": {"n_experts": 1},
    "ota, T=2": {"n_experts": 2},
    "ota, T=16": {"n_experts": 16},
    "ota, T=64": {"n_experts": 64},
    "ota, tail": {"tail": True},
    "ota, unaligned": {"aligned": False},
    "ota, census": {"brackets": True, "census": True},
    "ota, rank-1, odd rows": {"curvature": "rank1", "place": "long"},
    "ota, rank-1, rows by 4": {"curvature": "rank1", "place": "long", "by_fours": True},
    "ota, rank-1, narrow rows": {"curvature": "rank1", "place": "narrow"},
    "ota, rank-1, brackets": {**RANK1, "brackets": True},
    "ota, log8": {"curvature": "log8", "place": "whole"},
    "ota, bfloat16 curvature": {"curvatures": tl.bfloat16},
    "ota, float16 curvature": {"curvatures": tl.float16},
    "ota, curvature 1": {"curvature": "uniform"},
    "ota, float16": {"weights": tl.float16},
    "ota, float32": {"weights": tl.float32, **TO_FLOAT32},
    "ota, float64": {"weights": tl.float64, **TO_FLOAT32},
    "ota, exact roots": {"power": "half"},
    "ota, power 1": {"power": "one"},
    "ota, power p": {"power": "general"},
    "ota, rescaled": {"scaled": True},
    "ota, other origins": {"origins": True},
    "ota, ties by index": {"indexed": True, "flat": True},
    "ota, no base": {"has_base": False, "fallback": "mean", "score": "curvature"},
    "ota, fallback to the mean": {"fallback": "mean"},
    "ota, on_nonfinite: base": {"repair": True, "power": "half"},
    "clipped": {**LINEAR, "edit": "clipped", "n_experts": 1},
    "row magnitude, above": {**VOTING, "score": "row magnitude", "select": "above", "place": "whole",
                             "n_experts": 1},
    "spread, count": {**VOTING, "score": "spread", "elect": "count"},
    "magnitude, trimmed": {**VOTING, "trimmed": True},
    "all": {**LINEAR, "select": "all"},
    "all, masked": {**LINEAR, "score": "saliency", "select": "at least", "curvature": "full"},
    "all, no base": {**LINEAR, "has_base": False, "fallback": "mean"},
    "between": {**VOTING, "select": "between", "divide": "number"},
    "random": {**LINEAR, "select": "random", "quads": True},
    "random, gathered": {**LINEAR, "select": "random", "gathered": True, "flat": True},
    "random by rank": {**LINEAR, "select": "random by rank", "flat": True, "elect": "sum"},
    "by chance": {**LINEAR, "edit": "by chance", "select": "random by rank", "flat": True, "elect": "sum"},
    "sum, on_nonfinite: base": {**VOTING, "elect": "sum", "repair": True},
    "count, to float32": {**VOTING, "elect": "count", **TO_FLOAT32},
    "largest": {**VOTING, "elect": "largest"},
    "agreement": {**VOTING, "elect": "agreement"},
    "alone, kept count": {**VOTING, "weigh": "alone", "divide": "kept count", "select": "above"},
    "by row": {**LINEAR, "weigh": "by row", "divide": "weights", "place": "whole"},
    "by column": {**LINEAR, "weigh": "by column", "divide": "weights", "place": "whole"},
    "weights": {"divide": "weights"},
    "kept weights, at least": {"floored": True, "zero_divisor": "one"},
}  # fmt: skip
QUICK = {
    "ota": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "ota, brackets": ("sm_90",),
    "ota, rank-1": ("sm_90",),
    "ota, T=16": ("sm_90",),
    "ota, to float32": ("sm_90",),
    "ties": ("sm_90",),
    "random": ("sm_90",),
}
# Most instructions per element, of sm_90 from triton 3.7 on: above, they bind, not the memory. Earlier ones
# take up to 3 % more with brackets (3.6: 206), and 5 % with 16 experts (3.2: 326).
BUDGETS = {
    "ota": 130,
    "ota, bfloat16 curvature": 130,
    "ota, rank-1": 140,
    "ota, brackets": 200,
    "ota, T=16": 310,
}
BUDGETED = "sm_90", (3, 7)
# Bytes that may be spilled with up to 8 experts. A census, on sm_100 (68 with triton 3.7): 16 warps spill
# nothing, but take 46 % more instructions. Brackets of rank-1 curvature, with triton 3.9 (36 on sm_90, 60 on
# sm_100): more than 168 registers leave room for 8 warps, not 12. float16, sm_90, triton 3.6: one register.
SPILLS = {"ota, census": 80, "ota, rank-1, brackets": 64, "ota, float16": 8}


@dataclass(frozen=True)
class Kernel:
    """What to compile: a kernel's pointer and number parameters with their types, its constants, elements of
    a program, and how many 16-byte loads and stores of elements each thread needs at least (None: they are
    not contiguous)."""

    label: str
    function: object
    types: dict[str, str]
    constants: dict
    elements: int
    loads: int | None = None
    stores: int | None = None
    may_spill: bool = True
    warps: int = WARPS


@dataclass(frozen=True)
class Code:
    """What the compiler made: registers of a thread, bytes in its spilling instructions, bytes of shared
    memory, how many loads and stores there are by bytes, fences, instructions that a thread executes for its
    elements, and whether none rounds a result to the nearest bfloat16, as Triton's interpreter does not."""

    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    fences: int
    executed: int
    cuts_off: bool = False


def merge_kernel(label: str, variant: Variant, threads_of_warp: int) -> Kernel:
    """A variant of the merge kernel; outputs in the type of the weights, or as wide as the sums ask for."""
    out = variant.weights
    if variant.acc == tl.float64 and out != tl.float64:
        out = tl.float32
    variant = replace(variant, bases=variant.weights, outs=out)
    types = {
        "table": "*i64", "numbers": POINTERS[variant.acc], "tiles": "*i32", "counts": "*i32",
        "first_program": "i32", "n_programs": "i32",
    }  # fmt: skip
    wide = variant.aligned and not variant.tail
    elements = _ELEMENTS_OF_THREAD * WARPS // warps(variant)
    weights = _wide_accesses(elements, variant.weights)
    of_expert = weights
    if variant.curvature == "full":
        of_expert += _wide_accesses(elements, variant.curvatures)
    elif variant.curvature == "rank1" and (variant.place == "whole" or variant.by_fours):
        of_expert += _wide_accesses(elements, tl.float32)
    experts = variant.n_experts if variant.n_experts <= UNROLLED else 1
    return Kernel(
        label,
        _merge_kernel,
        types,
        constants(variant, block_size(threads_of_warp)),
        block_size(threads_of_warp),
        experts * of_expert + weights * variant.has_base if wide else None,
        _wide_accesses(elements, out) if wide else None,
        may_spill=variant.n_experts > _FEW_EXPERTS,
        warps=warps(variant),
    )


def _wide_accesses(elements: int, dtype: tl.dtype) -> int:
    """16-byte loads in which a thread reads its elements; 0 where they have less."""
    return elements * dtype.primitive_bitwidth // 8 // _BYTES_OF_LOAD


def surveys(threads_of_warp: int) -> Iterator[Kernel]:
    """The survey kernels for bfloat16 models with float32 curvature."""
    size = block_size(threads_of_warp)
    place = {"t": "i32", "n": "i32", "first_block": "i32", "first": "i32", "n_columns": "i32"}
    expert = {"n_experts": 1, "weights": tl.bfloat16, "curvature": "full", "curvatures": tl.float32,
              "score": "saliency", "select": "at least", "has_base": True, "origins": False, "indexed": False,
              "gathered": False, "place": "none"}  # fmt: skip
    common = {"aligned": True, "tail": False, "block_size": size}
    for what in ("scores", "edits"):
        types = {"base_pointer": "*bf16", "out_pointer": "*fp32", "suspects": "*i32", "table": "*i64",
                 "numbers": "*fp32", **place}  # fmt: skip
        yield Kernel(what, survey._values_kernel, types, {"what": what, **expert, **common}, size, 4, 2)
    for first in (True, False):
        types = {"base_pointer": "*bf16", "counts": "*i64", "suspects": "*i32",
                 "table": "*i64", "numbers": "*fp32", "prefix": "i32", **place}  # fmt: skip
        constants = {"of_edits": False, "first_digit": first, **expert, **common}
        name = f"histogram, {'high' if first else 'low'} bits"
        yield Kernel(name, survey._histogram_kernel, types, constants, size, 4)
    types = {"sums": "*fp64", "table": "*i64", "p": "*fp64", "n": "i32", "first_block": "i32"}
    constants = {"power": "half", "curvatures": tl.float32, **common}
    yield Kernel("power sum", survey._power_sum_kernel, types, constants, size, 2)
    types = {
        "values": "*fp32",
        "row_sums": "*fp64",
        "column_sums": "*fp64",
        "n_rows": "i32",
        "n_columns": "i32",
    }
    block = {"rows_of_block": survey._ROWS, "columns_of_block": survey._COLUMNS}
    elements = math.prod(block.values())
    of_thread = elements // (threads_of_warp * survey._MATRIX_WARPS)
    yield Kernel("row and column sums", survey._row_column_kernel, types, {"aligned": True, **block},
                 elements, _wide_accesses(of_thread, tl.float32), warps=survey._MATRIX_WARPS)  # fmt: skip


def ranking(threads_of_warp: int) -> Iterator[Kernel]:
    """The kernels of thresholds that are found on the device, for bfloat16 models with float32 curvature."""
    size = block_size(threads_of_warp)
    lists = {"begins": "*i64", "lengths": "*i32", "values": "*i32", "stride": "i64"}
    tables = {"table": "*i64", "numbers": "*fp32"}
    expert = {"n_experts": 5, "weights": tl.bfloat16, "bases": tl.bfloat16, "curvature": "full",
              "curvatures": tl.float32, "score": "saliency", "has_base": True, "place": "none"}  # fmt: skip
    for sampled in (True, False):
        types = {**lists, **tables, "tiles": "*i32", "lists": "*i64", "places": "*i64", "runs": "*i32"}
        name = f"scores of {'samples' if sampled else 'lists'}"
        yield Kernel(
            name, ranks._score_kernel, types, {**expert, "sampled": sampled, "block_size": size}, size
        )
    query = {"bins": "*i32", "ranks": "*i64"}
    grouped = {**lists, **query, "groups": "*i32"}
    for digit in range(ranks.DIGITS):
        constants = {"n_experts": 5, "queries": 2, "digit": digit, "from_inside": False, "block_size": size}
        yield Kernel(f"digit {digit}", ranks._digit_kernel, grouped, constants, size)
    constants = {"n_experts": 5, "block_size": size}
    yield Kernel("squares", ranks._squares_kernel, {**grouped, "squares": "*i64"}, constants, size)
    types = {**tables, **query, "wanted": "*i64", "sizes": "*i64", "exact": "*i32"}
    yield Kernel("bracket", ranks._bracket_kernel, types, {"n_experts": 5}, size)
    types = {**tables, "bins": "*i32", "wanted": "*i64", "left": "*i64", "lengths": "*i32", "found": "*i32"}
    constants = {**constants, "together": False}
    yield Kernel("threshold", ranks._decide_kernel, types, constants, size)


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
    found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", assembly, re.M)
    code = [(int(at, 16), condition, name, operands) for at, condition, name, operands in found]
    loops = [(int(to[1], 16), at) for at, _, name, operands in code
             if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", operands))]  # fmt: skip
    ends = [at for at, condition, name, _ in code if name == "EXIT" and not condition]
    return Code(
        int(re.search(r"REG:(\d+)", usage)[1]),
        sum(int(bits or 32) // 8 for bits in spills),
        compiled.metadata.shared,
        _widths(re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)),
        _widths(re.findall(r"st\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)),
        sum(name.startswith(("MEMBAR", "CCTL")) for _, _, name, _ in code),
        _executed([at for at, _, name, _ in code if name != "NOP"], loops, ends[0]),
        "cvt.rn.bf16" not in ptx,
    )


def _executed(places: list[int], branches: list[tuple[int, int]], end: int) -> int:
    """Of the instructions at these places, those of the largest loop, which takes block after block; where no
    loop is half of the code, those up to the end. branches: (target, place)."""
    loops = [sum(to <= at <= place for at in places) for to, place in branches if to < place < end]
    whole = sum(at <= end for at in places)
    return max(loops, default=0) if max(loops, default=0) > whole // 2 else whole


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

    code, labels, branches = [], {}, []
    for number, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.\w+):", line):
            labels[label[1]] = number
        elif instruction := re.match(r"\t([a-z]\w+)[ \t]*(\S*)", line):
            code.append(number)
            if instruction[1].startswith(("s_cbranch", "s_branch")):
                branches.append((labels.get(instruction[2], number), number))
            if instruction[1] == "s_endpgm":
                break
    return Code(
        int(re.search(r"\.vgpr_count: *(\d+)", text)[1]),
        4 * int(re.search(r"\.vgpr_spill_count: *(\d+)", text)[1]),
        compiled.metadata.shared,
        widths("load"),
        widths("store"),
        len(re.findall(r"\bbuffer_(?:wbl2|inv|gl\d_inv)", text)),
        _executed(code, branches, code[-1]),
    )


def warps_of_processor(kernel: Kernel, code: Code, target: str) -> int:
    """Warps that have registers on one processor: of 64 Ki registers in parts of 256 for each warp, at most
    64 (NVIDIA), of 512 for each of four SIMDs, at most 8 (gfx942)."""
    if TARGETS[target].backend == "hip":
        return 4 * min(8, 512 // (-(-code.registers // 8) * 8))
    warps = (1 << 16) // (-(-32 * code.registers // 256) * 256)
    return min(64, warps // kernel.warps * kernel.warps)


def faults(kernel: Kernel, code: Code, target: str) -> list[str]:
    """What is wrong with the code, one line each."""
    found = []
    if code.spilled > SPILLS.get(kernel.label, 0) and not kernel.may_spill:
        found.append(f"spills {code.spilled} bytes")
    if kernel.constants.get("outs") == tl.bfloat16 and code.cuts_off:
        found.append("does not round to the nearest bfloat16")
    if code.fences:
        found.append(f"{code.fences} fences")
    budgeted = target == BUDGETED[0] and _version() >= BUDGETED[1]
    budget = BUDGETS.get(kernel.label) if budgeted else None
    if budget and instructions(kernel, code, target) > budget:
        found.append(f"more than {budget} instructions")
    for name, wanted, widths in (("loads", kernel.loads, code.loads), ("stores", kernel.stores, code.stores)):
        if wanted is not None and widths.get(_BYTES_OF_LOAD, 0) < wanted:
            found.append(f"{widths.get(_BYTES_OF_LOAD, 0)} of {wanted} {name} have 16 bytes")
    return found


def _version() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def instructions(kernel: Kernel, code: Code, target: str) -> float:
    """Per element."""
    return code.executed * kernel.warps * TARGETS[target].warp_size / kernel.elements


def kernels(target: str, quick: bool) -> Iterator[Kernel]:
    """What to compile for a target."""
    threads = TARGETS[target].warp_size
    for label, changes in CHANGES.items():
        if not quick or target in QUICK.get(label, ()):
            yield merge_kernel(label, replace(PLAIN, **changes), threads)
    if not quick:
        yield from surveys(threads)
        yield from ranking(threads)


@click.command(help=__doc__.split("\n")[0])
@click.option("--quick", is_flag=True, help="The few variants that the tests compile.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Default: all.")
def main(quick: bool, targets: tuple[str, ...]) -> None:
    table = Table(
        *("kernel", "target", "registers", "warps", "spilled", "shared", "loads", "stores", "fences"),
        *("instructions", ""),
    )
    failed = 0
    for target in targets or TARGETS:
        least = LEAST_TRITON.get(target, (0, 0))
        if _version() < least:
            table.add_row("skipped", target, *[""] * 8, f"needs triton {least[0]}.{least[1]}")
            continue
        for kernel in kernels(target, quick):
            try:
                code = compile_kernel(kernel, TARGETS[target])
            except Exception as error:  # whatever a compiler raises is a row of the table
                table.add_row(kernel.label, target, *[""] * 8, f"{type(error).__name__}: {error}"[:200])
                failed += 1
                continue
            wrong = faults(kernel, code, target)
            failed += bool(wrong)
            loads, stores = (
                " ".join(f"{n}x{size}" for size, n in w.items()) for w in (code.loads, code.stores)
            )
            warps = warps_of_processor(kernel, code, target)
            numbers = map(str, (code.registers, warps, code.spilled, code.shared, loads, stores, code.fences))
            per_element = f"{instructions(kernel, code, target):.1f}"
            table.add_row(kernel.label, target, *numbers, per_element, "; ".join(wrong))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
