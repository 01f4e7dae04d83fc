"""The network: torch, and no torch.distributed."""
