"""What was measured on this machine: own runs beside predictions, and calibration."""
