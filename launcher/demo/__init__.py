"""The demo: how its model and data were made, and its questions before and after."""
