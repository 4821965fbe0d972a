"""All that runs on a GPU, against a copy of as many bytes, eager torch and torch.compile.

    python -m bench.gpu [--budget 300] [--only T5] [--size 4GB] [--repeats 30] [--parameters 250000000]
    python -m pytest bench/test_gpu.py --benchmark-only [-k T5]     what is in memory through pytest-benchmark

Results are checked against the reference backend before anything is timed. GB/s count every byte in and out
once. Calls rotate over sets of inputs that are together larger than four last-level caches; the time of a
call is what lies between two events on its stream. Shares are of the copy bandwidth that the same run
measures, of torch's copy or a Triton kernel's, whichever is faster; of `ota-merge run`, of the bandwidth at
which its files can be read.

Beside each row stands the clock of the multiprocessors right after its calls; beside a row of one variant of
the merge kernel the machine instructions that an element takes (tools/compile_kernels.py), and the share of
all cycles in which one is issued: near 1, instructions bind, not memory. `host*` are tensors of one row each:
their times are what a call costs the host. The most telling cases come first; after `--budget` seconds none
begins.

A whole run writes bench/results/gpu-DEVICE.json after each case, and a plot beside it. `--quick` runs every
case at a size that says nothing about speed, under TRITON_INTERPRET=1 without a GPU too, and writes nothing.
"""
