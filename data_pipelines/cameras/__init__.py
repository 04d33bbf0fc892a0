"""Cameras of other programs: read, converted to ours and back, and checked by what they do to the space that they see."""
