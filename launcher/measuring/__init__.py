"""Measuring on this machine: profiled runs, microbenchmarks, calibration."""
