"""Measured X-rays: line integrals, valid pixels and cameras from users' files."""
