"""CTs and their labels: reading, one vertebra, the rest of the body."""
