"""What only a GPU can show: `python -m pytest -m gpu tests/gpu`."""
