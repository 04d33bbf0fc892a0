"""What every operator stands on."""
