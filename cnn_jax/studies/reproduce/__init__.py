"""The accuracies in RESULTS.md: the runs, their records, the tables."""
