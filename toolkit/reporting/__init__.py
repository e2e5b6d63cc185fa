"""Console, history files, report, trackers."""
