"""The procedural world: short cartoons with true sound, captions and events."""
