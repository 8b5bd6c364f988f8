"""Loading a base model a few tensors at a time, by the rules of transformers' own loader."""
