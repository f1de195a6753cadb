"""Products with low-rank factors: composed of PyTorch's operations on any device, fused on a CPU."""
