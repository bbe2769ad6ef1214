"""The layers of a network, and the gradients of their weights formed by somebody else."""
