"""Numerical integration from noise to data. Takes callables; knows no network."""
