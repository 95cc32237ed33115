"""The stages of a run, each from the files of the one before it: simulate, import, pack, train, sample, evaluate; and what may
follow: density, reweight, interpolate, ablate.

In: a Recipe and folders. Out: folders. Used by the command line, one stage at a time or all in a row; every stage is
idempotent and carries on where a killed one stopped. Heavy packages are imported by the stage that needs them.
"""
