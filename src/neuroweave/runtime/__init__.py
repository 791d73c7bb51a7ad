"""Runs a model fast: a program of few operations, compiled for the CPU at hand, with weights in three formats."""
