"""Fit a model to text: data and tokenizers, the training loop, and healing of what a change broke.

Data is tokenised once and read by index, in NumPy alone, so that every loop sees the same rows. The loop is
transformers' Trainer with guards: a run stops at the first loss that is not finite, and resumes with the next sample.
"""
