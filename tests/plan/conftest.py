"""Property tests here are about results, not about how fast a busy machine reaches them."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
