"""Triton kernels, for those who install without nvcc. Importing a submodule needs triton; importing this does not."""
