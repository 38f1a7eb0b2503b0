"""Stage 1, corpus: a tokenizer's merges in the order of training, and the pairs in a text."""
