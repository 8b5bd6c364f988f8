"""Training on several GPUs: the ranks, what each of them holds, and how it comes there."""
