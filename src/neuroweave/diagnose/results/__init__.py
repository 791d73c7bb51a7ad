"""The result of a comparison as it is stored in comparison.json: typed, versioned, every number of every figure. Needs
pydantic and nothing heavier, so that a stored result is read at once."""
