"""Stage 1, corpus: columns that say what a document is: ratings, buckets of scores, licences."""
