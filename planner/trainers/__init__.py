"""Other trainers: their files read as setups with their stacks, and plans written as their files."""
