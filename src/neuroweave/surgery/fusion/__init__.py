"""Fusion: deltas into a checkpoint of any size, from headers and blocks, without a model class and without torch.

`arithmetic.py` has the formulas, `plan.py` what is changed by which delta, `tensor_edit.py` the work on a tensor,
`fuse.py` the whole; `recipe.py` does it again to the same bytes, `delta_extraction.py` finds the delta between two
checkpoints.
"""
