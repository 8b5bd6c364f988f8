"""What is there between steps, and what a micro-step enters and leaves with."""
