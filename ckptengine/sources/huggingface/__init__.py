"""Folders that Hugging Face's training tools leave."""
