"""Registration of a prepared vertebra to X-rays, from a start pose to a judged answer."""
