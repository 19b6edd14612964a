"""Hugging Face safetensors: one file, shards with an index, and torch DCP's sharded variant."""
