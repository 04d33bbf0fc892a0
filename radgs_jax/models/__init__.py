"""The networks: 2D and 3D backbones, counterfactual attention, Gaussian heads, RecM, RegM and RadGS-Reg."""
