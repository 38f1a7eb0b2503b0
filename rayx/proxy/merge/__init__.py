"""Merging: experts of one model become one, in memory for candidates or streamed over files."""
