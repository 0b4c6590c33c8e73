"""Data sets for evaluation, read in their published layouts; `registry` has a row for each."""
