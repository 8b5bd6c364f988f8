"""GPUs: the catalog, what --gpu stands for, this machine's own."""
