"""What will be done: reads headers only."""
