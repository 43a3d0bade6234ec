"""The folder's hypothesis profile: the same examples on every run, and no deadlines (a busy machine is not a bug)."""

from hypothesis import settings

settings.register_profile("infinicpu", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("infinicpu")
