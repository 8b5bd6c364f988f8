"""How the interface begins: what is drawn first, and the runs that go on."""
