"""All that RESULTS.md says of accuracy: the runs, their records, the tables."""
