"""What is made of measurements: results, the report in README and docs, runs on a GPU, the entry for pytest-benchmark."""
