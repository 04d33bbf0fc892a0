"""Shared foundations of the operators."""
