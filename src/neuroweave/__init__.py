"""Neuroweave: change the neurons of a language model and know what the change did."""

__version__ = "0.1.0"
