"""What the inputs are, and whether several of them are one kind of model: reads headers and small files."""
