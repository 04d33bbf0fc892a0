"""Finds each vertebra of a CT in two calibrated X-rays: radiative Gaussians, networks, losses and metrics, as pure functions."""

__version__ = "0.2.0"
