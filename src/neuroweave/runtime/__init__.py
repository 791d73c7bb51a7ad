"""Runs a model: writes text through transformers, many texts at once, through JAX, or fast, as a program of few
operations that is compiled for the CPU at hand, with weights in three formats."""
