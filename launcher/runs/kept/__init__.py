"""What a run keeps to go on from: checkpoints, what it was started on, and how it goes on."""
