"""The main job on real input: a small GPT on real text that is killed in a save and loses nothing."""
