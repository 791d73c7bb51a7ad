"""Neurons: banks of them, where they come from, and the delta weights that a bank gives for a model.

`bank.py` is the file format; `extraction.py` (needs torch), `behaviours.py` and `derive.py` make neurons; `slots.py`
and `layer_deltas.py` say which neuron goes where in a layer, and `deltas.py` writes that for a whole model.
"""
