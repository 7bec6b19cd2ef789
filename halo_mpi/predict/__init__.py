"""What matters for the token at hand before it is computed, and what a late partial sum probably is: calibration and its use."""
