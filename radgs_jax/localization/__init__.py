"""Which vertebra is where in single X-rays, and in several that agree."""
