"""Stage 1, corpus: domains for text that has none."""
