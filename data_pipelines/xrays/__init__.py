"""Measured X-rays: line integrals, valid pixels and cameras from hospital and laboratory files."""
