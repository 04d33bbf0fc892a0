"""Flags, progress bars and compiled programs, which all commands share."""
