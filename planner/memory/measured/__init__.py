"""What only measurements can say: coefficients, their files, what they cover."""
