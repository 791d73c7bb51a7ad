"""Round a checkpoint's weights to numbers that decode fast, so that what the model computes changes least."""
