"""What pretraining is worth: evaluations of frozen features."""
