"""What the method is measured against."""
