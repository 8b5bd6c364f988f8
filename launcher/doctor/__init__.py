"""The doctor: what a training needs of this machine, what is there, and what to type."""
