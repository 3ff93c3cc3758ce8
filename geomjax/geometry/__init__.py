"""Pure array kernels on stacks of matrices `[..., m, n]`: no names, files or models."""
