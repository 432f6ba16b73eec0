"""What `make bench` runs: one file for each row, each measured beside its rival in the same run."""
