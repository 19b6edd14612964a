"""DeepSpeed checkpoints: ZeRO stages 0 to 3, pipeline and expert files, and both dialects of universal."""
