"""What every command shares: flags, progress bars, kept programs."""
