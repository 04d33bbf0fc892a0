"""Localization: the level and the place of each vertebra in single X-rays, and in several together."""
