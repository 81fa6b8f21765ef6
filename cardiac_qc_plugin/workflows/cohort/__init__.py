"""Runs over cohorts of any size on a Ray cluster, see docs/scaling.md.

:mod:`.engine` is the run; :mod:`.pool` has the workers, :mod:`.journal` what the run remembers, :mod:`.store` where the
results go.
"""
