"""Stage 6, choice: the parts that `rayx.choose` and `rayx.propose` are made of."""
