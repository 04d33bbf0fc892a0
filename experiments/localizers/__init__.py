"""Vertebra localizers: training, scoring, and use on calibrated X-rays."""
