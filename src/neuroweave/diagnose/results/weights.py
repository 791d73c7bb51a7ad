"""What two models share, tensor by tensor."""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Record


class TensorChange(Record):
    """One tensor that both models have in the same shape."""

    name: str
    layer: int | None
    family: str = Field(description="the name within its layer, such as `mlp.down_proj.weight`")
    shape: list[int]
    dtypes: list[str] = Field(description="[base, other]")
    equal_bytes: bool
    equal_values: bool
    cosine: float | None = Field(description="null: not defined or not finite")
    relative_change: float | None = Field(description="norm of the difference over the base's norm; null for 0 norms")
    singular_base: list[float] = Field(description="largest singular values, matrices only; one list when equal")
    singular_other: list[float]


class Weights(Record):
    """One model's weights against the base's."""

    source: str = Field(description="`files` or `memory`: where the tensors were read")
    parameters: int = Field(description="numbers in the tensors of the base")
    equal_bytes: int = Field(description="of these, numbers in tensors that are equal to the byte")
    equal_values: int = Field(description="numbers that are equal one by one, in tensors of the same shape")
    tensors: list[TensorChange]
    only_base: list[str]
    only_other: list[str]
    other_shape: list[str]
