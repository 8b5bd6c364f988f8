"""Merging: adapters and their base to one 16-bit model, beside how the adapter answered."""
