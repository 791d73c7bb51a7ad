"""vLLM: patched and NeuroBLAST checkpoints, served right or refused. vLLM is imported once it calls `register`."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make vLLM know our architectures; it calls this in each of its processes (entry point `vllm.general_plugins`)."""
    from neuroweave.vllm_plugin.registration import register_architectures

    register_architectures()
