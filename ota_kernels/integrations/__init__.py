"""The kernels inside of other tools."""
