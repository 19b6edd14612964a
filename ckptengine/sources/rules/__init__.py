"""Rules: the language that says what a foreign tensor's pieces mean.  See ``docs/rules.md``."""
