"""torch.distributed.checkpoint (DCP): read without torch.distributed, and written."""
