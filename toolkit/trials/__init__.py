"""What runs in a trial's process: programs that train, and the probe that measures all of them alike."""
