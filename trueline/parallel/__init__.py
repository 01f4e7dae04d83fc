"""Every use of torch.distributed (torch.distributed.checkpoint apart)."""
