"""What a run is minded by: how it is started and ended, hangs, deaths, and which GPU is taken."""
