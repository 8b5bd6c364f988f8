"""Jobs: a plan as a file that SkyPilot or dstack rents a card by, with limits of disk, time and price."""
