"""The run shown elsewhere: a process for each tracker follows metrics.jsonl."""
