"""`python -m ota_kernels`: the command line, as torchrun starts it."""

from .cli import main

main()
