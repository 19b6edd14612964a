"""Megatron checkpoints: ``torch_dist`` (torch DCP with names of its own) and legacy ``mp_rank_XX`` folders."""
