"""Stage 1, corpus: what is taken out of it: near-duplicates, and text that is also held out."""
