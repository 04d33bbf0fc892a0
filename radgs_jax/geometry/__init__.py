"""Rigid motions, cameras, rays and grids."""
