"""Files on disk to a ready model."""
